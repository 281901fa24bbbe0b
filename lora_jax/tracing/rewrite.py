"""Run a function with tracked parameters in place of some arrays of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.tracing.interpret import interpret
from lora_jax.tracing.tracked import Followed, Handler, bare


class Split(NamedTuple):
    """A tree taken apart into its arrays and everything else."""

    arrays: list[Any]
    rest: tuple[Any, ...]
    structure: Any

    def join(self, arrays: list[Any]) -> Any:
        """The tree with these arrays."""
        fresh = iter(arrays)
        leaves = [next(fresh) if leaf is _ARRAY else leaf for leaf in self.rest]
        return jax.tree.unflatten(self.structure, leaves)


def split_arrays(tree: Any) -> Split:
    """Arrays (abstract and tracked ones too) are traced; flags, functions and names are not.

    >>> split_arrays({"x": np.ones(2), "train": True}).rest[0]
    True
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_tracked)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return Split(arrays, tuple(_ARRAY if _is_array(x) else x for x in leaves), structure)


def rewrite(
    function: Callable[..., Any],
    params: Any,
    inputs: Any,
    keywords: Any,
    handler: Handler,
    consts: list[Any] | None = None,
) -> Any:
    """`function(params, *inputs, **keywords)` where `params` holds tracked leaves.

    The function is traced once on plain arrays, and its jaxpr evaluated with the tracked ones.
    `consts` collects the arrays that it closes over.
    """
    split = split_arrays((params, inputs, keywords))

    def call(arrays: list[Any]) -> Any:
        params, inputs, keywords = split.join(arrays)
        return function(params, *inputs, **keywords)

    plain = [_abstract(x) if _is_tracked(x) else x for x in split.arrays]
    closed, shape = jax.make_jaxpr(call, return_shape=True)(plain)
    if consts is not None:
        consts.extend(closed.consts)
    own = len(split_arrays(params).arrays)
    given = handler.given(split.arrays[own:])
    outs = bare(interpret(closed.jaxpr, closed.consts, [*split.arrays[:own], *given], handler))
    outs = [handler.output(x) if isinstance(x, Followed) else x for x in outs]
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


class _Marker:
    """Stands where an array was."""


_ARRAY = _Marker()


def _abstract(tracked: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tracked.shape, tracked.dtype)


def _is_tracked(x: Any) -> bool:
    return isinstance(x, Followed)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Followed)
