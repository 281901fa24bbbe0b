"""Functions with a derivative rule of their own, with parameters among their arguments.

The user's rule says what the gradient is, so it is kept: the rule is traced with plain arrays by
`jax.vjp` or `jax.jvp`, and that trace is run with the parameters, so each of its products with a
kernel is factored too. The rule gives a dense cotangent for a kernel, which goes on to the trained
arrays through the method's definition; dropout does not act inside such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.tracing._compat import run
from lora_jax.tracing.joined import Joined
from lora_jax.tracing.tracked import Equation, Followed, Handler, Tracked

Body = Callable[..., Callable[..., list[Any]]]


def custom_vjp(at: Equation, handler: Handler, body: Body) -> list[Any]:
    """A `jax.custom_vjp` function: its own forward and backward rules, factored."""
    values = [_quiet(value) for value in at.values]
    primal = _plain_outputs(body(at.params["call_jaxpr"]), handler)
    if not handler.differentiates:
        return primal(*values)
    forward, residual_shapes, structure = _traced_vjp(at, values)

    @jax.custom_vjp
    def call(*values: Any) -> list[Any]:
        return primal(*values)

    def fwd(*values: Any) -> tuple[list[Any], Any]:
        found = body(forward)(*values)
        outs = [_output(x, handler) for x in found[: len(at.eqn.outvars)]]
        return outs, (values, found[len(outs) :])

    def bwd(saved: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        values, residuals = saved
        real = [_differentiable(value) for value in values]

        def rule(residuals: Any, cotangents: Any) -> list[Any]:
            found = jax.tree.unflatten(structure, residuals)(cotangents)
            return [ct for ct, is_real in zip(found, real, strict=True) if is_real]

        traced = jax.make_jaxpr(rule)(residual_shapes, _shapes(cotangents))
        outs = body(traced)(*residuals, *cotangents)
        outs = [_output(x, handler) for x in outs]
        fresh = iter(outs)
        aligned = [next(fresh) if is_real else None for is_real in real]
        pairs = zip(values, aligned, strict=True)
        return tuple(_pulled(value, ct, handler) for value, ct in pairs)

    call.defvjp(fwd, bwd)
    return call(*values)


def custom_jvp(at: Equation, handler: Handler, body: Body) -> list[Any]:
    """A `jax.custom_jvp` function: its own rule for tangents, factored."""
    values = [_quiet(value) for value in at.values]
    primal = _plain_outputs(body(at.params["call_jaxpr"]), handler)
    if not handler.differentiates:
        return primal(*values)

    @jax.custom_jvp
    def call(*values: Any) -> list[Any]:
        return primal(*values)

    @call.defjvp
    def rule(values: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        pairs = [(v, t) for v, t in zip(values, tangents, strict=True) if _differentiable(v)]
        moved = [_pushed(value, tangent, handler) for value, tangent in pairs]

        def both(primals: list[Any], moved: list[Any]) -> Any:
            fresh = iter(moved)
            given = [next(fresh) if _differentiable(x) else _no_tangent(x) for x in primals]
            return jax.jvp(_on(at), tuple(primals), tuple(given))

        traced = jax.make_jaxpr(both)(_shapes(values), _shapes(moved))
        outs = [_output(x, handler) for x in body(traced)(*values, *moved)]
        half = len(at.eqn.outvars)
        return outs[:half], outs[half:]

    return call(*values)


def _traced_vjp(at: Equation, values: Sequence[Any]) -> tuple[Any, list[Any], Any]:
    """The forward rule as a jaxpr of outputs and residuals, and how to rebuild the backward one."""
    forward, shapes = jax.make_jaxpr(lambda *args: jax.vjp(_on(at), *args), return_shape=True)(
        *_shapes(values)
    )
    residuals, structure = jax.tree.flatten(shapes[1])
    return forward, residuals, structure


def _on(at: Equation) -> Callable[..., list[Any]]:
    return lambda *args: run(at.jaxpr, at.eqn, args)


def _plain_outputs(function: Callable[..., list[Any]], handler: Handler) -> Callable[..., Any]:
    return lambda *args: [_output(out, handler) for out in function(*args)]


def _output(out: Any, handler: Handler) -> Any:
    return handler.output(out) if isinstance(out, Followed) else out


def _shapes(values: Sequence[Any]) -> list[Any]:
    """Plain arrays in place of what is followed, abstract."""
    return [jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x)) for x in values]


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _differentiable(value: Any) -> bool:
    return jnp.issubdtype(_dtype(value), jnp.inexact)


def _no_tangent(value: Any) -> Any:
    return np.zeros(jnp.shape(value), jax.dtypes.float0)


def _pulled(value: Any, cotangent: Any, handler: Handler) -> Any:
    """The cotangents of a parameter's arrays from that of the adapted array."""
    if not isinstance(value, Followed):
        return cotangent
    _, pull = jax.vjp(handler.weight, value)
    return pull(cotangent)[0]


def _pushed(value: Any, tangent: Any, handler: Handler) -> Any:
    if not isinstance(value, Followed):
        return tangent
    return jax.jvp(handler.weight, (value,), (tangent,))[1]


def _quiet(value: Any) -> Any:
    """Without dropout: its key has no place in a derivative rule for the adapted kernel."""
    if isinstance(value, Joined):
        return replace(value, parts=tuple(_quiet(part) for part in value.parts))
    if isinstance(value, Tracked) and isinstance(value.riders, dict) and "key" in value.riders:
        return replace(value, riders={**value.riders, "key": None})
    return value
