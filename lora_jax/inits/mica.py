"""MiCA: the update may only write along the kernel's minor components."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.inits.spectral import spectrum
from lora_jax.inits.start import Factors, Start, check_rank


def mica() -> Start:
    """`a = 0`, `b = v_last^T` of `w = u diag(s) v^T`: the `rank` smallest singular values.

    `b` is frozen, so a fresh adapter changes nothing and `a` alone is trained: `rank d_in` numbers.

    Raises InputError for a rank above `min(d_in, d_out)`.

    Source: arXiv:2604.01694, as in PEFT.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        check_rank("mica", rank, w)
        b = spectrum(w).right[-rank:]
        return jnp.zeros((w.shape[0], rank), b.dtype), b

    return Start("mica", draw, freezes=("b",))
