"""Follow parameters through a traced function, from its arguments to the products that use them.

`interpret` evaluates a jaxpr in which some inputs are `Tracked`: a parameter together with what
each axis of it holds and with the arrays that ride along (an adapter's factors). Layout changes
carry a Tracked on, control flow takes it inside, and where it meets a product the `Handler`
decides: `find_sites` notes the use, `factored` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from lora_jax import axes
from lora_jax._compat import run, scan_parts
from lora_jax.axes import Atom, Dims
from lora_jax.tracked import Equation, Handler, Tracked, Use


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
        at = Equation(jaxpr, eqn, [read(var) for var in eqn.invars])
        outs = _step(at, handler) if at.tracked else run(jaxpr, eqn, at.values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _step(at: Equation, handler: Handler) -> list[Any]:
    rule = LAYOUT.get(at.name)
    if rule is not None:
        moved = rule(at, at.values[0]) if isinstance(at.values[0], Tracked) else None
        return handler.other(at) if moved is None else [moved]
    if at.name in CONTROL:
        outs = CONTROL[at.name](at, handler)
        return handler.other(at) if outs is None else outs
    if at.name in USES and len(at.tracked) == 1:
        position = next(i for i, v in enumerate(at.values) if isinstance(v, Tracked))
        use = USES[at.name](at.eqn, position, at.tracked[0].dims)
        if use is not None:
            return handler.use(at, use, at.tracked[0])
    return handler.other(at)


# ---- changes of layout ---------------------------------------------------------------------------


def _cast(at: Equation, t: Tracked) -> Tracked:
    dtype = at.eqn.params["new_dtype"]
    return replace(t, dtype=dtype, casts=(*t.casts, dtype))


def _transpose(at: Equation, t: Tracked) -> Tracked:
    order = at.eqn.params["permutation"]
    return t.moved(tuple(t.dims[i] for i in order), lambda x: jnp.transpose(x, order))


def _reshape(at: Equation, t: Tracked) -> Tracked | None:
    shape = at.eqn.params["new_sizes"]
    dims = axes.reshaped(t.dims, shape) if at.eqn.params["dimensions"] is None else None
    return None if dims is None else t.moved(dims, lambda x: x.reshape(shape))


def _squeeze(at: Equation, t: Tracked) -> Tracked:
    gone = at.eqn.params["dimensions"]
    dims = tuple(axis for i, axis in enumerate(t.dims) if i not in gone)
    return t.moved(dims, lambda x: jax.lax.squeeze(x, gone))


def _expand(at: Equation, t: Tracked) -> Tracked | None:
    """A broadcast that only adds axes of size one."""
    shape, kept = at.eqn.params["shape"], at.eqn.params["broadcast_dimensions"]
    dims = tuple(t.dims[kept.index(i)] if i in kept else () for i in range(len(shape)))
    if tuple(axes.size_of(axis) for axis in dims) != tuple(shape):
        return None
    return t.moved(dims, lambda x: x.reshape(shape))


def _same(at: Equation, t: Tracked) -> Tracked:
    return t


def _slice(at: Equation, t: Tracked) -> Tracked | None:
    """One layer of a stack, by an index known to the program (`slice`) or only to its run."""
    sizes = at.eqn.outvars[0].aval.shape
    cut = [i for i, size in enumerate(sizes) if size != t.shape[i]]
    if at.name == "slice":
        cut = cut or [i for i, size in enumerate(sizes) if size == 1][:1]
        starts: Sequence[Any] = at.eqn.params["start_indices"]
    else:
        starts = at.values[1:]
    if len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    (plain,) = [None] if t.value is None else run(at.jaxpr, at.eqn, [t.value, *at.values[1:]])
    indexed = t.indexed(cut[0], starts[cut[0]])
    return None if indexed is None else replace(indexed, value=plain)


LAYOUT: dict[str, Callable[[Equation, Tracked], Tracked | None]] = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "slice": _slice,
    "dynamic_slice": _slice,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
}


# ---- products ------------------------------------------------------------------------------------


def _dot_general(eqn: Any, position: int, dims: Dims) -> Use | None:
    contract, batch = (sides[position] for sides in eqn.params["dimension_numbers"])
    free = [i for i in range(len(dims)) if i not in contract and i not in batch]

    stack = tuple(atom for i in batch for atom in dims[i])
    return Use("dense", stack, _atoms(dims, contract), _atoms(dims, free), position)


def _gather(eqn: Any, position: int, dims: Dims) -> Use | None:
    """Rows of a table by index: one collapsed axis, all the others whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows = numbers.start_index_map
    if position != 0 or len(rows) != 1 or rows != numbers.collapsed_slice_dims:
        return None
    if numbers.operand_batching_dims or sizes[rows[0]] != 1:
        return None
    others = [i for i in range(len(dims)) if i != rows[0]]
    if any(sizes[i] != axes.size_of(dims[i]) for i in others):
        return None
    return Use("lookup", (), _atoms(dims, rows), _atoms(dims, others), 0)


def _atoms(dims: Dims, where: Sequence[int]) -> tuple[Atom, ...]:
    return axes.in_order([atom for i in where for atom in dims[i] if atom.size > 1])


USES: dict[str, Callable[[Any, int, Dims], Use | None]] = {
    "dot_general": _dot_general,
    "gather": _gather,
}


# ---- control flow --------------------------------------------------------------------------------


def _inside(closed: Any, handler: Handler, scope: str = "") -> Callable[..., list[Any]]:
    """A jaxpr as a function of values, Tracked or not."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())

    def function(*args: Any) -> list[Any]:
        with jax.named_scope(scope):
            return interpret(jaxpr, consts, args, handler)

    return function


def _closed(closed: Any, handler: Handler) -> Callable[..., list[Any]]:
    """As `_inside`, with plain arrays as outputs."""
    function = _inside(closed, handler)
    return lambda *args: [_output(out, handler) for out in function(*args)]


def _output(out: Any, handler: Handler) -> Any:
    return handler.output(out) if isinstance(out, Tracked) else out


def _jit(at: Equation, handler: Handler) -> list[Any]:
    scope = f"jit({at.eqn.params['name']})"
    return _inside(at.eqn.params["jaxpr"], handler, scope)(*at.values)


def _call(at: Equation, handler: Handler) -> list[Any]:
    return _inside(at.eqn.params["call_jaxpr"], handler)(*at.values)


def _checkpoint(at: Equation, handler: Handler) -> list[Any]:
    params = at.eqn.params
    function = _inside(params["jaxpr"], handler)
    options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
    return jax.checkpoint(function, **options)(*at.values)


def _cond(at: Equation, handler: Handler) -> list[Any] | None:
    index, *operands = at.values
    branches = [_closed(branch, handler) for branch in at.eqn.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def _scan(at: Equation, handler: Handler) -> list[Any] | None:
    scan = scan_parts(at.eqn)
    starts = at.values[: scan.consts + scan.carry]
    xs: list[Any] = [x.leading() if isinstance(x, Tracked) else x for x in at.values[len(starts) :]]
    if any(x is None for x in xs) or not _carried_on(scan.body, scan.consts, starts):
        return None
    fixed = {i: value for i, value in enumerate(starts) if _stays(i, value, scan.consts)}
    body = _inside(scan.body, handler)
    moving = [i for i in range(scan.consts, len(starts)) if i not in fixed]
    looped = {x.path: x.dims[0][0] for x in xs if isinstance(x, Tracked)}

    def emitted(out: Any) -> Any:
        """A slice of a stacked parameter is stacked again; any other parameter is read."""
        ours = isinstance(out, Tracked) and out.gone[-1:] == (looped.get(out.path),)
        return out if ours else _output(out, handler)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        values = dict(fixed) | dict(zip(moving, carry, strict=True))
        slices = [x.sliced() if isinstance(x, Tracked) else x for x in slices]
        outs = body(*(values[i] for i in range(len(starts))), *slices)
        carry = [_output(outs[i - scan.consts], handler) for i in moving]
        return carry, [emitted(out) for out in outs[scan.carry :]]

    last, ys = jax.lax.scan(step, [starts[i] for i in moving], xs, **scan.options)
    final = fixed | dict(zip(moving, last, strict=True))
    ys = [y.restacked() if isinstance(y, Tracked) else y for y in ys]
    return [*(final[i] for i in range(scan.consts, len(starts))), *ys]


def _while(at: Equation, handler: Handler) -> list[Any] | None:
    params = at.eqn.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    tests, consts, starts = (
        at.values[: split[0]],
        at.values[split[0] : split[1]],
        at.values[split[1] :],
    )
    shared = [*consts, *starts]
    if not _carried_on(params["body_jaxpr"], len(consts), shared):
        return None
    test = _inside(params["cond_jaxpr"], handler)
    body = _inside(params["body_jaxpr"], handler)
    fixed = {i: v for i, v in enumerate(starts) if isinstance(v, Tracked)}
    moving = [i for i in range(len(starts)) if i not in fixed]

    def full(carry: list[Any]) -> list[Any]:
        values = fixed | dict(zip(moving, carry, strict=True))
        return [values[i] for i in range(len(starts))]

    def step(carry: list[Any]) -> list[Any]:
        outs = body(*consts, *full(carry))
        return [_output(outs[i], handler) for i in moving]

    last = jax.lax.while_loop(
        lambda carry: test(*tests, *full(carry))[0], step, [starts[i] for i in moving]
    )
    return full(last)


def _stays(i: int, value: Any, consts: int) -> bool:
    return i < consts or isinstance(value, Tracked)


def _carried_on(body: Any, consts: int, starts: Sequence[Any]) -> bool:
    """Whether every tracked parameter in the carry leaves the loop's body as it came."""
    jaxpr = body.jaxpr
    return all(
        jaxpr.outvars[i - consts] is jaxpr.invars[i]
        for i, value in enumerate(starts)
        if i >= consts and isinstance(value, Tracked)
    )


CONTROL: dict[str, Callable[[Equation, Handler], list[Any] | None]] = {
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
}
