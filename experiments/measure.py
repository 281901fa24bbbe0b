"""How far a merged model is from its adapter in factored form."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.task import compiled


def merge_error(
    apply: Callable[..., Any], frozen: Any, trained: Any, merged: Any, inputs: Sequence[Any]
) -> float:
    """Largest difference of the merged model's outputs, relative to the largest output.

    Inputs that are shapes alone are drawn: normal numbers, and 0 for indices.
    """
    inputs = [_drawn(x) if isinstance(x, jax.ShapeDtypeStruct) else x for x in inputs]
    ours = jax.tree.leaves(compiled(apply)(frozen, trained, *inputs))
    theirs = jax.tree.leaves(jax.jit(apply)(merged, *inputs))
    difference = max(float(abs(x - y).max()) for x, y in zip(ours, theirs, strict=True))
    return difference / max(float(abs(x).max()) for x in ours)


def _drawn(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)
    return (
        jnp.ones(shape.shape, bool) if shape.dtype == bool else jnp.zeros(shape.shape, shape.dtype)
    )
