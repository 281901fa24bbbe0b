"""A module of some framework as `apply, params`: a pure function and the tree it reads.

One function for each framework where that spares boilerplate; nothing else here knows them. With
other state (BatchNorm's statistics, caches) there is a second form, in which the state goes in and
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.errors import InputError

Apply = Callable[..., Any]


def from_nnx(module: Any, method: str = "__call__") -> tuple[Apply, Any]:
    """`apply, params` of a Flax NNX module: `apply(params, *inputs)` calls it.

    `params` are its `nnx.Param`s as a plain nested dict. All other variables (statistics, caches)
    are held as they are now: what a call changes in them is forgotten, see `from_nnx_stateful`.
    Raises InputError for what is no module.

    >>> from flax import nnx
    >>> apply, params = from_nnx(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    >>> jax.tree.map(jax.numpy.shape, params), apply(params, np.ones((2, 3))).shape
    ({'bias': (5,), 'kernel': (3, 5)}, (2, 5))
    """
    stateful, params, state = from_nnx_stateful(module, method)

    def apply(params: Any, *inputs: Any, **keywords: Any) -> Any:
        return stateful(params, state, *inputs, **keywords)[0]

    return apply, params


def from_nnx_stateful(module: Any, method: str = "__call__") -> tuple[Apply, Any, Any]:
    """`apply, params, state` of a Flax NNX module: `apply(params, state, *inputs) -> out, state`.

    `state` holds every variable that is no `nnx.Param`, as the call found or left it.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise InputError(f"from_nnx takes a flax.nnx.Module; this is a {type(module).__name__}")
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(params: Any, state: Any, *inputs: Any, **keywords: Any) -> tuple[Any, Any]:
        whole = nnx.merge(graph, _refilled(shape, params), state, copy=True)
        out = getattr(whole, method)(*inputs, **keywords)
        return out, nnx.split(whole, nnx.Param, ...)[2]

    shape = params
    return apply, nnx.to_pure_dict(params), state


def from_linen(module: Any, variables: Mapping[str, Any], method: Any = None) -> tuple[Apply, Any]:
    """`apply, params` of a Flax Linen module and its variables: `apply(params, *inputs)`.

    The other collections (`batch_stats`, `cache`) are held as they are in `variables`; keywords
    such as `train=False` and `rngs=...` go to the module.
    """
    if "params" not in variables:
        raise InputError(
            f"variables has {', '.join(variables) or 'nothing'}, but no 'params'; give what "
            "module.init returned"
        )
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, *inputs: Any, **keywords: Any) -> Any:
        return module.apply({"params": params, **rest}, *inputs, method=method, **keywords)

    return apply, variables["params"]


def from_linen_stateful(
    module: Any, variables: Mapping[str, Any], method: Any = None
) -> tuple[Apply, Any, Any]:
    """`apply, params, state` of a Linen module: `apply(params, state, *inputs) -> out, state`.

    `state` are all collections but `params`, and each is mutable in the call.
    """
    _, params = from_linen(module, variables)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, state: Any, *inputs: Any, **keywords: Any) -> tuple[Any, Any]:
        whole = {"params": params, **state}
        return module.apply(whole, *inputs, method=method, mutable=list(state), **keywords)

    return apply, params, rest


def from_equinox(model: Any) -> tuple[Apply, Any]:
    """`apply, params` of a callable pytree, as every Equinox module is: `apply(params, *inputs)`.

    `params` is the model with everything that is no floating-point array (activations, sizes,
    flags) taken out; `apply` puts it back. Batches come by `jax.vmap(model)`, inside a function of
    the model as usual.
    """
    if not callable(model):
        raise InputError(f"from_equinox takes a callable pytree; this is a {type(model).__name__}")
    leaves, structure = jax.tree.flatten(model)
    inexact = [_is_inexact(leaf) for leaf in leaves]
    params = [leaf if real else None for leaf, real in zip(leaves, inexact, strict=True)]

    def apply(params: Any, *inputs: Any, **keywords: Any) -> Any:
        given = structure.flatten_up_to(params)
        whole = [
            new if real else old for new, old, real in zip(given, leaves, inexact, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)(*inputs, **keywords)

    return apply, jax.tree.unflatten(structure, params)


def from_haiku(transformed: Any, params: Any, rng: Any = None) -> tuple[Apply, Any]:
    """`apply, params` of `haiku.transform(f)` and its parameters: `apply(params, *inputs)`.

    `rng` is the key that every call gets (None: the function draws nothing).
    """

    def apply(params: Any, *inputs: Any, **keywords: Any) -> Any:
        return transformed.apply(params, rng, *inputs, **keywords)

    return apply, params


def _refilled(shape: Any, params: Any) -> Any:
    """A State of NNX variables from a nested dict of arrays."""
    from flax import nnx

    filled = jax.tree.map(lambda x: x, shape)
    nnx.replace_by_pure_dict(filled, params)
    return filled


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jax.numpy.issubdtype(
        leaf.dtype, jax.numpy.inexact
    )
