"""IA3: factors on outputs or inputs; LN_TUNING: whole modules, norms as a rule."""

import re
from collections.abc import Sequence
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import LINEAR, Kind, Methods, Part, Tensors, alike
from lora_jax.io.peft.match import Config, is_suffix, names
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method
from lora_jax.methods import full, ia3


def _is_feedforward(config: Config, module: str) -> bool:
    """Whether a module is scaled on its input side; PEFT compares bare endings here."""
    chosen = config.get("feedforward_modules") or []
    if isinstance(chosen, str):
        return re.fullmatch(chosen, module) is not None
    return any(module.endswith(name) for name in chosen)


def _ia3_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    return ia3(feedforward=_is_feedforward(config, module))


def _ia3(module: Module, method: Method) -> Sequence[Part]:
    d_in, d_out = module.shapes["weight"]
    if method.hyper["feedforward"]:
        return [alike("ia3_l", "l", (d_in,), (1, d_in))]
    return [alike("ia3_l", "l", (d_out,), (d_out, 1))]


def _check_ia3(config: Config, place: str) -> None:
    targets, chosen = config.get("target_modules"), config.get("feedforward_modules")
    if isinstance(targets, str) or isinstance(chosen, str):
        return
    if stray := sorted(set(names(chosen)) - set(names(targets))):
        raise InputError(
            f"{place}: feedforward_modules names {stray[0]!r}, which target_modules does not; "
            "feedforward modules are some of the targets"
        )


def _write_ia3(methods: Methods, config: Config, tensors: Tensors) -> Config:
    """Those targets that name feed-forward modules only."""
    chosen = [
        target
        for target in names(config["target_modules"])
        if all(m.hyper["feedforward"] for name, m in methods.items() if is_suffix([target], name))
    ]
    return {"feedforward_modules": chosen}


def _whole(module: Module, method: Method) -> Sequence[Part]:
    """Not used: the tensors of whole modules are the same for all types."""
    return []


IA3 = Kind(
    peft_type="IA3",
    factories={"ia3": ia3},
    fields=(),
    parts=_ia3,
    free=("feedforward_modules", "init_ia3_weights"),
    check=_check_ia3,
    make=_ia3_method,
    write=_write_ia3,
    lacks=("bias", "layers_to_transform", "layers_pattern"),
)
LN_TUNING = Kind(
    peft_type="LN_TUNING",
    factories={"full": full},
    fields=(),
    parts=_whole,
    kinds=(*LINEAR, "norm", "embedding", "conv", "other"),
    whole="ln_tuning_layers.",
    lacks=("bias", "layers_to_transform", "layers_pattern"),
)
