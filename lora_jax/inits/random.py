"""Starts that are drawn from the key alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits.start import Factors, Start, zeros


def kaiming() -> Start:
    """`a ~ U(-1 / sqrt(d_in), 1 / sqrt(d_in))`, `b = 0`; on an embedding `a = 0`, `b ~ N(0, 1)`.

    The window of a convolution belongs to `d_in`.

    Source: PEFT's and loralib's default, `kaiming_uniform_(a=sqrt(5))`.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        a, b = zeros(w, rank)
        uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return uniform(key, a.shape, a.dtype), b

    return Start("kaiming", draw, lookup=_zero_rows, noise=True)


def gaussian() -> Start:
    """`a ~ N(0, 1 / rank^2)`, `b = 0`; on an embedding `a = 0`, `b ~ N(0, 1)`.

    Source: Hu et al. 2021, arXiv:2106.09685, with PEFT's standard deviation.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        a, b = zeros(w, rank)
        return jax.random.normal(key, a.shape, a.dtype) / rank, b

    return Start("gaussian", draw, lookup=_zero_rows, noise=True)


def orthogonal() -> Start:
    """`a = N q_odd / 10`, `b = q_even^T N / 10`: neither is zero, their product is.

    `q [rank, rank]` is orthogonal and `q_odd`, `q_even [rank / 2, rank]` its rows by turns, so
    `q_odd q_even^T = 0` (up to rounding). On an embedding as `kaiming`. The rank must be even.

    Source: PEFT's `init_lora_weights="orthogonal"`.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        if rank % 2:
            raise InputError(
                f"init='orthogonal' with rank={rank}: half of an orthogonal matrix's rows go to "
                "each factor; give an even rank"
            )
        a, b = zeros(w, rank)
        turn, left, right = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(turn, (rank, rank), a.dtype))
        a = jax.random.normal(left, (w.shape[0], rank // 2), a.dtype) @ q[0::2]
        b = q[1::2].T @ jax.random.normal(right, (rank // 2, w.shape[1]), b.dtype)
        return a / 10, b / 10

    return Start("orthogonal", draw, lookup=_zero_rows)


def _zero_rows(key: jax.Array, w: jax.Array, rank: int, scale: float, *_: Any) -> Factors:
    """For an embedding: a zero `a`, whose rows are looked up, and `b ~ N(0, 1)`."""
    a, b = zeros(w, rank)
    return a, jax.random.normal(key, b.shape, b.dtype)
