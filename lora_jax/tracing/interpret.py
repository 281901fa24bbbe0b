"""Follow parameters through a traced function, from its arguments to the products that use them.

`interpret` evaluates a jaxpr in which some inputs are `Tracked`: a parameter together with what
each axis of it holds and with the arrays that ride along (an adapter's factors). Layout changes
carry a Tracked on, control flow takes it inside, and where it meets a product the `Handler`
decides: `find_sites` notes the use, `factored` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from lora_jax.tracing import joined
from lora_jax.tracing._compat import run
from lora_jax.tracing.control import CONTROL, THROUGH, Body
from lora_jax.tracing.joined import Joined
from lora_jax.tracing.layout import follow, moves
from lora_jax.tracing.tracked import Equation, Followed, Handler, Tracked, bare, loops_of, stateful
from lora_jax.tracing.uses import USES


def interpret(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], handler: Handler
) -> list[Any]:
    """Evaluate a jaxpr some of whose inputs are Tracked."""
    env: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
    )

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        loops = loops_of(values)
        at = Equation(jaxpr, eqn, values if eqn.primitive.name in THROUGH else bare(values), loops)
        outs = _step(at, handler) if at.followed else run(jaxpr, eqn, bare(values))
        outs = outs if at.followed and at.name in THROUGH else stateful(outs, loops)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _step(at: Equation, handler: Handler) -> list[Any]:
    if moves(at):
        moved = follow(at, handler)
        return handler.other(at) if moved is None else moved
    if at.name in CONTROL:
        outs = CONTROL[at.name](at, handler, _body(handler))
        return handler.other(at) if outs is None else outs
    outs = _product(at, handler)
    return handler.other(at) if outs is None else outs


def _product(at: Equation, handler: Handler) -> list[Any] | None:
    """A product with one parameter; of two, the right operand is the kernel."""
    position = max(i for i, value in enumerate(at.values) if isinstance(value, Followed))
    node = at.values[position]
    if len(at.followed) > 1:
        alone = handler.alone(at, position)
        if alone is None:
            return None
        at = alone
    if isinstance(node, Joined):
        rule = joined.RULES.get(at.name)
        return rule(at, position, lambda part: _product(part, handler)) if rule else None
    use = USES[at.name](at.eqn, position, node) if at.name in USES else None
    return None if use is None else handler.use(at, use, node)


def _body(handler: Handler) -> Body:
    """How control flow evaluates a jaxpr inside: as a function of values, Tracked or not."""

    def inside(closed: Any, scope: str = "") -> Callable[..., list[Any]]:
        closes = hasattr(closed, "consts")
        jaxpr, consts = (closed.jaxpr, closed.consts) if closes else (closed, ())

        def function(*args: Any) -> list[Any]:
            with jax.named_scope(scope):
                return interpret(jaxpr, consts, args, handler)

        return function

    return inside


__all__ = ["Tracked", "interpret"]
