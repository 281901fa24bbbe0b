"""How the same tensor of several tasks becomes one: pruning, election of signs, sums."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Recipe(NamedTuple):
    """What is done to each task's tensor, and how the results are added.

    `prune` is "" (nothing), "magnitude" or "random"; `vote` is "" (a plain sum), "total" or
    "frequency"; `density` is the part of the entries that stays. Where the votes cancel, the sign
    is `+`, or with `majority` that of most entries.
    """

    prune: str = ""
    vote: str = ""
    density: float = 1.0
    majority: bool = False


def combined(
    tensors: jax.Array, weights: jax.Array, recipe: Recipe, key: jax.Array | None = None
) -> jax.Array:
    """Tensors of n tasks `[n, size]` as one, `[size]`, with weights `[n]` or `[n, size]`.

    `sum_i w_i t_i` of the pruned `t_i`; with a vote, only entries whose sign is the elected one
    count, and their sum is divided by how many they are: `sum_i w_i t_i m_i / max(1, sum_i m_i)`.

    Sources: Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu et al. 2023, arXiv:2311.03099 (DARE).

    >>> tasks, weights = jnp.array([[1.0, -2.0], [3.0, 1.0]]), jnp.array([0.5, 0.5])
    >>> combined(tasks, weights, Recipe()).tolist()
    [2.0, -0.5]
    >>> combined(tasks, weights, Recipe(vote="total")).tolist()
    [1.0, -1.0]
    """
    weights = weights.reshape(weights.shape + (1,) * (tensors.ndim - weights.ndim))
    if recipe.density < 1 and recipe.prune == "magnitude":
        tensors = jax.vmap(lambda t: trimmed(t, recipe.density))(tensors)
    if recipe.density < 1 and recipe.prune == "random":
        assert key is not None
        keys = jax.random.split(key, len(tensors))
        tensors = jax.vmap(lambda k, t: dropped(k, t, recipe.density))(keys, tensors)
    if not recipe.vote:
        return jnp.sum(weights * tensors, axis=0)
    agree = jnp.sign(tensors) == elected(tensors, recipe.vote, recipe.majority)[None]
    return jnp.sum(weights * tensors * agree, axis=0) / jnp.maximum(1, jnp.sum(agree, axis=0))


def trimmed(tensor: jax.Array, density: float) -> jax.Array:
    """The `int(density * size)` entries of the largest size, the others zero.

    Among equals the first stay.

    >>> trimmed(jnp.array([1.0, -3.0, 2.0, 3.0]), 0.5).tolist()
    [0.0, -3.0, 0.0, 3.0]
    """
    flat = tensor.reshape(-1)
    kept = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))[1]
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(tensor.shape)


def dropped(key: jax.Array, tensor: jax.Array, density: float) -> jax.Array:
    """Entries kept with probability `density` and divided by it; all zero where it is zero."""
    if density == 0:
        return jnp.zeros_like(tensor)
    return jnp.where(jax.random.bernoulli(key, density, tensor.shape), tensor / density, 0)


def elected(tensors: jax.Array, vote: str = "total", majority: bool = False) -> jax.Array:
    """The sign of the sum over tasks of the entries ("total") or of their signs ("frequency").

    A zero sum elects `+1`, or with `majority` the sign that most entries elected.

    >>> elected(jnp.array([[1.0, -3.0, 1.0], [2.0, 1.0, -1.0]])).tolist()
    [1.0, -1.0, 1.0]
    """
    sums = jnp.sum(tensors if vote == "total" else jnp.sign(tensors), axis=0)
    signs = jnp.sign(sums)
    most = jnp.where(jnp.sum(signs) < 0, -1, 1) if majority else 1
    return jnp.where(signs == 0, most, signs)
