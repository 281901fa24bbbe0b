"""A parameter on its way through a traced function, and what meets it there."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lora_jax.tracing import axes
from lora_jax.tracing._compat import run
from lora_jax.tracing.axes import Atom, Dims


class Followed(abc.ABC):
    """A parameter, or several side by side, that the interpreter follows.

    A change of layout gives None where the parameter can be followed no further.
    """

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape here."""

    @abc.abstractmethod
    def read(self) -> Any:
        """The plain array that the function would have seen."""

    @abc.abstractmethod
    def cast(self, dtype: Any) -> Any:
        """Converted to another dtype."""

    @abc.abstractmethod
    def stopped(self) -> Any:
        """With no gradient from here on."""

    @abc.abstractmethod
    def transposed(self, order: Sequence[int]) -> Any:
        """With its axes in another order."""

    @abc.abstractmethod
    def reshaped(self, shape: Sequence[int]) -> Any:
        """In another shape of as many elements."""

    @abc.abstractmethod
    def squeezed(self, gone: Sequence[int]) -> Any:
        """Without some axes of size one."""

    @abc.abstractmethod
    def expanded(self, shape: Sequence[int], kept: Sequence[int]) -> Any:
        """Broadcast to a shape whose axes `kept` are the present ones; new axes repeat it."""

    @abc.abstractmethod
    def flipped(self, where: Sequence[int]) -> Any:
        """Reversed along some axes."""

    @abc.abstractmethod
    def indexed(self, axis: int, start: Any) -> Any:
        """One index of an axis, which stays as an axis of size one."""

    @abc.abstractmethod
    def leading(self) -> Any:
        """In the form in which a loop may slice the first axis of every array."""

    @abc.abstractmethod
    def sliced(self) -> Any:
        """The static part of `leading()` after a loop took one slice of every array."""

    @abc.abstractmethod
    def alike(self, other: Any) -> bool:
        """Whether another is the same parameter in the same layout."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "riders"],
    meta_fields=["path", "dims", "stack", "dtype", "gone", "casts", "flips", "label"],
)
@dataclass(frozen=True, eq=False)
class Tracked(Followed):
    """A parameter on its way through a function.

    `value` is its array in the layout it has here, not yet cast, reversed or repeated (None for a
    parameter that exists only packed); `riders` are arrays whose leading axes are the `stack` axes
    that no loop has sliced yet (None: not known, so any axis may be). `gone` are those a loop has
    sliced, `casts` the dtypes that the function has converted the parameter to, in order, `flips`
    the atoms that run backwards. Without a `label` it is an array that only keeps others company.
    """

    value: Any
    riders: Any
    path: str
    dims: Dims
    stack: tuple[Atom, ...] | None
    dtype: Any
    gone: tuple[Atom, ...] = ()
    casts: tuple[Any, ...] = ()
    flips: frozenset[Atom] = frozenset()
    label: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter here."""
        return tuple(axes.size_of(axis) for axis in self.dims)

    @property
    def held(self) -> Dims:
        """The dims of `value`, where an axis that only repeats the parameter has size one."""
        return tuple(axes.real(axis) for axis in self.dims)

    def read(self) -> Any:
        """The plain array that the function would have seen."""
        return self.dressed(self.value)

    def dressed(self, kernel: Any) -> Any:
        """A kernel laid out as `held`, as the function would see it: reversed, repeated, cast."""
        backwards = [i for i, axis in enumerate(self.dims) if self.flips & set(axis)]
        kernel = jax.lax.rev(kernel, backwards) if backwards else kernel
        if kernel.shape != self.shape:
            kernel = jnp.broadcast_to(kernel, self.shape)
        return functools.reduce(lambda x, dtype: x.astype(dtype), self.casts, kernel)

    # ---- changes of layout; None where the parameter can be followed no further ----

    def cast(self, dtype: Any) -> Tracked:
        """Converted to another dtype."""
        return replace(self, dtype=dtype, casts=(*self.casts, dtype))

    def stopped(self) -> Tracked:
        """With no gradient from here on."""
        stop = functools.partial(jax.tree.map, _stop)
        return replace(self, value=stop(self.value), riders=stop(self.riders))

    def transposed(self, order: Sequence[int]) -> Tracked:
        """With its axes in another order."""
        return self._moved(tuple(self.dims[i] for i in order), lambda x: jnp.transpose(x, order))

    def reshaped(self, shape: Sequence[int]) -> Tracked | None:
        """In another shape of as many elements."""
        dims = axes.reshaped(self.dims, shape)
        if dims is None or any(0 < len(axes.real(axis)) < len(axis) for axis in dims):
            return None
        if any(atom not in axis for atom in self.flips for axis in dims if _meets(atom, axis)):
            return None
        sizes = [axes.size_of(axes.real(axis)) for axis in dims]
        return self._moved(dims, lambda x: x.reshape(sizes))

    def squeezed(self, gone: Sequence[int]) -> Tracked:
        """Without some axes of size one."""
        dims = tuple(axis for i, axis in enumerate(self.dims) if i not in gone)
        return self._moved(dims, lambda x: jax.lax.squeeze(x, gone))

    def expanded(self, shape: Sequence[int], kept: Sequence[int]) -> Tracked | None:
        """Broadcast to a shape whose axes `kept` are the present ones; new axes repeat it."""
        own = {place: self.dims[i] for i, place in enumerate(kept) if self.shape[i] == shape[place]}
        dims = tuple(own.get(i, _repeats(i, size)) for i, size in enumerate(shape))
        sizes = [axes.size_of(axes.real(axis)) for axis in dims]
        return self._moved(dims, lambda x: x.reshape(sizes))

    def flipped(self, where: Sequence[int]) -> Tracked | None:
        """Reversed along some axes."""
        if any(len(self.dims[i]) != 1 for i in where):
            return None
        return replace(self, flips=self.flips ^ {self.dims[i][0] for i in where})

    def layers(self, axis: int, start: int, stop: int) -> Tracked | None:
        """Some of the indices of a stack axis; None for other axes and where stacks are unknown."""
        if self.stack is None or len(self.dims[axis]) != 1 or self.dims[axis][0] not in self.stack:
            return None
        (atom,) = self.dims[axis]
        at, small = self.stack.index(atom), atom._replace(size=stop - start)

        def cut(x: Any, axis: int) -> Any:
            shared = x.shape[axis] != atom.size
            return x if shared else jax.lax.slice_in_dim(x, start, stop, axis=axis)

        riders = jax.tree.map(lambda x: cut(x, at), self.riders)
        stack = tuple(small if other == atom else other for other in self.stack)
        dims = (*self.dims[:axis], (small,), *self.dims[axis + 1 :])
        value = None if self.value is None else cut(self.value, axis)
        return replace(self, value=value, riders=riders, dims=dims, stack=stack)

    def indexed(self, axis: int, start: Any) -> Tracked | None:
        """One index of a stack axis, which stays as an axis of size one; None for other axes."""
        if len(self.held[axis]) != 1:
            return None
        (atom,), riders, stack = self.dims[axis], self.riders, self.stack
        if stack is not None:
            if atom not in stack:
                return None
            at = stack.index(atom)
            take = functools.partial(_at, at=at, start=start)
            riders = jax.tree.map(take, riders)
            stack = tuple(other for other in stack if other != atom)
        dims = (*self.dims[:axis], (), *self.dims[axis + 1 :])
        made = replace(self, riders=riders, stack=stack, dims=dims, gone=(*self.gone, atom))
        if self.value is None:
            return made
        return replace(made, value=jax.lax.dynamic_slice_in_dim(self.value, start, 1, axis))

    # ---- loops ----

    def leading(self) -> Tracked | None:
        """With the riders' axis of the first axis in front, so that a loop may slice both."""
        if not self.dims[0]:  # a stack axis of which one index was taken: a loop of one round
            return replace(self, riders=jax.tree.map(lambda x: x[None], self.riders))
        if len(self.held[0]) != 1:
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
            stack = tuple(atom for atom in stack if atom not in self.dims[0])
        return replace(self, dims=self.dims[1:], stack=stack, gone=(*self.gone, *self.dims[0]))

    def restacked(self) -> Tracked:
        """The static part of what a loop emitted, after it stacked the slices again."""
        atom, stack = self.gone[-1], self.stack
        stack = stack if stack is None else (atom, *stack)
        return replace(self, dims=((atom,), *self.dims), stack=stack, gone=self.gone[:-1])

    def alike(self, other: Any) -> bool:
        """Whether another is the same parameter in the same layout."""
        names = ("path", "dims", "stack", "dtype", "gone", "casts", "flips")
        same = isinstance(other, Tracked) and jax.tree.structure(self.riders) == (
            jax.tree.structure(other.riders)
        )
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def _moved(self, dims: Dims, change: Callable[[Any], Any]) -> Tracked:
        value = None if self.value is None else change(self.value)
        return replace(self, value=value, dims=dims)._of_one()

    def _of_one(self) -> Tracked:
        """Without stack axes of a single layer that a change of layout has dropped."""
        left = {atom for axis in self.dims for atom in axis}
        riders, stack = self.riders, list(self.stack or ())
        for atom in [atom for atom in stack if atom.size == 1 and atom not in left]:
            riders = jax.tree.map(functools.partial(_at, at=stack.index(atom), start=0), riders)
            stack.remove(atom)
        return replace(self, riders=riders, stack=None if self.stack is None else tuple(stack))


def company(array: Any, path: str = "") -> Tracked:
    """A plain array in the form of a tracked parameter."""
    return Tracked(array, (), path, axes.whole(array.shape), None, array.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["loops"])
@dataclass(frozen=True, eq=False)
class Stateful:
    """An array that depends on the state which some loops carry from round to round."""

    value: Any
    loops: frozenset[int]


def loops_of(values: Sequence[Any]) -> frozenset[int]:
    """The loops on whose state any of some values depends."""
    return frozenset().union(*(v.loops for v in values if isinstance(v, Stateful)))


def bare(values: Sequence[Any]) -> list[Any]:
    """The values themselves."""
    return [v.value if isinstance(v, Stateful) else v for v in values]


def stateful(values: Sequence[Any], loops: frozenset[int]) -> list[Any]:
    """Arrays marked as depending on loops; parameters are not."""
    if not loops:
        return list(values)
    values = bare(values)
    return [v if isinstance(v, Followed) else Stateful(v, loops) for v in values]


class Use(NamedTuple):
    """One product that consumes a parameter: its operation and the atoms in each role."""

    kind: str  # "dense", "lookup", "conv" or "ragged"
    stack: tuple[Atom, ...]  # batch axes, experts or groups of the product
    ins: tuple[Atom, ...]
    outs: tuple[Atom, ...]
    position: int  # which operand the parameter is
    window: Dims = ()  # of a convolution: the input channels, and each axis of its window


class Handler(Protocol):
    """What to do where a tracked parameter is consumed."""

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        """A product with the parameter."""
        ...

    def other(self, at: Equation) -> list[Any]:
        """Any operation that has no rule."""
        ...

    def output(self, tracked: Any) -> Any:
        """A parameter that the function, a branch or a loop returns: the array to return."""
        ...

    def joins(self, at: Equation) -> bool:
        """Whether a concatenation of parameters and arrays is followed as a larger parameter."""
        ...

    def window(self, tracked: Tracked, axis: int, start: int, stop: int) -> Tracked | None:
        """A part of a parameter along an axis that is no stack axis, if it can be followed."""
        ...

    def alone(self, at: Equation, position: int) -> Equation | None:
        """A product of two parameters as one with the operand at `position`, the other read."""
        ...

    def given(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of the function that are no parameters, marked if need be."""
        ...

    def loop(self, xs: Sequence[Any]) -> int | None:
        """A number for a loop about to be entered, which slices `xs`; None: not of interest."""
        ...

    def inside(self, loop: int) -> AbstractContextManager[None]:
        """While the body of a loop is evaluated."""
        ...

    @property
    def differentiates(self) -> bool:
        """Whether derivative rules are needed at all."""
        ...

    def weight(self, node: Any) -> Any:
        """The adapted array, a differentiable function of value and riders."""
        ...

    def shard(self, tracked: Tracked, shards: Any) -> tuple[Any, Any]:
        """The label of a device's part of a parameter, and the specs of its riders."""
        ...


class Equation(NamedTuple):
    """An equation, the jaxpr it stands in, and the values of its inputs."""

    jaxpr: Any
    eqn: Any
    values: list[Any]
    loops: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the operation."""
        return self.eqn.params

    @property
    def followed(self) -> list[Any]:
        """The inputs that are tracked parameters, alone or joined."""
        return [value for value in self.values if isinstance(value, Followed)]

    def plain(self) -> list[Any]:
        """The equation on plain arrays: tracked inputs as the function would have seen them."""
        values = [v.read() if isinstance(v, Followed) else v for v in self.values]
        return run(self.jaxpr, self.eqn, values)


def _stop(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.stop_gradient(x)


def _at(x: jax.Array, at: int, start: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, start, at, keepdims=False)


def _repeats(place: int, size: int) -> tuple[Atom, ...]:
    return () if size == 1 else (Atom(-1 - place, 0, size),)


def _meets(atom: Atom, axis: tuple[Atom, ...]) -> bool:
    return any(other.axis == atom.axis for other in axis)
