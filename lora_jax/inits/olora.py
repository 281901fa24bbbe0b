"""OLoRA: orthonormal rows for one factor, from a QR decomposition of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.inits.start import Factors, Start, check_rank, wide


def olora() -> Start:
    """`a = r_r^T`, `b = q_r^T` of `w^T = q r`, without pivoting; the base keeps `w - scale a b`.

    `b b^T = 1` and `a b = w b^T b`. The factors are not divided by the scale, so what the base
    keeps depends on it: at scale 1 its first `rank` rows are zero. Which components these are
    depends on the order of the input features.

    Raises InputError for a rank above `min(d_in, d_out)`.

    Source: Büyükakyüz 2024, arXiv:2406.01775, as in PEFT.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        check_rank("olora", rank, w)
        q, r = jnp.linalg.qr(wide(w).T)
        return r[:rank].T, q[:, :rank].T

    return Start("olora", draw, residual=True)
