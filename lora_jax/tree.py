"""Paths of a parameter tree as strings, and rules over them.

One path language serves targets, learning rates, weight decay, sharding and export: a rule is a
regular expression that must match a whole `"/"`-joined path (or a predicate on what the path
names), the first rule that matches wins, and a rule that settles nothing is an error.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from lora_jax.errors import InputError

Rule = str | Callable[[Any], bool]
T = TypeVar("T")
IsLeaf = Callable[[Any], bool] | None


def flatten(tree: Any, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """The leaves of a tree by path, as a person would write it: `layers/attn/q_proj/kernel`.

    The boxes that Flax puts around an array (an NNX variable, a partitioned Linen parameter) add
    nothing to the path. Raises InputError when two leaves would get one path.

    >>> flatten({"mlp": [{"kernel": 1.0}, {"kernel": 2.0}]})
    {'mlp/0/kernel': 1.0, 'mlp/1/kernel': 2.0}
    """
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    siblings = Counter(keys[:-1] for keys, _ in keyed)
    paths = [_path(keys, lonely=siblings[keys[:-1]] == 1) for keys, _ in keyed]
    if twice := [path for path, n in Counter(paths).items() if n > 1]:
        raise InputError(f"two parameters share the path '{twice[0]}'; rename one of them")
    return {path: leaf for path, (_, leaf) in zip(paths, keyed, strict=True)}


def replace(tree: Any, leaves: Mapping[str, Any], is_leaf: IsLeaf = None) -> Any:
    """The same tree with the leaves at some paths replaced.

    >>> replace({"a": 1, "b": {"c": 2}}, {"b/c": 5})
    {'a': 1, 'b': {'c': 5}}
    """
    flat = flatten(tree, is_leaf)
    if unknown := [path for path in leaves if path not in flat]:
        raise InputError(f"no parameter at '{unknown[0]}'; nearest: {nearest(unknown[0], flat)}")
    return jax.tree.unflatten(
        jax.tree.structure(tree, is_leaf=is_leaf),
        [leaves.get(path, leaf) for path, leaf in flat.items()],
    )


def first_match(rules: Mapping[Rule, T], items: Mapping[str, Any]) -> dict[str, T]:
    """The value of the first rule that matches each path; paths that no rule matches are absent.

    A string matches a path by `re.fullmatch`, a predicate is called with the path's item. Every
    rule must settle at least one path; otherwise InputError names the nearest ones.

    >>> first_match({".*/bias": 0, "head/.*": 1}, {"head/kernel": None, "head/bias": None})
    {'head/kernel': 1, 'head/bias': 0}
    """
    won: dict[str, Rule] = {}
    for path, item in items.items():
        for rule in rules:
            if matches(rule, path, item):
                won[path] = rule
                break
    settled = set(won.values())
    for rule in rules:
        if rule not in settled:
            raise InputError(_explain(rule, items, won))
    return {path: rules[rule] for path, rule in won.items()}


def nearest(path: str, paths: Mapping[str, Any] | list[str]) -> str:
    """Up to three known paths that look most like a wrong one, for an error message."""
    close = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.0)
    return ", ".join(f"'{p}'" for p in close) or "none (there are no parameters)"


def count(tree: Any) -> int:
    """The number of scalars in a tree (shapes are enough; keys of a random stream count too).

    >>> count({"a": np.ones((3, 4)), "b": np.ones(5)})
    17
    """
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """The bytes that the arrays of a tree take."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _path(keys: tuple[Any, ...], lonely: bool) -> str:
    box = len(keys) > 1 and lonely and keys[-1] == jax.tree_util.GetAttrKey("value")
    return "/".join(_part(key) for key in (keys[:-1] if box else keys))


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def matches(rule: Rule, path: str, item: Any) -> bool:
    """Whether a rule matches a path: a pattern the whole path, a predicate its item."""
    if callable(rule):
        return item is not None and bool(rule(item))
    try:
        return re.fullmatch(rule, path) is not None
    except re.error as error:
        raise InputError(
            f"pattern '{rule}' is not a regular expression: {error}; escape it"
        ) from error


def _explain(rule: Rule, items: Mapping[str, Any], won: Mapping[str, Rule]) -> str:
    taken = [path for path in items if matches(rule, path, items[path])]
    name = f"predicate {getattr(rule, '__name__', rule)}" if callable(rule) else f"pattern '{rule}'"
    if taken:
        earlier = won[taken[0]]
        return (
            f"{name} has no effect: all it matches, such as '{taken[0]}', is taken by the earlier "
            f"rule {earlier!r}; put it first or drop it"
        )
    remedy = f"nearest: {nearest(rule, items)}" if isinstance(rule, str) else "print the sites"
    return f"{name} matches no parameter; {remedy}"
