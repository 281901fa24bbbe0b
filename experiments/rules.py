"""The rules that `attach` takes, from `config.targets` and `config.method`."""

import ast
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import lora_jax as lj
from experiments import choices
from experiments.settings import Settings, check_type, unknown_key
from lora_jax.errors import InputError

NONE = "none"
"""As `config.targets`: nothing but what the task itself trains."""

PREDICATES = ("all_linear", "attention", "mlp", "kernels", "convolutions", "embeddings")
PREDICATES += ("recurrent", "recurrent_input")
TARGETS: dict[str, Callable[[lj.Site], bool]] = {name: getattr(lj, name) for name in PREDICATES}


def make_rules(settings: Settings) -> dict[Any, lj.Method | None]:
    """Turn `targets` and `method` into the rules that `attach` takes.

    `targets` is the name of a predicate, a pattern, "none", or a sequence of these; an entry may be
    a pair of a target and what differs there: {"rank": 4}, or None to leave it alone.
    """
    method = dict(settings.method)
    rules: dict[Any, lj.Method | None] = {}
    for target, changes in _entries(settings.targets):
        rule = target_of(target)
        if changes is not None:
            changes = choices.make("method", {**method, **_checked(method, changes)})
        rules[rule] = changes
    return rules


def _checked(method: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of one target, with every key known and every value of its type."""
    known = choices.defaults("method", changes.get("name", method["name"]))
    if unknown := next((key for key in changes if key not in known), None):
        raise unknown_key(unknown, known, "config.targets")
    return {key: check_type(f"targets: {key}", changes[key], known[key]) for key in changes}


def _entries(targets: Any) -> list[tuple[str, Mapping[str, Any] | None]]:
    """List (target, changes) pairs of whatever form `targets` has."""
    if isinstance(targets, str):
        several = _literal(targets)  # "('.*/q_proj/kernel', ...)" from a command line
        if isinstance(several, tuple | list):
            return _entries(several)
        return [] if targets == NONE else [(targets, {})]
    pairs = list(targets.items()) if isinstance(targets, Mapping) else targets
    entries = [(e, {}) if isinstance(e, str) else e for e in _sequence(pairs)]
    if not entries or not all(map(_is_pair, entries)):
        raise InputError(
            f"config.targets is {targets!r}; give a pattern or (pattern, changes) pairs"
        )
    return [(target, changes) for target, changes in entries]


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else []


def _is_pair(entry: Any) -> bool:
    return (
        len(_sequence(entry)) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], Mapping | None)
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def target_of(target: str) -> Any:
    """Find the predicate of that name, or take the text as a pattern."""
    if target in TARGETS:
        return TARGETS[target]
    named = re.fullmatch(r"\w+", target)  # anything else is a pattern
    close = difflib.get_close_matches(target, [*TARGETS, NONE], n=1, cutoff=0.8)
    if named and close:
        raise InputError(f"config.targets names no predicate '{target}'; nearest: '{close[0]}'")
    return target
