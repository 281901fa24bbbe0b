"""Follow parameters through a traced function, from its arguments to the products that use them.

`interpret` evaluates a jaxpr in which some inputs are `Tracked`: a parameter together with what
each axis of it holds and with the arrays that ride along (an adapter's factors). Layout changes
carry a Tracked on, control flow takes it inside, and where it meets a product the `Handler`
decides: `find_sites` notes the use, `factored` computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from lora_jax import axes
from lora_jax._compat import run, scan_parts
from lora_jax.axes import Atom, Dims


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "riders"],
    meta_fields=["path", "dims", "stack", "dtype", "gone", "casts", "label"],
)
@dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter on its way through a function.

    `value` is its array in the layout it has here, casts not yet applied (None for a parameter
    that exists only packed); `riders` are arrays whose leading axes are the `stack` axes that no
    loop has sliced yet (None: not known, so any axis may be). `gone` are those a loop has sliced,
    `casts` the dtypes that the function has converted the parameter to, in order.
    """

    value: Any
    riders: Any
    path: str
    dims: Dims
    stack: tuple[Atom, ...] | None
    dtype: Any
    gone: tuple[Atom, ...] = ()
    casts: tuple[Any, ...] = ()
    label: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter here."""
        return tuple(axes.size_of(axis) for axis in self.dims)

    def moved(self, dims: Dims, change: Callable[[Any], Any]) -> Tracked:
        """The parameter after a change of layout."""
        value = None if self.value is None else change(self.value)
        return replace(self, value=value, dims=dims)

    def read(self) -> Any:
        """The plain array that the function would have seen."""
        value = self.value
        for dtype in self.casts:
            value = value.astype(dtype)
        return value

    def leading(self) -> Tracked | None:
        """With the riders' axis of the first axis in front, so that a loop may slice both."""
        if len(self.dims[0]) != 1:
            return None
        if self.stack is None:
            return self
        if self.dims[0][0] not in self.stack:
            return None
        at = self.stack.index(self.dims[0][0])
        return replace(self, riders=jax.tree.map(lambda x: jnp.moveaxis(x, at, 0), self.riders))

    def sliced(self) -> Tracked:
        """The static part of `leading()` after a loop took one slice of every array."""
        stack = self.stack
        if stack is not None:
            stack = tuple(atom for atom in stack if atom != self.dims[0][0])
        return replace(self, dims=self.dims[1:], stack=stack, gone=(*self.gone, *self.dims[0]))


class Use(NamedTuple):
    """One product that consumes a parameter: its operation and the atoms in each role."""

    kind: str  # "dense" or "lookup"
    stack: tuple[Atom, ...]  # batch axes of the product
    ins: tuple[Atom, ...]
    outs: tuple[Atom, ...]
    position: int  # which operand the parameter is


class Handler(Protocol):
    """What to do where a tracked parameter is consumed."""

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        """A product with the parameter."""
        ...

    def other(self, at: Equation) -> list[Any]:
        """Any operation that has no rule."""
        ...


class Equation(NamedTuple):
    """An equation, the jaxpr it stands in, and the values of its inputs."""

    jaxpr: Any
    eqn: Any
    values: list[Any]

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.eqn.primitive.name

    @property
    def tracked(self) -> list[Tracked]:
        """The inputs that are tracked parameters."""
        return [value for value in self.values if isinstance(value, Tracked)]

    def plain(self) -> list[Any]:
        """The equation on plain arrays: tracked inputs as the function would have seen them."""
        values = [v.read() if isinstance(v, Tracked) else v for v in self.values]
        return run(self.jaxpr, self.eqn, values)


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
        moved = rule(at.eqn, at.values[0]) if isinstance(at.values[0], Tracked) else None
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


def _cast(eqn: Any, t: Tracked) -> Tracked:
    dtype = eqn.params["new_dtype"]
    return replace(t, dtype=dtype, casts=(*t.casts, dtype))


def _transpose(eqn: Any, t: Tracked) -> Tracked:
    order = eqn.params["permutation"]
    return t.moved(tuple(t.dims[i] for i in order), lambda x: jnp.transpose(x, order))


def _reshape(eqn: Any, t: Tracked) -> Tracked | None:
    shape = eqn.params["new_sizes"]
    dims = axes.reshaped(t.dims, shape) if eqn.params["dimensions"] is None else None
    return None if dims is None else t.moved(dims, lambda x: x.reshape(shape))


def _squeeze(eqn: Any, t: Tracked) -> Tracked:
    gone = eqn.params["dimensions"]
    dims = tuple(axis for i, axis in enumerate(t.dims) if i not in gone)
    return t.moved(dims, lambda x: jax.lax.squeeze(x, gone))


def _expand(eqn: Any, t: Tracked) -> Tracked | None:
    """A broadcast that only adds axes of size one."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims = tuple(t.dims[kept.index(i)] if i in kept else () for i in range(len(shape)))
    if tuple(axes.size_of(axis) for axis in dims) != tuple(shape):
        return None
    return t.moved(dims, lambda x: x.reshape(shape))


def _same(eqn: Any, t: Tracked) -> Tracked:
    return t


LAYOUT: dict[str, Callable[[Any, Tracked], Tracked | None]] = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
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
    branches = [_inside(branch, handler) for branch in at.eqn.params["branches"]]
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

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        values = dict(fixed) | dict(zip(moving, carry, strict=True))
        slices = [x.sliced() if isinstance(x, Tracked) else x for x in slices]
        outs = body(*(values[i] for i in range(len(starts))), *slices)
        return [outs[i - scan.consts] for i in moving], outs[scan.carry :]

    last, ys = jax.lax.scan(step, [starts[i] for i in moving], xs, **scan.options)
    final = fixed | dict(zip(moving, last, strict=True))
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
        return [outs[i] for i in moving]

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
