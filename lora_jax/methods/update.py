"""How an update meets the kernel: as a product of two factors, or as a formed matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays

Product = Callable[[Arrays, Arrays], tuple[jax.Array, jax.Array]]
Weight = Callable[[Arrays, Arrays], jax.Array]
Apply = Callable[[Arrays, Arrays, Any], jax.Array]


def by_product(product: Product, dropout: float) -> tuple[Weight, Apply]:
    """`weight` and `apply` of a method whose update is `a, b = product(frozen, trained)`.

    `w' = w + a b`, and `y = x w + (drop(x) a) b` without forming it.
    """

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        a, b = product(frozen, trained)
        return frozen["w"] + a @ b

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        a, b = product(frozen, trained)
        return x @ frozen["w"] + (x.dropout(dropout) @ a) @ b.astype(x.dtype)

    return weight, apply


def with_update(x: Any, w: jax.Array, update: jax.Array) -> jax.Array:
    """`x @ (w + update)`, for an operand `x` and matrices `[d_in, d_out]`.

    One product where the operand's type is at least as wide as float32. A narrower one would round
    small updates away beside `w`, so there it is `x @ w + x @ update`.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return x @ (w + update)
    return x @ w + x @ update


def kept_outputs(
    x: Any, d_out: int, rank_dropout: float, module_dropout: float, rescaled: bool = True
) -> jax.Array | None:
    """What a call with dropout multiplies the columns of an update by: `[d_out]`, `[1]` or None.

    `rank_dropout` zeroes columns, the others divided by the mean of the mask (`rescaled`);
    `module_dropout` zeroes all of them at once, and nothing makes up for that.
    """
    kept = None
    if rank_dropout and (mask := x.mask(rank_dropout, (d_out,), draw=1)) is not None:
        kept = mask.astype(jnp.float32)
        # no mean where all fell: the update is zero there, not nan
        kept = kept / jnp.maximum(kept.mean(), 1 / d_out) if rescaled else kept
    if module_dropout and (mask := x.mask(module_dropout, (1,), draw=2)) is not None:
        kept = mask.astype(jnp.float32) * (1 if kept is None else kept)
    return kept


def masked(update: jax.Array, kept: jax.Array | None) -> jax.Array:
    """An update, or its last factor, with its columns multiplied by what `kept_outputs` gives."""
    return update if kept is None else update * kept.astype(update.dtype)
