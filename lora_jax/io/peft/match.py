"""Which modules an adapter_config.json means: PEFT 0.21's own matching of names, on names alone.

A module is named as in the base's checkpoint, `model.layers.3.self_attn.q_proj`. A list of targets
matches whole dotted suffixes, a string is a regular expression on the whole name, and patterns of
ranks and alphas take the first key, in the file's order, that matches a dotted suffix.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]


def names(value: Any) -> list[str]:
    """A config's list of names: null is empty, a lone string is itself.

    >>> names(None), names("norm"), names(["a", "b"])
    ([], ['norm'], ['a', 'b'])
    """
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def saved_whole(config: Config, module: str) -> bool:
    """Whether modules_to_save names `module`; a bare suffix: 'norm' names 'input_layernorm' too."""
    return any(module.endswith(name) for name in names(config.get("modules_to_save")))


def targeted(config: Config, module: str) -> bool:
    """Whether `config` puts a low-rank adapter on `module`, as PEFT decides it.

    >>> targeted({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj")
    True
    >>> targeted({"target_modules": "q_proj"}, "model.layers.0.self_attn.q_proj")
    False
    """
    targets = config.get("target_modules") or []
    if _excluded(config, module):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:  # a whole name passes by the layer indices, in PEFT too
        return True
    return is_suffix(targets, module) and _layer_chosen(config, module)


def is_suffix(chosen: Iterable[str], module: str) -> bool:
    """Whether one of `chosen` is the module's name or its last dotted parts.

    >>> is_suffix(["q_proj"], "layers.0.q_proj"), is_suffix(["proj"], "layers.0.q_proj")
    (True, False)
    """
    return any(module == name or module.endswith(f".{name}") for name in chosen)


def _excluded(config: Config, module: str) -> bool:
    exclude = config.get("exclude_modules") or []
    if isinstance(exclude, str):
        if re.fullmatch(exclude, module):
            return True
    elif is_suffix(exclude, module):
        return True
    saved = names(config.get("modules_to_save"))
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)


def _layer_chosen(config: Config, module: str) -> bool:
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    holders = names(config.get("layers_pattern"))
    patterns = [rf"(?:^|.*?\.){h}\.(?P<idx>\d+)\." for h in holders] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\."
    ]
    found = next((m for m in (re.match(p, module) for p in patterns) if m), None)
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return found is not None and int(found["idx"]) in chosen


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the last dotted parts of `module`, or `default`.

    >>> pattern_value({"1.q": 2, "q": 6}, "layers.1.q", 4)
    2
    """
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value and a pattern for the rest, by short name where all of it agree.

    >>> default_and_pattern({"0.q": 4, "1.q": 4, "0.v": 2})
    (4, {'v': 2})
    """
    counts = Counter(values.values())
    default = min(counts, key=lambda value: (-counts[value], value))
    pattern = {}
    for module, value in sorted(values.items()):
        short = module.rsplit(".", 1)[-1]
        alike = {v for name, v in values.items() if is_suffix([short], name)}
        if value != default:
            pattern[short if len(alike) == 1 else module] = value
    return default, dict(sorted(pattern.items()))
