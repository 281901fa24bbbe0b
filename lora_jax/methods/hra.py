"""HRA: the kernel's input side turned by a chain of reflections."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method


def hra(rank: int = 8, *, apply_gs: bool = False) -> Method:
    """Householder reflections: `w' = h_r ... h_2 h_1 w`, `h_i = 1 - 2 u_i u_i^T / |u_i|^2`.

    `u_i` are the columns of `u: [d_in, rank]`, trained. A product of reflections is orthogonal, so
    `w'` keeps the singular values of `w` and the angles between its columns. Columns start in
    equal pairs, whose reflections cancel: a fresh adapter of even rank changes nothing. One of odd
    rank starts at random reflections, which changes the model; that warns. With `apply_gs` the
    columns are first made orthonormal (Gram-Schmidt), `w' = (1 - 2 q q^T) w`: at no rank is that
    neutral, so it warns too, and the columns start unequal, as equal ones have no such form. A
    column of zeros reflects nothing. Trains `rank d_in` numbers, each uniform in
    `+-1/sqrt(d_in)` at first.

    Raises InputError for a rank that is no positive integer, and with `apply_gs` for more columns
    than `d_in`, which cannot be orthogonal.

    Source: Yuan et al. 2024, arXiv:2405.17484.

    >>> hra(rank=4)
    hra(rank=4)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"hra(rank={rank!r}): the rank is a positive integer; give rank >= 1")

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        d_in, dtype = w.shape[0], jnp.promote_types(w.dtype, jnp.float32)
        if apply_gs and rank > d_in:
            raise InputError(
                f"hra(rank={rank}, apply_gs=True): {rank} columns of length {d_in} (the kernel is "
                f"{tuple(w.shape)}) cannot be orthogonal; give rank <= {d_in}"
            )
        paired = rank % 2 == 0 and not apply_gs
        if not paired:
            start = "with apply_gs" if apply_gs else "of odd rank"
            warnings.warn(
                f"hra(rank={rank}) {start} starts at random reflections: a fresh adapter changes "
                "the model; give an even rank without apply_gs to start from the base",
                stacklevel=2,
            )
        columns = rank // 2 if paired else rank
        bound = d_in**-0.5
        u = jax.random.uniform(key, (d_in, columns), dtype, -bound, bound)
        return {"w": w}, {"u": jnp.repeat(u, 2, axis=1) if paired else u}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        u, w = trained["u"], frozen["w"]
        for i in range(u.shape[1]):
            unit = _unit(u[:, i])
            w = w - 2 * jnp.outer(unit, unit @ w)
        return w

    def weight_gs(frozen: Arrays, trained: Arrays) -> jax.Array:
        u, w = trained["u"], frozen["w"]
        q = jnp.zeros_like(u)
        for i in range(u.shape[1]):
            q = q.at[:, i].set(_unit(u[:, i] - q @ (q.T @ u[:, i])))
        return w - 2 * q @ (q.T @ w)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        # w' = w - u m^-1 (u^T w) with the small m: no [d_in, d_in] matrix, and no [d_in, d_out] one
        # beside the kernel. The extra cost is a product of rank r and r d_in d_out for u^T w.
        u, w = trained["u"], frozen["w"]
        gram, seen = x.total(u.T @ u), x.total(u.T @ w.astype(u.dtype))
        z = _solve(gram, seen, apply_gs)
        return x @ w - (x @ u) @ z.astype(x.dtype)

    return Method(
        "hra",
        init,
        weight_gs if apply_gs else weight,
        apply,
        hyper={"rank": rank, "apply_gs": apply_gs},
        splits=("in", "out"),
        factory=hra,
    )


def _solve(gram: jax.Array, seen: jax.Array, apply_gs: bool) -> jax.Array:
    """`m^-1 (u^T w)` for `h_r ... h_1 = 1 - u m^-1 u^T`, from `gram = u^T u`.

    For a chain of reflections `m` is the lower triangle of `gram` with its diagonal halved (the
    compact WY form; by induction, as `h_i` meets what `h_1 ... h_{i-1}` left). For columns made
    orthonormal `q q^T = u gram^-1 u^T`, so `m = gram / 2`.
    """
    square = jnp.diagonal(gram)
    diagonal = jnp.diag(jnp.where(square > 0, square, 2) / 2)  # a zero column reflects nothing
    below = jnp.tril(gram, -1)
    if not apply_gs:
        return solve_triangular(below + diagonal, seen, lower=True)
    return jnp.linalg.solve(diagonal + (below + below.T) / 2, seen)


def _unit(u: jax.Array) -> jax.Array:
    """`u / |u|`, zero for a vector of zeros."""
    square = jnp.sum(jnp.square(u))
    return u * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
