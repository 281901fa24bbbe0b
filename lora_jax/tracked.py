"""A parameter on its way through a traced function, and what meets it there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lora_jax import axes
from lora_jax._compat import run
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

    def restacked(self) -> Tracked:
        """The static part of what a loop emitted, after it stacked the slices again."""
        atom, stack = self.gone[-1], self.stack
        stack = stack if stack is None else (atom, *stack)
        return replace(self, dims=((atom,), *self.dims), stack=stack, gone=self.gone[:-1])

    def indexed(self, axis: int, start: Any) -> Tracked | None:
        """One index of a stack axis, which stays as an axis of size one; None for other axes."""
        if len(self.dims[axis]) != 1:
            return None
        (atom,), riders, stack = self.dims[axis], self.riders, self.stack
        if stack is not None:
            if atom not in stack:
                return None
            at = stack.index(atom)
            riders = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, start, at, keepdims=False), riders
            )
            stack = tuple(other for other in stack if other != atom)
        dims = (*self.dims[:axis], (), *self.dims[axis + 1 :])
        return replace(self, riders=riders, stack=stack, dims=dims, gone=(*self.gone, atom))


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

    def output(self, tracked: Tracked) -> Any:
        """A parameter that the function, a branch or a loop returns: the array to return."""
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
