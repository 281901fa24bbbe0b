"""DoRA: magnitude and direction of every output unit apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits import Start, named, remainder
from lora_jax.method import Arrays, Method
from lora_jax.methods.lora import check_experts, check_factors, fewer_ranks, rebuilt, scale_of


def dora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    detach_norm: bool = True,
    init: str | Start = "kaiming",
    active_experts: int = 1,
    share: str = "",
) -> Method:
    """Weight-decomposed adaptation: `w' = c * v`, `v = w + s a b`, `c = magnitude / |v|`.

    `|v|` is the norm of each column of `v` (all weights of one output unit), `[d_out]`; the trained
    `magnitude` starts at `|w|`, so a fresh adapter changes nothing up to rounding. With
    `detach_norm` no gradient flows through `|v|` (the authors' and PEFT's form). With dropout the
    base term stays whole: `y = x w + (c - 1) (drop(x) w) + c s (drop(x) a) b`. Where `|v| = 0`,
    `c = 1`. The norm comes from `|v|^2 = |w|^2 + 2 s (w^T a) b + s^2 b^T (a^T a) b` per column,
    so `a b` is never formed. Trains `rank (d_in + d_out) + d_out` numbers; hyper-parameters, inits
    and errors as in `lora`. An init that freezes a factor is refused.

    Source: Liu et al. 2024, arXiv:2402.09353.

    >>> dora(rank=4, alpha=8).hyper["rank"]
    4
    """
    check_factors("dora", rank, alpha, dropout)
    begin = named(init, "dora")
    if begin.freezes:
        raise InputError(f"dora(init={begin.name!r}): it freezes a factor; use it with lora")
    check_experts("dora", active_experts, share, ("a", "b"), begin)
    scale, residual = scale_of(rank, alpha, rslora), begin.residual

    def split(w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[Arrays, Arrays]:
        square = _squares(w, a)
        trained = {"a": a, "b": b, "magnitude": jnp.sqrt(square)}
        frozen = {"w": w, "scale": jnp.asarray(scale, a.dtype), "square_norm": square}
        if residual:
            frozen |= {"a_0": a, "b_0": b}
            frozen |= remainder(w, frozen)
            frozen["square_norm"] = _squares(frozen["w"], a)
            trained |= {"a": jnp.copy(a), "b": jnp.copy(b)}  # a step may give these buffers away
        return frozen, trained

    def start(key: jax.Array, w: jax.Array, *datum: Any) -> tuple[Arrays, Arrays]:
        return split(w, *begin.factors(key, w, rank, scale, *datum, lookup=False))

    def start_lookup(key: jax.Array, w: jax.Array, *datum: Any) -> tuple[Arrays, Arrays]:
        return split(w, *begin.factors(key, w, rank, scale, *datum, lookup=True))

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        v = frozen["w"] + frozen["scale"] * (trained["a"] @ trained["b"])
        return v * _ratio(trained["magnitude"], jnp.sum(jnp.square(v), axis=0), detach_norm)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        w, a, b = frozen["w"], trained["a"], frozen["scale"] * trained["b"]
        square = _square_norm(frozen["square_norm"], w, a, b, detach_norm, x.total)
        c = _ratio(trained["magnitude"], square, detach_norm)
        dropped = x.dropout(dropout)
        update = (dropped @ a) @ b.astype(x.dtype)
        y = x @ w
        c = x.rows(c.astype(y.dtype))
        return c * (y + update) if dropped is x else y + (c - 1) * (dropped @ w) + c * update

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": rslora,
        "dropout": float(dropout),
        "detach_norm": detach_norm,
        "init": begin.name,
        "active_experts": active_experts,
        "share": share,
    }
    return Method(
        "dora",
        start,
        weight,
        apply,
        hyper,
        lookup_init=start_lookup,
        shared=(share,) if share else (),
        at=fewer_ranks(dora, {**hyper, "init": begin}),
        data=begin.data,
        rebuild=rebuilt(begin),
        splits=("in", "out"),
        factory=dora,
    )


def _squares(w: jax.Array, like: jax.Array) -> jax.Array:
    """`|w|^2` of each column, in the factors' dtype."""
    return jnp.sum(jnp.square(w.astype(like.dtype)), axis=0)


def _square_norm(
    square: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, detach: bool, total: Any
) -> jax.Array:
    """`|w + a b|^2` of each column from `|w|^2`, without forming `a b`; b comes scaled."""
    if detach:
        a, b = jax.lax.stop_gradient((a, b))
    cross = jnp.sum(total(a.T @ w.astype(a.dtype)) * b, axis=0)
    square = square + 2 * cross + jnp.sum(b * (total(a.T @ a) @ b), axis=0)
    return jnp.maximum(square, 0)  # rounding may go below zero where v nearly cancels w


def _ratio(magnitude: jax.Array, square_norm: jax.Array, detach: bool) -> jax.Array:
    """`magnitude / |v|`, one where the column is zero; finite gradients there too."""
    if detach:
        square_norm = jax.lax.stop_gradient(square_norm)
    safe = jnp.where(square_norm > 0, square_norm, 1)
    return jnp.where(square_norm > 0, magnitude * jax.lax.rsqrt(safe), 1)
