"""AdaLoRA: an update in the form of a singular value decomposition, whose rank may shrink."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.lora import check_factors

_WIDTH = 0.02  # standard deviation of both factors at the start


def adalora(
    rank: int = 12, alpha: float = 8.0, *, dropout: float = 0.0, initial_rank: int = 0
) -> Method:
    """Adaptive low rank: `y = x w + s ((drop(x) a) e) b`, `a: [d_in, rank]`, `e: [rank]`.

    `b: [rank, d_out]`, and `s = alpha / (initial_rank + 1e-5)`, with `initial_rank` in place of an
    alpha that is not positive. `a, b ~ N(0, 0.02^2)` and `e = 0`, so a fresh adapter changes
    nothing. Trains `rank (d_in + d_out + 1)` numbers. By itself the rank stays; `dynamics.adalora`
    sets the least important entries of `e` to zero during training. `initial_rank` (0: `rank`) is
    the rank that training began with: the divisor does not shrink when triplets are dropped.

    Raises InputError for a rank that is no positive integer, a dropout outside [0, 1), and an
    initial rank below the rank.

    Source: Zhang et al. 2023, arXiv:2303.10512.

    >>> adalora(rank=6, alpha=16)
    adalora(rank=6, alpha=16.0)
    """
    check_factors("adalora", rank, 1.0 if alpha <= 0 else alpha, dropout)
    if initial_rank and initial_rank < rank:
        raise InputError(
            f"adalora(rank={rank}, initial_rank={initial_rank}): ranks only shrink in training; "
            "give the rank that it began with, or 0 for this one"
        )
    first = initial_rank or rank
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        for_a, for_b = jax.random.split(key)
        a = _WIDTH * jax.random.normal(for_a, (w.shape[0], rank), dtype)
        b = _WIDTH * jax.random.normal(for_b, (rank, w.shape[1]), dtype)
        frozen = {"w": w, "scale": jnp.asarray(scale, dtype)}
        return frozen, {"a": a, "e": jnp.zeros(rank, dtype), "b": b}

    def factors(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        return trained["a"], frozen["scale"] * trained["e"][:, None] * trained["b"]

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        a, e, b = trained["a"], trained["e"], trained["b"]
        return frozen["w"] + frozen["scale"] * ((a * e[None, :]) @ b)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        a, b = factors(frozen, trained)
        return x @ frozen["w"] + (x.dropout(dropout) @ a) @ b.astype(x.dtype)

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "dropout": float(dropout),
        "initial_rank": initial_rank,
    }
    return Method(
        "adalora",
        init,
        weight,
        apply,
        hyper,
        factors=factors,
        splits=("in", "out"),
        factory=adalora,
    )
