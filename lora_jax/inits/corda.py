"""CorDA: components of the kernel as the inputs of some data meet it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits.spectral import spectrum
from lora_jax.inits.start import Factors, Start, check_datum, check_rank, wide


def corda(moments: Mapping[str, jax.Array] | None = None, mode: str = "ipm") -> Start:
    """`a = c^-1 v_r sqrt(s_r / scale)`, `b = sqrt(s_r / scale) u_r^T` of `w^T c = u diag(s) v^T`.

    `c [d_in, d_in]` is the second moment of the kernel's inputs, from
    `calibrate.input_moments`, damped so that its inverse is one. `mode="ipm"` trains the first
    components (to learn the data's task faster), `"kpm"` the last (to keep what the data needs).
    All components together give `w`; the base keeps the rest.

    Raises InputError for another mode and for a rank above `min(d_in, d_out)`.

    Source: Yang et al. 2024, arXiv:2406.05223, with PEFT's damping.
    """
    if mode not in ("ipm", "kpm"):
        raise InputError(f"corda(mode={mode!r}): unknown mode; give 'ipm' or 'kpm'")
    name = "corda" if mode == "ipm" else "corda_kpm"

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float, moment: jax.Array) -> Factors:
        check_rank(name, rank, w)
        check_datum(name, moment, (w.shape[0],) * 2, "the second moment of the inputs")
        moment, inverse = damped(wide(moment).astype(wide(w).dtype))
        v, s, ut = spectrum(moment @ wide(w))
        chosen = slice(rank) if mode == "ipm" else slice(len(s) - rank, None)
        root = jnp.sqrt(s[chosen] / scale)
        return (inverse @ v[:, chosen]) * root, root[:, None] * ut[chosen]

    return Start(name, draw, residual=True, wants="input_moments", data=dict(moments or {}))


def damped(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`c + d mean(diag c) 1` and its inverse: `d` is 0.01, doubled until `|c c^-1 - 1|_F < 0.05`.

    >>> c, inverse = damped(jnp.diag(jnp.array([2.0, 0.0])))
    >>> c
    Array([[2.01, 0.  ],
           [0.  , 0.01]], dtype=float32)
    """
    eye = jnp.eye(len(c), dtype=c.dtype)
    ridge = jnp.mean(jnp.diag(c)) * eye

    def with_inverse(damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return damping, c + damping * ridge, jnp.linalg.inv(c + damping * ridge)

    def poor(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.linalg.norm(state[1] @ state[2] - eye) >= 0.05  # false for nan: it ends

    first = with_inverse(jnp.asarray(0.01, c.dtype))
    return jax.lax.while_loop(poor, lambda state: with_inverse(2 * state[0]), first)[1:]
