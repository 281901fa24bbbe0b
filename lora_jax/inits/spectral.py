"""Decompositions of a matrix, in float32 at least."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.inits.start import wide


class Spectrum(NamedTuple):
    """`matrix = left @ diag(values) @ right`: [m, k], [k] falling, [k, n]."""

    left: jax.Array
    values: jax.Array
    right: jax.Array


def spectrum(matrix: jax.Array) -> Spectrum:
    """All singular values and vectors.

    >>> spectrum(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).values
    Array([3., 2., 1.], dtype=float32)
    """
    return Spectrum(*jnp.linalg.svd(wide(matrix), full_matrices=False))


def leading(key: jax.Array, matrix: jax.Array, count: int, rounds: int) -> Spectrum:
    """About the first `count` singular values and vectors, by `rounds` of subspace iteration.

    `q = orth(M N(0, 1))`, then `rounds` times `q = orth(M orth(M^T q))`; the decomposition of
    `q^T M` is exact on the subspace found.

    Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    matrix = wide(matrix)
    probes = jax.random.normal(key, (matrix.shape[1], count), matrix.dtype)
    product = jax.lax.Precision.HIGHEST

    def orthonormal(columns: jax.Array) -> jax.Array:
        return jnp.linalg.qr(columns)[0]

    q = orthonormal(jnp.matmul(matrix, probes, precision=product))
    for _ in range(rounds):
        q = orthonormal(jnp.matmul(matrix.T, q, precision=product))
        q = orthonormal(jnp.matmul(matrix, q, precision=product))
    left, values, right = spectrum(jnp.matmul(q.T, matrix, precision=product))
    return Spectrum(jnp.matmul(q, left, precision=product), values, right)
