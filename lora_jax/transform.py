"""Run a function on adapted parameters without forming them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from lora_jax import axes, tree
from lora_jax._compat import source_line
from lora_jax.adapter import Adapted, adapted, dissolve, is_adapted, lifted
from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.operands import PRODUCTS, Operand, Product
from lora_jax.sites import Site, flipped
from lora_jax.trace import rewrite
from lora_jax.tracked import Equation, Tracked, Use


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
        if patterns:
            formed = tree.first_match(dict.fromkeys(patterns), nodes)
            weights = {path: nodes.pop(path).weight() for path in formed}
            params = tree.replace(params, weights, is_adapted)
        if not nodes:
            return function(params, *args, **kwargs)
        values = {path: _track(node) for path, node in nodes.items()}
        params = tree.replace(params, values, is_adapted)
        return rewrite(function, params, args, kwargs, _Factored())

    return forward


def materialised(function: Callable[..., Any]) -> Callable:
    """`function` over bound parameters with every adapted kernel formed first.

    The definition that `factored` is held to, and the way out for functions it has no rule for.
    Costs one `[d_in, d_out]` product a kernel and the gradient of every formed kernel.
    """

    @functools.wraps(function)
    def forward(params: Any, *args: Any, **kwargs: Any) -> Any:
        return function(dissolve(params), *args, **kwargs)

    return forward


@dataclass(frozen=True)
class _Label:
    """What a tracked parameter carries along: its method and its site."""

    method: Method
    site: Site


@dataclass(frozen=True)
class _Factored:
    """Computes each use of a tracked kernel by its method's `apply`."""

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        label: _Label = tracked.label
        view = label.site.view
        transposed = (use.ins, use.outs) == (view.outs, view.ins)
        if transposed:
            view = flipped(view)
        matches = (use.ins, use.outs) == (view.ins, view.outs)
        if not matches or set(use.stack) != set(tracked.stack or ()):
            return self.other(at)
        product = PRODUCTS[use.kind](at, use.position, tracked, view)
        with jax.named_scope(label.method.name), _precision(at):
            return [product.result(_compute(label, tracked, product, transposed))]

    def other(self, at: Equation) -> NoReturn:
        where = source_line(at.eqn)
        _refuse(at.tracked[0], f"uses it in '{at.name}'{' at ' + where if where else ''}")

    def output(self, tracked: Tracked) -> Any:
        _refuse(tracked, "returns it from itself, a branch or a loop")


def _refuse(tracked: Tracked, deed: str) -> NoReturn:
    raise InputError(
        f"'{tracked.path}' is adapted by {tracked.label.method!r}, but the model {deed}, which has "
        f"no factored rule; pass materialise='{tracked.path}' to factored, or leave this path out "
        "of the rules"
    )


def _compute(label: _Label, tracked: Tracked, product: Product, transposed: bool) -> jax.Array:
    """The method on the canonical operand `[*stack, T, features]`, over the stack."""
    apply = label.method.apply or _formed(label.method)
    riders = dict(tracked.riders)
    if tracked.value is not None:
        view = label.site.view
        stack = tuple((atom,) for atom in tracked.stack or ())
        target = (*stack, view.ins, view.outs)
        riders["w"] = {"w": axes.regroup(tracked.value, tracked.dims, target)}

    def single(riders: dict[str, Any], array: jax.Array) -> jax.Array:
        frozen, trained = riders["frozen"] | riders.get("w", {}), riders["trained"]
        if transposed:
            return product.transposed(lambda x: apply(frozen, trained, x), array)
        operand = Operand(array, product.multiply, product.dtype, riders["key"])
        return apply(frozen, trained, operand)

    return lifted(single, len(tracked.stack or ()))(riders, product.operand)


def _formed(method: Method) -> Callable[[Arrays, Arrays, Any], jax.Array]:
    return lambda frozen, trained, x: x @ method.weight(frozen, trained)


def _track(node: Adapted) -> Tracked:
    assert node.site is not None
    site = node.site
    frozen = {name: v for name, v in node.frozen.items() if name not in ("w", "idle")}
    riders = {"frozen": frozen, "trained": node.trained, "key": node.key}
    return Tracked(
        value=node.frozen.get("w"),
        riders=riders,
        path=node.path,
        dims=axes.whole(site.view.shape),
        stack=site.view.stack,
        dtype=site.dtype,
        label=_Label(node.method, site),
    )


def _precision(at: Equation) -> Any:
    """The product's own precision for the adapter's products too."""
    precision = at.eqn.params.get("precision")
    first = precision[0] if isinstance(precision, tuple) else precision
    if not isinstance(first, jax.lax.Precision):
        return contextlib.nullcontext()
    return jax.default_matmul_precision(first.name.lower())
