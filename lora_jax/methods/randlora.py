"""RandLoRA: a sum of random low-rank bases, enough of them for full rank, with trained scales."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays, Method, Shapes
from lora_jax.methods.ranges import (
    check_choice,
    check_dropout,
    check_positive,
    check_positive_integers,
)
from lora_jax.methods.update import by_product


def randlora(
    rank: int = 32,
    alpha: float = 640.0,
    *,
    variant: str = "peft",
    bases: str = "uniform",
    dropout: float = 0.0,
) -> Method:
    """Full-rank updates from random bases: `w' = w + s d`, `s = alpha / rank`.

    With `m` and `p` counting the shorter and the longer side of the kernel,

        d[m, p] = sum_ij lambda[j, i] gamma[i, m] bases_a[j, m] bases_b[p, i, j]

    over `n = ceil(short / rank)` bases `i` and their ranks `j` (`variant="paper"`), transposed
    where `d_out` is the shorter side. `variant="peft"` sets beside column `j n + i` of the first
    factor column `i rank + j` of the second, as PEFT's code does: the same family in another
    pairing, the one that its files mean. Trained are `lambda: [rank, n]`, which starts at zero, so
    that a fresh adapter changes nothing, and `gamma: [n, short]`, at `1 / max(n, short)`:
    `n (rank + short)` numbers a site. Frozen and common to all sites are
    `bases_a: [rank, short]` and `bases_b: [long, n, rank]`, of which every site takes leading
    slices. They are uniform, or signs of which one in 3 (`bases="sparse"`) or one in `sqrt(short)`
    (`"very_sparse"`) is not zero, divided by their standard deviation.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    dropout outside [0, 1), an unknown variant and unknown bases.

    Source: Albert et al. 2025, arXiv:2502.00987.

    >>> randlora(rank=4, alpha=80)
    randlora(rank=4, alpha=80.0)
    """
    check_positive_integers("randlora", rank=rank)
    check_positive("randlora", alpha=alpha)
    check_dropout("randlora", dropout)
    check_choice("randlora", "variant", variant, ("peft", "paper"))
    check_choice("randlora", "bases", bases, ("uniform", "sparse", "very_sparse"))

    def common(key: jax.Array, shapes: Shapes) -> tuple[Arrays, Arrays]:
        dtype = jnp.result_type(jnp.float32, *(s.dtype for s in shapes.values()))
        short, long = sorted(max(s.shape[i] for s in shapes.values()) for i in (0, 1))
        of_a, of_b = jax.random.split(key)
        one_in = {"uniform": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(short)}[bases]
        a = _unit(of_a, (rank, short), dtype, one_in)
        b = _unit(of_b, (long, -(-short // rank), rank), dtype, one_in)
        return {"bases_a": a, "bases_b": b}, {}

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        short = min(w.shape)
        n = -(-short // rank)
        gamma = jnp.full((n, short), 1 / max(n, short), dtype)
        frozen = {"w": w, "scale": jnp.asarray(alpha / rank, dtype)}
        return frozen, {"lambda": jnp.zeros((rank, n), dtype), "gamma": gamma}

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        gamma, short, long = trained["gamma"], min(d_in, d_out), max(d_in, d_out)
        a, b = frozen["bases_a"][:, :short], frozen["bases_b"][:long, : len(gamma)]
        left = frozen["scale"] * trained["lambda"][:, :, None] * a[:, None] * gamma[None]
        right = b if variant == "peft" else jnp.swapaxes(b, 1, 2)
        left, right = left.reshape(-1, short), right.reshape(long, -1)
        return (left.T, right.T) if d_in <= d_out else (right, left)

    weight, apply = by_product(product, dropout)
    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "variant": variant,
        "bases": bases,
        "dropout": float(dropout),
    }
    return Method(
        "randlora", start, weight, apply, hyper, common=common, factors=product, factory=randlora
    )


def _unit(key: jax.Array, shape: tuple[int, ...], dtype: Any, one_in: float) -> jax.Array:
    """Random numbers of standard deviation one: uniform, or signs that are zero but `1/one_in`."""
    drawn = jax.random.uniform(key, shape, dtype, -1, 1)
    if one_in:
        drawn = jnp.sign(drawn) * (jnp.abs(drawn) > 1 - 1 / one_in)
    deviation = jnp.std(drawn, ddof=1)
    return drawn / jnp.where(deviation > 0, deviation, 1)
