"""The tensors of several adapters, kernel by kernel, and their combination into one each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.compose.tensors import Recipe, combined


class Tasks(NamedTuple):
    """One tensor of several adapters: `[n, *stack, ...]`, its weights `[n, *stack]`, who has it."""

    tensors: jax.Array
    weights: jax.Array
    owners: tuple[int, ...]


def combine(
    tasks: Mapping[str, Tasks], recipe: Recipe, scope: str, key: jax.Array | None
) -> dict[str, jax.Array]:
    """Every tensor of the adapters as one: by itself, matrix by matrix, or all as one vector."""
    if scope == "global" and tasks:
        return _all(tasks, recipe, key)
    return {path: _one(own, recipe, fold(key, path)) for path, own in tasks.items()}


def _one(own: Tasks, recipe: Recipe, key: jax.Array | None) -> jax.Array:
    count, stack = len(own.owners), own.weights.shape[1:]
    matrices, size = math.prod(stack), math.prod(own.tensors.shape[1 + len(stack) :])
    flat = own.tensors.reshape(count, matrices, size).swapaxes(0, 1)
    weights = own.weights.reshape(count, matrices).T
    if key is None:
        out = jax.vmap(lambda t, w: combined(t, w, recipe))(flat, weights)
    else:
        keys = jax.random.split(key, matrices)
        out = jax.vmap(lambda t, w, k: combined(t, w, recipe, k))(flat, weights, keys)
    return out.reshape(own.tensors.shape[1:])


def _all(tasks: Mapping[str, Tasks], recipe: Recipe, key: jax.Array | None) -> dict[str, jax.Array]:
    count = 1 + max(i for own in tasks.values() for i in own.owners)

    def row(own: Tasks, values: jax.Array) -> jax.Array:
        flat = values.reshape(len(own.owners), -1)
        return jnp.zeros((count, flat.shape[1]), flat.dtype).at[jnp.array(own.owners)].set(flat)

    def spread(own: Tasks) -> jax.Array:
        tail = own.tensors.ndim - own.weights.ndim
        weights = own.weights.reshape(*own.weights.shape, *(1 for _ in range(tail)))
        return row(own, jnp.broadcast_to(weights, own.tensors.shape))

    vector = jnp.concatenate([row(own, own.tensors) for own in tasks.values()], axis=1)
    weights = jnp.concatenate([spread(own) for own in tasks.values()], axis=1)
    whole = combined(vector, weights, recipe._replace(majority=True), key)
    out, start = {}, 0
    for path, own in tasks.items():
        shape = own.tensors.shape[1:]
        out[path] = whole[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return out


def fold(key: jax.Array | None, name: Any) -> jax.Array | None:
    """A key of its own for each name, where there is one."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(str(name).encode()))
