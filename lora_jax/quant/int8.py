"""Eight bits a weight, one scale for each output."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays
from lora_jax.quant.storage import Storage


def int8() -> Storage:
    """Eight bits a weight: `w = codes scale`, `codes` int8, `scale = max|column| / 127`.

    The error is at most `scale / 2`; a column of zeros stays zero.

    Source: Dettmers et al. 2022, arXiv:2208.07339 (vector-wise, without outliers).

    >>> arrays = int8().quantise(jnp.eye(3), {})
    >>> {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
    {'codes': ((3, 3), 'int8'), 'scale': ((3,), 'float32')}
    """

    def quantise(w: jax.Array, kept: Arrays) -> Arrays:
        w = w.astype(jnp.float32)
        largest = jnp.max(jnp.abs(w), axis=0)
        unit = w * (127 / jnp.where(largest > 0, largest, 1))[None, :]
        return {"codes": jnp.round(unit).astype(jnp.int8), "scale": largest / 127}

    def dequantise(arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
        return arrays["codes"] * arrays["scale"][None, :]

    return Storage("int8", quantise, dequantise, splits=("in", "out"), factory=int8)
