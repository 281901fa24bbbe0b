"""Train the parameter itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays, Method


def full() -> Method:
    """Full fine-tuning of a parameter, of any shape and role: `w' = w`, with `w` trained.

    The trained copy is float32 at least; the model reads it in the parameter's own dtype.
    Over biases it is BitFit; over norms and heads it is what PEFT calls `modules_to_save`.

    >>> full()
    full()
    """

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return {}, {"w": w.astype(jnp.promote_types(w.dtype, jnp.float32))}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return trained["w"]

    return Method("full", init, weight, anywhere=True)
