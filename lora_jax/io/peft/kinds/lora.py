"""LORA: lora and dora, with rsLoRA, on linear kernels, embeddings, convolutions and experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import Field, Kind, Methods, Modules, Part, Tensors, alike, turned
from lora_jax.io.peft.match import Config, default_and_pattern
from lora_jax.io.peft.module import PREFIX, Module, Shape
from lora_jax.method import Method
from lora_jax.methods import dora, lora
from lora_jax.methods.lora import scale_of

# Starting points under which a file means A and B on the base itself: with these the base stays.
_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica")
_REBUILT = ("pissa", "olora")  # those that rewrite the base in a way that follows from it
_LOST = ("pissa_niter", "corda", "lora_ga", "loftq")  # those that need what no file holds
_OURS = ("gaussian", "orthogonal", "mica", *_REBUILT)


def check_start(config: Config, place: str) -> None:
    """Raise InputError for a starting point that changed the base in a way that nobody can redo."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_LOST):
        raise InputError(
            f"{place}: init_lora_weights={init!r} is not supported: it changes the base by random "
            "numbers or data that the file does not hold. Save the adapter as plain LoRA, by "
            "peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _known_start(value: Any) -> bool:
    return any(value is known or value == known for known in (*_KEPT, *_REBUILT, None))


def _make(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    start = config.get("init_lora_weights")
    init = start if isinstance(start, str) and start in _OURS else "kaiming"
    factory = dora if config.get("use_dora") else lora
    return factory(**hyper, rslora=bool(config.get("use_rslora", False)), init=init)


def parts(module: Module, method: Method) -> Sequence[Part]:
    """The factors of one module, and the magnitude of DoRA."""
    found = _FACTORS.get(module.kind, _linear)(module.shapes["weight"], method.hyper["rank"])
    if method.name != "dora":
        return found
    width = module.shapes["weight"][-1]
    theirs = (
        (1, width, *(1 for _ in module.shapes["weight"][2:])) if module.kind == "conv" else None
    )
    return [*found, alike("lora_magnitude_vector", "magnitude", (width,), theirs)]


def _linear(shape: Shape, rank: int) -> list[Part]:
    a, b = (shape[0], rank), (rank, shape[1])
    return [turned("lora_A.weight", "a", a), turned("lora_B.weight", "b", b)]


def _embedding(shape: Shape, rank: int) -> list[Part]:
    a, b = (shape[0], rank), (rank, shape[1])
    return [turned("lora_embedding_A", "a", a), turned("lora_embedding_B", "b", b)]


def _convolution(shape: Shape, rank: int) -> list[Part]:
    *window, c_in, c_out = shape
    split, axes = (*window, c_in, rank), (len(shape) - 1, len(shape) - 2, *range(len(window)))
    theirs, ones = (rank, c_in, *window), tuple(1 for _ in window)
    a = Part("lora_A.weight", "a", (int(np.prod(split[:-1])), rank), split, axes, theirs)
    b = (rank, c_out)
    return [a, Part("lora_B.weight", "b", b, b, (1, 0), (c_out, rank, *ones))]


def _experts(shape: Shape, rank: int) -> list[Part]:
    """Row `e r + j` of PEFT's A is rank j of expert e; column `j E + e` of its B."""
    count, d_in, d_out = shape
    a, b = (count, d_in, rank), (count, rank, d_out)
    return [
        Part("lora_A.weight", "a", a, a, (0, 2, 1), (count * rank, d_in)),
        Part("lora_B.weight", "b", b, b, (2, 1, 0), (d_out, rank * count)),
    ]


_FACTORS = {
    "embedding": _embedding,
    "tied": _embedding,
    "conv": _convolution,
    "experts": _experts,
}
_HEAD = PREFIX + "lm_head."  # what a tied embedding is as a head: the same factors, transposed
_TIED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def _tied(modules: Modules, methods: Methods) -> dict[str, str]:
    """The keys of a tied head's factors, each with that of the embedding's."""
    stems = [modules[name].stem for name in methods if modules[name].kind == "tied"]
    return {_HEAD + end: f"{stem}.{other}" for stem in stems for end, other in _TIED.items()}


def _read(config: Config, tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    copies = _tied(modules, methods)
    for name, method in methods.items():
        head = LORA.method(config, "lm_head", ())
        if modules[name].kind == "tied" and (not head or scale(head) != scale(method)):
            raise InputError(
                f"rank_pattern and alpha_pattern give {name!r} another scale than the tied "
                "'lm_head', but this base has one parameter for both uses; train with one scale"
            )
    for key, other in copies.items():
        if key in tensors and not np.array_equal(tensors[key], tensors[other].T):
            raise InputError(
                f"{key} is not {other} transposed, but this base has one parameter for both uses; "
                "untie the base first, or train with ensure_weight_tying=True"
            )
    return {key: value for key, value in tensors.items() if key not in copies}


def _held(tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    copies = _tied(modules, methods)
    turned = {key: np.ascontiguousarray(tensors[other].T) for key, other in copies.items()}
    return {**tensors, **turned}


def _write(methods: Methods, config: Config, tensors: Tensors) -> Config:
    if len({method.name for method in methods.values()}) > 1:
        example = {method.name: module for module, method in methods.items()}
        raise InputError(
            f"PEFT has one use_dora for all modules; here {example['lora']!r} has lora and "
            f"{example['dora']!r} has dora; use one of them everywhere"
        )
    first = next(iter(methods.values()))
    rslora = all(method.hyper["rslora"] for method in methods.values())
    tied = next((m for n, m in methods.items() if n.endswith("embed_tokens")), None)
    named = {**methods, "lm_head": tied} if config.get("ensure_weight_tying") and tied else methods
    alpha, pattern = default_and_pattern({n: _alpha(m, rslora) for n, m in named.items()})
    rank, ranks = default_and_pattern({n: m.hyper["rank"] for n, m in named.items()})
    init = first.hyper.get("init")
    return {
        "alpha_pattern": pattern,
        "r": rank,
        "rank_pattern": ranks,
        "init_lora_weights": init if init in ("gaussian", "orthogonal") else True,
        "lora_alpha": alpha,
        "use_dora": first.name == "dora",
        "use_rslora": rslora,
    }


def _alpha(method: Method, rslora: bool) -> int | float:
    """Alpha under the adapter's one use_rslora, as an integer where it is one."""
    alpha = float(method.hyper["alpha"])
    if method.hyper["rslora"] and not rslora:  # alpha / sqrt(r) written as alpha' / r
        alpha *= method.hyper["rank"] ** 0.5
    return int(alpha) if alpha.is_integer() else alpha


def _holds(method: Method) -> bool:
    """Not factors that several matrices share."""
    return "method" not in method.hyper and not method.hyper.get("share")


def scale(method: Method) -> float:
    """The factor s before a @ b: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return scale_of(method.hyper["rank"], method.hyper["alpha"], method.hyper["rslora"])


LORA = Kind(
    peft_type="LORA",
    factories={"lora": lora, "dora": dora},
    fields=(
        Field("r", "rank", 8, "rank_pattern", "count"),
        Field("lora_alpha", "alpha", 8.0, "alpha_pattern", "positive"),
        Field("lora_dropout", "dropout", 0.0, loose=True),
    ),
    free=("use_rslora", "use_dora", "qalora_group_size", "runtime_config", "target_parameters"),
    limits={
        "init_lora_weights": _known_start,
        "ensure_weight_tying": lambda value: True,
        "eva_config": lambda value: True,
    },
    check=check_start,
    make=_make,
    parts=parts,
    read=_read,
    held=_held,
    write=_write,
    holds=_holds,
    meaning=lambda method: {"rank": method.hyper["rank"], "scale": scale(method)},
    kinds=("linear", "head", "embedding", "tied", "conv", "experts"),
)
