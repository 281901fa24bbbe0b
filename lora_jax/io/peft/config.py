"""PEFT's adapter_config.json -> one method per module of the base; nothing in it is ignored."""

import re
from collections.abc import Iterable
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.match import Config, names, pattern_value, saved_whole, targeted
from lora_jax.method import Method
from lora_jax.methods import dora, full, lora

# Options that decide what is loaded. All others must be unset, but for those without effect on it.
_READ = {
    *("peft_type", "task_type", "bias", "init_lora_weights", "eva_config"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "modules_to_save",
}
_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
# Starting points that leave the base's weights alone. The others (pissa, olora, corda, loftq,
# lora_ga) rewrite them, and mica freezes one factor: such a file means nothing on the plain base.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def check_config(config: Config, place: str) -> None:
    """Raise InputError for every option of `config` that this library would have to ignore.

    `place` names the file in the message, which lists the options with their values.
    """
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise InputError(f"{place}: peft_type {kind!r} is not supported; only 'LORA' adapters load")
    wrong = [f"{k}={config[k]!r}" for k in sorted(config) if not _accepted(k, config[k], config)]
    if wrong:
        raise InputError(
            f"{place}: {len(wrong)} option{'s' * (len(wrong) > 1)} not supported: "
            f"{', '.join(wrong)}. Merge the adapter with peft and load the merged model, or train "
            "without them"
        )
    _check_values(config, place)


def _accepted(option: str, value: Any, config: Config) -> bool:
    if option == "bias":
        return value in (None, "none")
    if option == "task_type":
        return value in (None, "CAUSAL_LM")
    if option == "init_lora_weights":
        return any(value is known or value == known for known in _INITS)
    if option == "eva_config":
        return not value or config.get("init_lora_weights") == "eva"
    return option in _READ or option in _NO_EFFECT or not value


def _check_values(config: Config, place: str) -> None:
    _check_numbers(config, place)
    _check_patterns(config, place)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is None:
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


def _check_numbers(config: Config, place: str) -> None:
    ranks = {"r": config.get("r", 8)} | dict(config.get("rank_pattern") or {})
    alphas = {"lora_alpha": config.get("lora_alpha", 8)} | dict(config.get("alpha_pattern") or {})
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise InputError(f"{place}: rank {rank!r} for {name!r} is not a positive integer")
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not alpha > 0:
            raise InputError(f"{place}: alpha {alpha!r} for {name!r} is not a positive number")


def _check_patterns(config: Config, place: str) -> None:
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    patterns += names(config.get("layers_pattern")) + names(config.get("modules_to_save"))
    patterns += [v for v in map(config.get, ("target_modules", "exclude_modules")) if _is_text(v)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as fault:
            message = f"{place}: {pattern!r} is not a regular expression: {fault}"
            raise InputError(message) from fault


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def methods_of(config: Config, linear: Iterable[str], others: Iterable[str]) -> dict[str, Method]:
    """The method of every module that a checked `config` adapts; modules left alone are absent.

    `linear` are the modules that hold a kernel a LoRA can stand on, without the output head where
    'all-linear' must not reach it; `others` are the modules that only other options reach: the
    head, embeddings, norms. Pure: it looks at names only.

    >>> config = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "rank_pattern": {"1.q": 2}}
    >>> found = methods_of(config, ["layers.0.q", "layers.1.q", "layers.1.k"], [])
    >>> {module: method.hyper["rank"] for module, method in found.items()}
    {'layers.0.q': 4, 'layers.1.q': 2}
    """
    linear = list(linear)
    config = _expanded(config, linear)
    found = {}
    for module in [*linear, *others]:
        if saved_whole(config, module):
            found[module] = full()
        elif targeted(config, module):
            found[module] = _method(config, module)
    return found


def _expanded(config: Config, linear: list[str]) -> Config:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return {**config, "target_modules": linear}
    return config


def _method(config: Config, module: str) -> Method:
    rank = pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    settings: dict[str, Any] = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": bool(config.get("use_rslora", False)),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    init = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
    return (dora if config.get("use_dora") else lora)(**settings, init=init)
