"""Random projections by number, never by matrix: Fastfood, and Gaussian or sparse columns."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

_RADIX = 4  # butterflies a pass: a product with a 16 x 16 matrix


def fwht(x: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform `H x` of a vector of `2^k` numbers, unnormalised: `H H = 2^k I`.

    In O(n log n): each pass multiplies the last digits of the index by a small Hadamard matrix and
    turns them to the front, so that after the last pass every digit is back in its place.

    >>> fwht(jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0])).tolist()
    [4.0, 2.0, 0.0, -2.0, 0.0, 2.0, 0.0, 2.0]
    """
    bits = int(x.size).bit_length() - 1
    shape = x.shape
    while bits > 0:
        width = min(bits, _RADIX)
        matrix = _hadamard(width, x.dtype)
        x = jnp.matmul(x.reshape(-1, 1 << width), matrix, precision="highest").T
        bits -= width
    return x.reshape(shape)


def fastfood(theta: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """`sqrt(size) P theta` with `P: [size, d]`, of columns near unit length, in O(L log L).

    `P x = H (g * (H (s * x))[permuted])[:size] / sqrt(size sum(g^2))`, with `x` padded by zeros to
    `L`, the next power of two, random signs `s` and Gaussian `g`. Where `size = L` every column has
    length one exactly. Nothing is kept of the draws but the key.

    Source: Le et al. 2013, arXiv:1408.3060, as Li et al. 2018, arXiv:1804.08838, use it.
    """
    length = next_power(max(size, theta.size))
    signs, gaussians, mixing = jax.random.split(key, 3)
    theta = theta * jax.random.rademacher(signs, theta.shape, theta.dtype)
    padded = jnp.pad(theta, (0, length - theta.size))
    g = jax.random.normal(gaussians, (length,), theta.dtype)
    order = permutation(mixing, length)
    mixed = fwht(padded).at[order].get(unique_indices=True, mode="promise_in_bounds")
    return fwht(g * mixed)[:size] * jax.lax.rsqrt(jnp.sum(g * g))


def columns(theta: jax.Array, key: jax.Array, size: int, column: Any) -> jax.Array:
    """`sum_j theta_j column(key_j, size)`: one column at a time, drawn again for the gradient."""

    @jax.checkpoint
    def term(number: jax.Array, key: jax.Array) -> jax.Array:
        return number * column(jax.random.wrap_key_data(key), size).astype(theta.dtype)

    def body(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + term(*pair), None

    keys = jax.random.key_data(jax.random.split(key, theta.size))
    return jax.lax.scan(body, jnp.zeros(size, theta.dtype), (theta, keys))[0]


def permutation(key: jax.Array, length: int) -> jax.Array:
    """A random order of `0 .. length - 1`, for a power of two, from a few words and no sort.

    Rounds of `x -> a x + c` with odd `a` and of `x -> x xor (x >> h)`, each of which is one-to-one
    on the numbers below `length`.

    >>> sorted(permutation(jax.random.key(0), 8).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    half = max(1, (length.bit_length() - 1) // 2)
    mask = jnp.uint32(length - 1)
    x = jnp.arange(length, dtype=jnp.uint32)
    for factor, shift in jax.random.bits(key, (4, 2), jnp.uint32):
        x = (x * (factor | 1) + shift) & mask
        x = x ^ (x >> half)
    return x


def next_power(n: int) -> int:
    """The least power of two that is no less than n.

    >>> next_power(1), next_power(5), next_power(8)
    (1, 8, 8)
    """
    return 1 << max(0, math.ceil(math.log2(max(n, 1))))


def _hadamard(bits: int, dtype: Any) -> jax.Array:
    """The `2^bits` square matrix `(-1)^popcount(i and j)`."""
    index = jnp.arange(1 << bits, dtype=jnp.uint32)
    common = jax.lax.population_count(index[:, None] & index[None, :])
    return (1 - 2 * (common & 1).astype(jnp.int32)).astype(dtype)
