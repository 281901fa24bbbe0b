"""Run a function on adapted parameters without forming them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import tree
from lora_jax.adapter import adapted, check_bound, dissolve, is_adapted
from lora_jax.factoring import Factored, joined_parts, track
from lora_jax.fused import is_fused, rejoined
from lora_jax.tracing.rewrite import rewrite
from lora_jax.tracing.tracked import Followed


def factored(function: Callable[..., Any], materialise: str | Sequence[str] = ()) -> Callable:
    """`function` over bound parameters, every product with an adapted kernel in factored form.

    `function(params, *args, **kwargs)` is any function of the parameters: a model, a loss, a
    decoding step. Where it multiplies by an adapted kernel, the method's `apply` runs instead, so
    `w + s a b` never exists, the base term is the function's own operation, and a backward pass
    with respect to `trained` computes nothing for frozen weights. Works under and around `jit`,
    `grad`, `vmap`, `scan`, `checkpoint`; arguments that are not arrays pass through untouched.

    An operation on an adapted kernel that has no rule raises InputError with the operation, the
    path, the line of the model and the remedy; kernels whose paths match `materialise` (one pattern
    or several) are formed before the function runs.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> apply = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    >>> sites = lj.find_sites(apply, params, x)
    >>> frozen, trained = lj.attach(jax.random.key(0), params, {"w": lj.lora(rank=2)}, sites)
    >>> bool((factored(apply)(lj.bind(frozen, trained), x) == apply(params, x)).all())
    True
    """
    patterns = (materialise,) if isinstance(materialise, str) else tuple(materialise)

    @functools.wraps(function)
    def forward(params: Any, *args: Any, **kwargs: Any) -> Any:
        nodes = adapted(params)
        check_bound(nodes)
        if patterns:
            formed = tree.first_match(dict.fromkeys(patterns), nodes)
            weights = {path: nodes.pop(path).weight() for path in formed}
            params = tree.replace(params, weights, is_adapted)
        if not nodes:
            return function(rejoined(params), *args, **kwargs)
        values = {path: track(node) for path, node in nodes.items()}
        params = tree.replace(params, values, is_adapted)
        params = jax.tree.map(joined_parts, params, is_leaf=_is_whole)
        return rewrite(function, params, args, kwargs, Factored())

    return forward


def materialised(function: Callable[..., Any]) -> Callable:
    """`function` over bound parameters with every adapted kernel formed first.

    The definition that `factored` is held to, and the way out for functions it has no rule for.
    Costs one `[d_in, d_out]` product a kernel and the gradient of every formed kernel.
    """

    @functools.wraps(function)
    def forward(params: Any, *args: Any, **kwargs: Any) -> Any:
        check_bound(adapted(params))
        return function(dissolve(params), *args, **kwargs)

    return forward


def _is_whole(node: Any) -> bool:
    return is_fused(node) or isinstance(node, Followed)
