"""One method per module of the base -> the simplest adapter_config.json that PEFT reads as that."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.config import methods_of
from lora_jax.io.peft.kind import Field, Kind, Tensors, uniform
from lora_jax.io.peft.kinds import TABLE
from lora_jax.io.peft.match import Config, default_and_pattern
from lora_jax.method import Method

_HOME = {name: kind for kind in TABLE.values() for name in kind.factories}


def config_of(
    kind: Kind,
    methods: Mapping[str, Method],
    modules: Collection[str],
    base_name: str,
    *,
    parameters: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bias: str = "none",
    tied: bool = False,
    task_type: str | None = "CAUSAL_LM",
    tensors: Tensors | None = None,
) -> dict[str, Any]:
    """The simplest adapter_config.json with which PEFT finds exactly `methods`.

    `methods` maps the adapted modules to theirs, `modules` are all modules of the base, and
    `parameters` those arrays (of experts) that are named by themselves. Short names (`q_proj`)
    where every module so named is adapted alike, layers_to_transform where whole layers are left
    out, full names where nothing shorter is exact. Raises InputError for methods that no config of
    this type means.
    """
    own = {name: m for name, m in methods.items() if m.name in kind.factories}
    whole = sorted(set(methods) - set(own))
    if not own:
        raise InputError(
            f"PEFT's {kind.peft_type} needs at least one adapted module and this adapter has "
            "none; save the trained tree as a checkpoint instead"
        )
    general: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": bias,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": whole or None,
        "peft_type": kind.peft_type,
        "revision": None,
        "task_type": task_type,
    }
    general |= {"ensure_weight_tying": True} if tied else {}
    general = {option: v for option, v in general.items() if option not in kind.lacks}
    for targets in _targets(own, parameters, kind):
        config = general | targets
        config |= kind_options(kind, own, config, tensors or {})
        if _means(config, methods, modules, parameters, shapes or {}):
            return dict(sorted(config.items()))
    wrong = sorted(own)[0]
    raise InputError(
        f"no adapter_config.json of PEFT means this adapter: its name matching cannot tell "
        f"{wrong!r} from the others; adapt modules whose names do not contain each other's"
    )


def kind_options(
    kind: Kind, methods: Mapping[str, Method], config: Config, tensors: Tensors
) -> dict[str, Any]:
    """The options of one type, from its fields and from what it writes besides."""
    special = dict(kind.write(methods, config, tensors))
    options: dict[str, Any] = {}
    for field in kind.fields:
        if field.option not in special:
            values = {name: method.hyper[field.hyper] for name, method in methods.items()}
            options |= _option(kind, field, values)
    return options | special


def _option(kind: Kind, field: Field, values: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _short(value) for name, value in values.items()}
    if field.pattern:
        default, pattern = default_and_pattern(values)
        return {field.option: default, field.pattern: pattern}
    if field.loose:
        return {field.option: max(values.values())}
    return {field.option: uniform(kind.peft_type, field.option, values)}


def _short(value: Any) -> Any:
    """A whole number as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and value else value


def _targets(
    own: Mapping[str, Method], parameters: Collection[str], kind: Kind
) -> list[dict[str, Any]]:
    """The ways of naming the adapted modules, the shortest first."""
    modules = sorted(set(own) - set(parameters))
    arrays = sorted(set(own) & set(parameters))
    short, layers = _ends(modules, 1), _layers(modules)
    named = {"target_parameters": _ends(arrays, 2)} if arrays else {}
    ways: list[dict[str, Any]] = [{"target_modules": short, **named}]
    if "layers_to_transform" not in kind.lacks and layers:
        ways.append({"target_modules": short, "layers_to_transform": layers, **named})
    exact = {"target_parameters": arrays} if arrays else {}
    return [*ways, {"target_modules": modules, **named}, {"target_modules": modules, **exact}]


def _ends(names: Iterable[str], parts: int) -> list[str]:
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({int(n) for name in names for n in re.findall(r"\.(\d+)\.", name)[:1]})


def _means(
    config: Config,
    methods: Mapping[str, Method],
    modules: Collection[str],
    parameters: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether the config means these methods and nothing else."""
    found = methods_of(config, modules, [], parameters, shapes)
    return set(found) == set(methods) and all(
        same_function(found[name], method) for name, method in methods.items()
    )


def same_function(x: Method, y: Method) -> bool:
    """Whether two methods make the same weight of the same arrays.

    >>> from lora_jax.methods import lora
    >>> same_function(lora(rank=4, alpha=8.0), lora(rank=4, alpha=4.0, rslora=True))
    True
    """
    if x.name != y.name:
        return False
    if x.name not in _HOME:
        return x.hyper == y.hyper
    ours, theirs = _HOME[x.name].means(x), _HOME[y.name].means(y)
    return ours.keys() == theirs.keys() and all(_near(v, theirs[n]) for n, v in ours.items())


def _near(x: Any, y: Any) -> bool:
    both = isinstance(x, float) and isinstance(y, int | float)
    return math.isclose(x, y, rel_tol=1e-6) if both else x == y
