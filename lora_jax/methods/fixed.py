"""A kernel as it is."""

from __future__ import annotations

from typing import Any

import jax

from lora_jax.method import Arrays, Method


def fixed() -> Method:
    """A kernel that is frozen and nothing else: `y = x w`. Trains no numbers.

    What stands in `quantized` for the kernels that nothing adapts.

    >>> fixed()
    fixed()
    """

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return {"w": w}, {}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"]

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        return x @ frozen["w"]

    return Method("fixed", init, weight, apply, splits=("in", "out"), factory=fixed)
