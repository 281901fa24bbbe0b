"""An update that has no thin form: how `apply` adds a formed matrix to the kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def with_update(x: Any, w: jax.Array, update: jax.Array) -> jax.Array:
    """`x @ (w + update)`, for an operand `x` and matrices `[d_in, d_out]`.

    One product where the operand's type is at least as wide as float32. A narrower one would round
    small updates away beside `w`, so there it is `x @ w + x @ update`.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return x @ (w + update)
    return x @ w + x @ update
