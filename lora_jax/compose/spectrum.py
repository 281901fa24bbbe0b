"""The nearest product of a given rank, by singular values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def nearest(update: jax.Array, rank: int, clamp: float | None = None) -> Pair:
    """The best `a b` of a rank for matrices `[..., d_in, d_out]`: `a = U_k`, `b = S_k V_k^T`.

    Best in the Frobenius norm (Eckart and Young). With `clamp` the entries of both factors are cut
    at that quantile of theirs, in size.
    """
    u, s, vt = jnp.linalg.svd(update, full_matrices=False)
    a, b = u[..., :rank], s[..., :rank, None] * vt[..., :rank, :]
    return (a, b) if clamp is None else clamped(a, b, clamp)


def shortened(a: jax.Array, b: jax.Array, rank: int, clamp: float | None = None) -> Pair:
    """The same for a product `a b`, through its QR decompositions: the product is never formed."""
    left, inner = jnp.linalg.qr(a)
    right, outer = jnp.linalg.qr(b.mT)
    u, sv = nearest(inner @ outer.mT, rank)
    a, b = left @ u, sv @ right.mT
    return (a, b) if clamp is None else clamped(a, b, clamp)


def clamped(a: jax.Array, b: jax.Array, quantile: float) -> Pair:
    """Both factors cut at the quantile of all their entries, above it and below its negative."""
    flat = lambda x: x.reshape(*x.shape[:-2], -1)  # noqa: E731
    high = jnp.quantile(jnp.concatenate([flat(a), flat(b)], axis=-1), quantile, axis=-1)
    high = high[..., None, None]
    return jnp.clip(a, -high, high), jnp.clip(b, -high, high)


def distance(update: Any, a: jax.Array, b: jax.Array) -> float:
    """`|update - a b| / |update|` over all matrices, zero where the update is."""
    size = jnp.linalg.norm(update)
    return float(jnp.linalg.norm(update - a @ b) / jnp.where(size > 0, size, 1))
