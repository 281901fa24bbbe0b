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
