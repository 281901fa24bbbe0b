"""Convolutions in the CP form: a core for each place of the window between two small factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.method import Method


def at_windows(build: Callable[[Any], Method]) -> Callable[[Any], Method]:
    """`Method.at` of a method that `build` makes for the window of a site, None for none.

    A window of one place is none: the kernel is the matrix of its channels there.
    """

    def at(site: Any) -> Method:
        window = site.window
        return build(window if window and any(size > 1 for size in window.shape) else None)

    return at


def core_of(key: jax.Array, rank: int, window: Any, dtype: Any) -> jax.Array:
    """`[rank, rank, *window]` in `U(-1/sqrt(n), 1/sqrt(n))`, `n` the size of one `[rank]` slice."""
    shape = (rank, rank, *window.shape)
    draw = jax.nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=tuple(range(1, len(shape))), out_axis=0
    )
    return draw(key, shape, dtype)


def rows_draw(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """`[rank, n]` in `U(-1/sqrt(n), 1/sqrt(n))`, as PEFT starts factors beside a core."""
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
    return draw(key, shape, dtype)


def through_core(a: jax.Array, core: jax.Array) -> jax.Array:
    """`a: [n, rank]` times `core: [rank, rank, *window]`: `[n * places, rank]`, `n` outermost.

    >>> through_core(jnp.ones((5, 2)), jnp.ones((2, 2, 3, 4))).shape
    (60, 2)
    """
    return jnp.einsum("pq...,nq->n...p", core, a).reshape(-1, core.shape[0])
