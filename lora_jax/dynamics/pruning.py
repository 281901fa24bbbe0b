"""AdaLoRA after training: what was masked is left out for good."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, is_adapted, stacked
from lora_jax.dynamics.dynamics import changed, under
from lora_jax.method import Method

_ALONG = {"a": -1, "e": -1, "b": -2}  # the axis of the rank


def pruned(frozen: Any, trained: Trained) -> tuple[Any, Trained]:
    """The same function with every triplet dropped whose entry of `e` is zero.

    Ranks then differ, so that the layers of a stack get a list of methods, each with the rank that
    is left; the scale keeps the rank that training began with. A parameter without any triplet is
    no longer adapted. Parameters under other methods stay as they are.
    """
    leaves: dict[str, Any] = {}
    left = dict(trained)
    for path, node in under("adalora", frozen).items():
        leaves[path], left[path] = _pruned(node, trained[path])
        if not left[path]:
            del left[path]
    return tree.replace(frozen, leaves, is_adapted), left


def _pruned(node: Adapted, trained: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One parameter and its trained arrays; the kernel and nothing where no triplet is left."""
    methods, layers = _layers(node, trained)
    cut = {i: _cut(arrays) for i, arrays in layers.items()}
    ranks = {i: arrays["e"].size for i, arrays in cut.items() if arrays["e"].size}
    if not ranks:
        kept = "w" not in node.frozen  # a stored base has no array to give back
        return (node, trained) if kept else (node.frozen["w"], {})
    each = [_smaller(method, ranks.get(i, 0)) for i, method in enumerate(methods)]
    if len(set(each)) == 1:
        return _alike(node, each[0], [cut[i] for i in range(len(each))])
    width = next(iter(ranks.values()))
    idle = {str(i): _neutral(node, width) for i, method in enumerate(each) if method is None}
    made = replace(node, frozen={**node.frozen, "idle": idle}, methods=tuple(each))
    return made, {str(i): cut[i] for i in ranks}


def _layers(
    node: Adapted, trained: dict[str, Any]
) -> tuple[list[Method | None], dict[int, dict[str, jax.Array]]]:
    """The method of every matrix of the stack, and the arrays of those that have one."""
    if not isinstance(node.methods, Method):
        return list(node.methods), {int(i): arrays for i, arrays in trained.items()}
    flat = {n: x.reshape(-1, *x.shape[-1 if n == "e" else -2 :]) for n, x in trained.items()}
    count = len(flat["e"])
    return [node.methods] * count, {i: {n: x[i] for n, x in flat.items()} for i in range(count)}


def _cut(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    kept = np.flatnonzero(np.asarray(arrays["e"]))
    return {name: jnp.take(x, kept, axis=_ALONG[name]) for name, x in arrays.items()}


def _smaller(method: Method | None, rank: int) -> Method | None:
    """The method with so many triplets; None without any."""
    if method is None or not rank:
        return None
    hyper = method.innermost.hyper
    return changed(method, rank=rank, initial_rank=hyper["initial_rank"] or hyper["rank"])


def _alike(
    node: Adapted, method: Method | None, layers: list[dict[str, jax.Array]]
) -> tuple[Adapted, dict[str, Any]]:
    """A stack whose layers kept equally many."""
    assert method is not None
    frozen = {name: x for name, x in node.frozen.items() if name != "idle"}
    stack = node.site.stack if node.site else ()
    return replace(node, frozen=frozen, methods=method), stacked(layers, stack)


def _neutral(node: Adapted, rank: int) -> dict[str, jax.Array]:
    """The arrays of a layer that has no triplet left."""
    assert node.site is not None
    dtype = node.frozen["scale"].dtype
    shapes = {"a": (node.site.d_in, rank), "e": (rank,), "b": (rank, node.site.d_out)}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
