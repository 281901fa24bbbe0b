"""Eight-bit codes of numbers over seven decades: how NF4 stores its own scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
_GRID = 65535


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 numbers that an 8-bit code stands for, ascending: `[256]`, float32.

    For `i = 0..6` the means of neighbours in `linspace(0.1, 1, 2^i + 1)` times `10^(i - 6)`, of
    both signs; and 0 and 1.

    Source: Dettmers et al. 2021, arXiv:2110.02861.

    >>> dynamic_map().min(), dynamic_map().max(), int((dynamic_map() < 0).sum())
    (np.float32(-0.99296874), np.float32(1.0), 127)
    """
    decades = [np.float32(10.0 ** (i - 6)) * _middles(2**i) for i in range(7)]
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, positive, np.array([0, 1], np.float32)]))


def _middles(parts: int) -> np.ndarray:
    """The middle of each part of [0.1, 1], with the float32 rounding that torch gives it.

    Its `linspace` counts from both ends, rounding once a number.
    """
    start, i = np.float32(0.1), np.arange(parts + 1)
    step = np.float64((np.float32(1) - start) / np.float32(parts))
    bounds = np.where(i < (parts + 1) // 2, start + step * i, 1 - step * (parts - i))
    bounds = bounds.astype(np.float32)
    return (bounds[1:] + bounds[:-1]) / np.float32(2)


@functools.cache
def _edges() -> np.ndarray:
    """Where on the grid of 65536 points over [-1, 1] the nearest code changes: `[255]`."""
    grid = np.arange(_GRID + 1, dtype=np.float32) / np.float32(_GRID) * 2 - 1
    table = dynamic_map()
    left = np.clip(np.searchsorted(table, grid, side="right") - 1, 0, len(table) - 2)
    nearest = left + (np.abs(grid - table[left + 1]) < np.abs(grid - table[left]))
    return np.searchsorted(nearest, np.arange(1, len(table)))


@jax.jit
def quantise_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest code of every number relative to the largest of its block of 256.

    `scales: [n]` -> codes uint8 `[n]`, largest float32 `[ceil(n / 256)]`. Numbers are first rounded
    to a grid of 65536 points, as bitsandbytes does on CPUs; that moves 1 code in 700 by one.
    """
    (n,) = scales.shape
    blocks = jnp.pad(scales, (0, -n % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    whole = largest[:, None] > 0
    unit = jnp.clip(blocks * (1 / jnp.where(whole, largest[:, None], 1)), -1, 1)
    point = ((unit + 1) * 0.5 * _GRID + 0.5).astype(jnp.int32)
    codes = jnp.searchsorted(jnp.asarray(_edges()), point, side="right", method="compare_all")
    return jnp.where(whole, codes, 0).astype(jnp.uint8).reshape(-1)[:n], largest


def dequantise_scales(codes: jax.Array, largest: jax.Array) -> jax.Array:
    """The numbers that codes `[n]` stand for, `[n]` in float32."""
    (n,) = codes.shape
    values = jnp.asarray(dynamic_map())[jnp.pad(codes, (0, -n % BLOCK)).reshape(-1, BLOCK)]
    return (values * largest[:, None]).reshape(-1)[:n]
