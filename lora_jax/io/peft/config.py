"""PEFT's adapter_config.json -> one method per module of the base; nothing in it is ignored."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import Field, Kind
from lora_jax.io.peft.kinds import TABLE
from lora_jax.io.peft.match import Config, is_suffix, names, saved_whole, targeted
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method
from lora_jax.methods import full

# Options that every type reads, and those without effect on what is loaded. All others must be
# unset, but for those that the type's own record names.
_READ = {
    *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "layer_replication"),
}
_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"),
    *("peft_version", "revision", "task_type"),
    "fan_in_fan_out",  # how the base's own tensors lie; an adapter's are the same for both
}
_VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_MERGE = "Merge the adapter with peft and load the merged model, or train without them"


def kind_of(config: Config, place: str) -> Kind:
    """The record of a config's peft_type; InputError for one without a method here."""
    kind = config.get("peft_type")
    if kind in _VIRTUAL:
        raise InputError(
            f"{place}: {kind} has virtual tokens before a model's text; use load_prompt"
        )
    if kind not in TABLE:
        raise InputError(
            f"{place}: peft_type {kind!r} is not supported; known are {', '.join(sorted(TABLE))}"
        )
    return TABLE[kind]


def check_config(config: Config, place: str) -> None:
    """Raise InputError for every option of `config` that this library would have to ignore.

    `place` names the file in the message, which lists the options with their values.
    """
    kind = kind_of(config, place)
    kind.check(config, place)
    wrong = [f"{k}={config[k]!r}" for k in sorted(config) if not _accepted(k, config, kind)]
    if wrong:
        raise InputError(
            f"{place}: {len(wrong)} option{'s' * (len(wrong) > 1)} not supported: "
            f"{', '.join(wrong)}. {_MERGE}"
        )
    _check_numbers(config, kind, place)
    _check_patterns(config, kind, place)
    _check_targets(config, place)


def _accepted(option: str, config: Config, kind: Kind) -> bool:
    value = config[option]
    if option == "bias":
        return value in (None, "none", "all") or str(value).endswith("_only")
    if option == "eva_config":  # how an init that leaves the base alone was found
        return not value or config.get("init_lora_weights") == "eva"
    if option in kind.limits:
        return kind.limits[option](value)
    fields = {name for field in kind.fields for name in (field.option, field.pattern)}
    return option in _READ | _NO_EFFECT | fields | set(kind.free) or not value


def _check_targets(config: Config, place: str) -> None:
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is None and not config.get("target_parameters"):
        raise InputError(f"{place}: target_modules is missing; list the adapted modules' names")
    if isinstance(targets, str) and not (layers is None and config.get("layers_pattern") is None):
        raise InputError(
            f"{place}: layers_to_transform={layers!r} needs a list of target_modules, not the "
            f"regular expression {targets!r}; name the layers in the expression"
        )
    if config.get("layers_pattern") and layers is None:
        raise InputError(
            f"{place}: layers_pattern={config['layers_pattern']!r} without layers_to_transform; "
            "give both or neither"
        )


def _check_numbers(config: Config, kind: Kind, place: str) -> None:
    for field in kind.fields:
        if not field.number:
            continue
        values = {field.option: config.get(field.option, field.default)}
        values |= dict(config.get(field.pattern) or {})
        for name, value in values.items():
            _check_number(field, name, value, place)


def _check_number(field: Field, name: str, value: Any, place: str) -> None:
    word = field.hyper
    if field.number == "count" and (type(value) is not int or value < 1):
        raise InputError(f"{place}: {word} {value!r} for {name!r} is not a positive integer")
    if field.number == "positive" and (type(value) not in (int, float) or not value > 0):
        raise InputError(f"{place}: {word} {value!r} for {name!r} is not a positive number")


def _check_patterns(config: Config, kind: Kind, place: str) -> None:
    patterns = [key for field in kind.fields for key in config.get(field.pattern) or {}]
    patterns += names(config.get("layers_pattern")) + names(config.get("modules_to_save"))
    for option in ("target_modules", "exclude_modules", "feedforward_modules"):
        patterns += [config[option]] if isinstance(config.get(option), str) else []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as fault:
            message = f"{place}: {pattern!r} is not a regular expression: {fault}"
            raise InputError(message) from fault


def methods_of(
    config: Config,
    linear: Iterable[str],
    others: Iterable[str],
    parameters: Iterable[str] = (),
    shapes: Mapping[str, Shape] | None = None,
) -> dict[str, Method]:
    """The method of every module that a checked `config` adapts; modules left alone are absent.

    `linear` are the modules that hold a kernel of two axes, without the output head where
    'all-linear' must not reach it; `others` are the modules that only other options reach: the
    head, embeddings, norms. `parameters` are arrays that target_parameters may name, experts'.
    `shapes` are the kernels', for options that are shares of them. Pure: it looks at names only.

    >>> config = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "rank_pattern": {"1.q": 2}}
    >>> found = methods_of(config, ["layers.0.q", "layers.1.q", "layers.1.k"], [])
    >>> {module: method.hyper["rank"] for module, method in found.items()}
    {'layers.0.q': 4, 'layers.1.q': 2}
    """
    linear, kind = list(linear), kind_of(config, "config")
    config = _expanded(config, linear)
    found: dict[str, Method | None] = {}
    shapes = shapes or {}
    for module in [*linear, *others]:
        if saved_whole(config, module):
            found[module] = full()
        elif targeted(config, module):
            found[module] = kind.method(config, module, shapes.get(module, ()))
    for name in parameters:
        if is_suffix(config.get("target_parameters") or [], name):
            found[name] = kind.method(config, name, shapes.get(name, ()))
    return {name: method for name, method in found.items() if method}


def _expanded(config: Config, linear: list[str]) -> Config:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return {**config, "target_modules": linear}
    return config


def methods_in(config: Config, modules: Mapping[str, Module], place: str) -> dict[str, Method]:
    """The methods of a base's modules; InputError where the config means nothing that can stand."""
    kind = kind_of(config, place)
    parameters = [name for name, module in modules.items() if module.kind == "experts"]
    plain = [name for name in modules if name not in parameters]
    linear = [name for name in plain if modules[name].kind in ("linear", "conv")]
    shapes = {name: m.shapes["weight"] for name, m in modules.items() if "weight" in m.shapes}
    others = [name for name in plain if name not in linear]
    found = methods_of(config, linear, others, parameters, shapes)
    if not any(_is_own(method, kind) for method in found.values()):
        shown = config.get("target_modules") or config.get("target_parameters")
        known = f"; its modules are called like {linear[0]!r}" if linear else ""
        raise InputError(f"{place}: target_modules={shown!r} finds no module in this base{known}")
    for name, method in found.items():
        check_module(modules[name], method, kind, bool(config.get("ensure_weight_tying")))
    return found


def _is_own(method: Method, kind: Kind) -> bool:
    return method.name in kind.factories


def check_module(module: Module, method: Method, kind: Kind, tied: bool = True) -> None:
    """Raise InputError for a method that cannot stand on a module, here or in PEFT."""
    if module.kind == "tied" and not (tied and method.name in kind.factories):
        raise InputError(
            f"{method.name} on {module.name!r}, which is also this base's output head (tied): PEFT "
            "adapts the two uses apart, this library adapts the one parameter; untie them first, "
            "or train with ensure_weight_tying"
        )
    if method.name == "full" and "full" not in kind.factories:
        return
    if module.kind == "norm" and method.name != "full":
        raise InputError(
            f"{method.name} on {module.name!r}, which is a norm without a matrix; adapt it whole, "
            "by modules_to_save or full()"
        )
    if module.kind not in kind.kinds or (module.kind == "experts" and method.name == "dora"):
        raise InputError(
            f"PEFT's {kind.peft_type} has no {method.name} on {module.name!r}, which is "
            f"{module.kind}; adapt linear kernels, or use lora there"
        )
