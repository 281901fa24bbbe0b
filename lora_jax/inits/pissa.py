"""PiSSA: the principal components of the kernel are what is trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits.spectral import leading, spectrum
from lora_jax.inits.start import Factors, Start, check_rank


def pissa(rounds: int | None = None) -> Start:
    """`a = u_r sqrt(s_r / scale)`, `b = sqrt(s_r / scale) v_r^T` of `w = u diag(s) v^T`.

    So `scale a b` is the best approximation of `w` of that rank, and the base keeps the rest. With
    `rounds` the first components come from as many rounds of subspace iteration, without the whole
    decomposition (`init="pissa_niter_16"` has 16, as the paper). The paper has alpha = rank.

    Raises InputError for a rank above `min(d_in, d_out)` and for negative rounds.

    Source: Meng et al. 2024, arXiv:2404.02948.
    """
    if rounds is not None and (isinstance(rounds, bool) or rounds < 0):
        raise InputError(f"pissa(rounds={rounds!r}): a number of iterations; give 0 or more")
    name = "pissa" if rounds is None else f"pissa_niter_{rounds}"

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        check_rank(name, rank, w)
        u, s, vt = spectrum(w) if rounds is None else leading(key, w, rank, rounds)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    return Start(name, draw, residual=True)
