"""Control flow: parameters are taken inside loops, branches and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing._compat import scan_parts
from lora_jax.tracing.custom import custom_jvp, custom_vjp
from lora_jax.tracing.joined import Joined, leaves
from lora_jax.tracing.mapped import shard_map
from lora_jax.tracing.tracked import (
    Equation,
    Followed,
    Handler,
    Tracked,
    bare,
    loops_of,
    stateful,
)

Body = Callable[..., Callable[..., list[Any]]]


def _closed(function: Callable[..., list[Any]], handler: Handler) -> Callable[..., list[Any]]:
    """With plain arrays as outputs."""
    return lambda *args: [_output(out, handler) for out in function(*args)]


def _output(out: Any, handler: Handler) -> Any:
    return handler.output(out) if isinstance(out, Followed) else out


def _jit(at: Equation, handler: Handler, body: Body) -> list[Any]:
    return body(at.params["jaxpr"], f"jit({at.params['name']})")(*at.values)


def _call(at: Equation, handler: Handler, body: Body) -> list[Any]:
    return body(at.params["call_jaxpr"])(*at.values)


def _checkpoint(at: Equation, handler: Handler, body: Body) -> list[Any]:
    options = {name: at.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(body(at.params["jaxpr"]), **options)(*at.values)


def _cond(at: Equation, handler: Handler, body: Body) -> list[Any]:
    index, *operands = at.values
    branches = [_closed(body(branch), handler) for branch in at.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def _scan(at: Equation, handler: Handler, body: Body) -> list[Any] | None:
    scan, around = scan_parts(at.eqn), loops_of(at.values)
    at = at._replace(values=bare(at.values))
    starts = at.values[: scan.consts + scan.carry]
    given = at.values[len(starts) :]
    if any(isinstance(x, Joined) and x.axis == 0 for x in given):
        return _unrolled(at, handler, body)
    xs: list[Any] = [x.leading() if isinstance(x, Followed) else x for x in given]
    loop = handler.loop(xs)
    inside, run = _with(loop, around), _within(loop, handler, body(scan.body))
    slices = [jax.eval_shape(_first, x) for x in xs]
    if any(x is None for x in xs) or not _carried_on(run, scan.consts, starts, slices):
        return None
    fixed = {i: v for i, v in enumerate(starts) if i < scan.consts or isinstance(v, Followed)}
    moving = [i for i in range(scan.consts, len(starts)) if i not in fixed]
    looped = {leaf.path: leaf.held[0] for x in xs if isinstance(x, Tracked) for leaf in leaves(x)}

    def emitted(out: Any) -> Any:
        """A slice of a stacked parameter is stacked again; any other parameter is read."""
        ours = isinstance(out, Tracked) and out.gone[-1:] == looped.get(out.path, ())
        return out if ours and out.gone else _output(out, handler)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        values = fixed | dict(zip(moving, stateful(carry, inside), strict=True))
        slices = [x.sliced() if isinstance(x, Followed) else x for x in slices]
        outs = bare(run(*(values[i] for i in range(len(starts))), *stateful(slices, around)))
        carry = [_output(outs[i - scan.consts], handler) for i in moving]
        return carry, [emitted(out) for out in outs[scan.carry :]]

    own, together = _of_each_round(xs, scan.options["length"])
    last, ys = jax.lax.scan(
        lambda carry, own: step(carry, together(own)),
        [starts[i] for i in moving],
        own,
        **scan.options,
    )
    final = fixed | dict(zip(moving, last, strict=True))
    ys = [y.restacked() if isinstance(y, Tracked) else y for y in ys]
    return stateful([*(final[i] for i in range(scan.consts, len(starts))), *ys], around)


def _of_each_round(xs: Sequence[Any], length: int) -> tuple[list[Any], Callable[..., Any]]:
    """The arrays that a loop slices, and how a round's slices stand with what all rounds share.

    A shared array has one index along the loop's axis, and stays a constant of the loop.
    """
    arrays, structure = jax.tree.flatten(xs)
    shared = {i: x[0] for i, x in enumerate(arrays) if x.shape[0] == 1 != length}

    def together(own: list[Any]) -> Any:
        rest = iter(own)
        both = [shared[i] if i in shared else next(rest) for i in range(len(arrays))]
        return jax.tree.unflatten(structure, both)

    return [x for i, x in enumerate(arrays) if i not in shared], together


def _unrolled(at: Equation, handler: Handler, body: Body) -> list[Any] | None:
    """A scan over parameters stacked just before: every round has its own, so it is written out."""
    scan = scan_parts(at.eqn)
    consts, carry = at.values[: scan.consts], at.values[scan.consts :][: scan.carry]
    xs, run = at.values[scan.consts + scan.carry :], body(scan.body)
    rounds = range(scan.options["length"])
    emitted: list[list[Any]] = []
    for i in reversed(rounds) if scan.options["reverse"] else rounds:
        slices = [_round(x, i) for x in xs]
        if any(x is None for x in slices):
            return None
        outs = run(*consts, *carry, *slices)
        carry = outs[: scan.carry]
        emitted.append([_output(out, handler) for out in outs[scan.carry :]])
    if scan.options["reverse"]:
        emitted.reverse()
    return [*carry, *(jnp.stack(ys) for ys in zip(*emitted, strict=True))]


def _while(at: Equation, handler: Handler, body: Body) -> list[Any] | None:
    params, around = at.params, loops_of(at.values)
    at = at._replace(values=bare(at.values))
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    tests, consts = at.values[: split[0]], at.values[split[0] : split[1]]
    starts = at.values[split[1] :]
    loop = handler.loop(())
    test, run = body(params["cond_jaxpr"]), _within(loop, handler, body(params["body_jaxpr"]))
    if not _carried_on(run, len(consts), [*consts, *starts], []):
        return None
    inside = _with(loop, around)
    fixed = {i: v for i, v in enumerate(starts) if isinstance(v, Followed)}
    moving = [i for i in range(len(starts)) if i not in fixed]

    def full(carry: list[Any]) -> list[Any]:
        values = fixed | dict(zip(moving, stateful(carry, inside), strict=True))
        return [values[i] for i in range(len(starts))]

    def step(carry: list[Any]) -> list[Any]:
        outs = bare(run(*consts, *full(carry)))
        return [_output(outs[i], handler) for i in moving]

    last = jax.lax.while_loop(
        lambda carry: bare(test(*tests, *full(carry)))[0], step, [starts[i] for i in moving]
    )
    outs = fixed | dict(zip(moving, last, strict=True))
    return stateful([outs[i] for i in range(len(starts))], around)


def _with(loop: int | None, around: frozenset[int]) -> frozenset[int]:
    """The loops on which the state of one inside others depends."""
    return around if loop is None else around | {loop}


def _within(loop: int | None, handler: Handler, run: Callable[..., Any]) -> Callable[..., Any]:
    """A loop's body, noted as such while it is evaluated."""
    if loop is None:
        return run

    def inside(*args: Any) -> Any:
        with handler.inside(loop):
            return run(*args)

    return inside


def _carried_on(
    run: Callable[..., list[Any]], consts: int, starts: Sequence[Any], slices: Sequence[Any]
) -> bool:
    """Whether every tracked parameter in the carry leaves the loop's body as it came.

    Found by one abstract run of the body, where there is such a parameter at all.
    """
    carried = {i: v for i, v in enumerate(starts) if i >= consts and isinstance(v, Followed)}
    if not carried:
        return True

    def once(starts: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
        slices = [x.sliced() if isinstance(x, Followed) else x for x in slices]
        return run(*starts, *slices)

    outs = jax.eval_shape(once, starts, slices)
    return all(node.alike(outs[i - consts]) for i, node in carried.items())


def _first(x: Any) -> Any:
    """A loop's first slice of every array."""
    return jax.tree.map(lambda array: array[0], x)


def _round(x: Any, i: int) -> Any:
    if not isinstance(x, Followed):
        return jax.tree.map(lambda array: array[i], x)
    node: Any = x
    indexed = node.indexed(0, i)
    return None if indexed is None else indexed.squeezed((0,))


CONTROL: dict[str, Callable[[Equation, Handler, Body], list[Any] | None]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat": _checkpoint,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "custom_vjp_call_jaxpr": custom_vjp,
    "shard_map": shard_map,
}

THROUGH = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"} | {
    "scan",
    "while",
}
"""Control flow that keeps note of which arrays depend on a loop's state."""
