"""Several parameters side by side along one axis, as one larger parameter.

A product with them is taken apart: over an output axis the results stand side by side, over a
contracted one they add up, over a batch axis each meets its part of the operand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing.tracked import Equation, Followed, Tracked

Part = Any  # Tracked or Joined
Evaluate = Callable[[Equation], list[Any] | None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis", "split"]
)
@dataclass(frozen=True, eq=False)
class Joined(Followed):
    """`concatenate(parts, axis)`; `split` says that a parameter was cut into them by a rule."""

    parts: tuple[Part, ...]
    axis: int
    split: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of each part along the axis."""
        return tuple(part.shape[self.axis] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.sizes)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Of the whole."""
        return self.parts[0].dtype

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Where each part begins and ends along the axis."""
        return list(pairwise([0, *accumulate(self.sizes)]))

    def read(self) -> Any:
        """The plain array that the function would have seen."""
        return jnp.concatenate([part.read() for part in self.parts], self.axis)

    def cast(self, dtype: Any) -> Joined:
        """Converted to another dtype."""
        return self._each(lambda part: part.cast(dtype), self.axis)

    def stopped(self) -> Joined:
        """With no gradient from here on."""
        return self._each(lambda part: part.stopped(), self.axis)

    def transposed(self, order: Sequence[int]) -> Joined:
        """With its axes in another order."""
        return self._each(lambda part: part.transposed(order), list(order).index(self.axis))

    def reshaped(self, shape: Sequence[int]) -> Joined | None:
        """In another shape in which the parts still stand side by side along one axis."""
        before = math.prod(self.shape[: self.axis])
        for place in range(len(shape)):
            sizes = self._shares(shape[place])
            if math.prod(shape[:place]) == before and sizes is not None:
                shapes = [(*shape[:place], size, *shape[place + 1 :]) for size in sizes]
                ours = [math.prod(part.shape) for part in self.parts]
                if ours == [math.prod(each) for each in shapes]:
                    pairs = zip(self.parts, shapes, strict=True)
                    return self._of([part.reshaped(each) for part, each in pairs], place)
        return None

    def squeezed(self, gone: Sequence[int]) -> Joined:
        """Without some axes of size one."""
        axis = self.axis - sum(i < self.axis for i in gone)
        return self._each(lambda part: part.squeezed(gone), axis)

    def expanded(self, shape: Sequence[int], kept: Sequence[int]) -> Joined | None:
        """Broadcast to a shape whose axes `kept` are the present ones."""
        axis = kept[self.axis]
        if shape[axis] != self.shape[self.axis]:
            return None
        shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in self.sizes]
        pairs = zip(self.parts, shapes, strict=True)
        return self._of([part.expanded(each, kept) for part, each in pairs], axis)

    def flipped(self, where: Sequence[int]) -> Joined | None:
        """Reversed along some axes, but not the one along which the parts stand."""
        if self.axis in where:
            return None
        return self._of([part.flipped(where) for part in self.parts], self.axis)

    def indexed(self, axis: int, start: Any) -> Any:
        """One index of an axis: of every part, or the part that has it."""
        if axis != self.axis:
            return self._of([part.indexed(axis, start) for part in self.parts], self.axis)
        if isinstance(start, int):
            for (low, high), part in zip(self.ends, self.parts, strict=True):
                if low <= start < high:
                    return part if high - low == 1 else part.indexed(axis, start - low)
        return None

    def window(self, start: int, stop: int) -> Any:
        """The parts between two of their ends along the axis; None for any other cut."""
        pairs = zip(self.ends, self.parts, strict=True)
        inside = [part for (low, high), part in pairs if start <= low and high <= stop]
        if sum(part.shape[self.axis] for part in inside) != stop - start:
            return None
        return inside[0] if len(inside) == 1 else replace(self, parts=tuple(inside))

    def leading(self) -> Joined | None:
        """With what a loop slices in front, where the parts stand along another axis."""
        if self.axis == 0:
            return None
        return self._of([part.leading() for part in self.parts], self.axis)

    def sliced(self) -> Joined:
        """The static part of `leading()` after a loop took one slice of every array."""
        return self._each(lambda part: part.sliced(), self.axis - 1)

    def alike(self, other: Any) -> bool:
        """Whether another is the same parameters in the same layout."""
        if not isinstance(other, Joined) or len(other.parts) != len(self.parts):
            return False
        pairs = zip(self.parts, other.parts, strict=True)
        return self.axis == other.axis and all(mine.alike(theirs) for mine, theirs in pairs)

    def _each(self, change: Callable[[Part], Part], axis: int) -> Joined:
        return replace(self, parts=tuple(change(part) for part in self.parts), axis=axis)

    def _of(self, parts: Sequence[Part | None], axis: int) -> Joined | None:
        if any(part is None for part in parts):
            return None
        return replace(self, parts=tuple(parts), axis=axis)

    def _shares(self, size: int) -> list[int] | None:
        """What each part takes of an axis of some size, in proportion."""
        shares = [mine * size / sum(self.sizes) for mine in self.sizes]
        whole = all(share.is_integer() and share >= 1 for share in shares)
        return [int(share) for share in shares] if whole else None


def leaves(node: Any) -> list[Tracked]:
    """The tracked parameters of one that may be joined."""
    if isinstance(node, Joined):
        return [leaf for part in node.parts for leaf in leaves(part)]
    return [node]


def dot_general(at: Equation, position: int, evaluate: Evaluate) -> list[Any] | None:
    """A matrix product with joined parameters, by the products with the parts."""
    joined: Joined = at.values[position]
    contract, batch = at.params["dimension_numbers"]
    if joined.axis in contract[position]:
        k = contract[position].index(joined.axis)
        return _summed(at, position, contract[1 - position][k], evaluate)
    if joined.axis in batch[position]:
        k = batch[position].index(joined.axis)
        return _beside(at, position, k, evaluate, along=batch[1 - position][k])
    free = [i for i in range(len(joined.shape)) if i not in (*contract[position], *batch[position])]
    out = len(batch[position]) + free.index(joined.axis)
    if position == 1:
        ndim = jnp.ndim(at.values[0])
        out += ndim - len(contract[0]) - len(batch[0])
    return _beside(at, position, out, evaluate)


def convolution(at: Equation, position: int, evaluate: Evaluate) -> list[Any] | None:
    """A convolution with kernels side by side along the output or the input channels."""
    numbers, joined = at.params["dimension_numbers"], at.values[position]
    if position != 1 or at.params["feature_group_count"] != 1:
        return None
    if joined.axis == numbers.rhs_spec[0]:
        return _beside(at, 1, numbers.out_spec[1], evaluate)
    if joined.axis == numbers.rhs_spec[1]:
        return _summed(at, 1, numbers.lhs_spec[1], evaluate)
    return None


RULES = {"dot_general": dot_general, "conv_general_dilated": convolution}


def _summed(at: Equation, position: int, along: int, evaluate: Evaluate) -> list[Any] | None:
    outs = _over_parts(at, position, along, evaluate)
    return None if outs is None else [functools.reduce(jnp.add, outs)]


def _beside(
    at: Equation, position: int, out: int, evaluate: Evaluate, along: int | None = None
) -> list[Any] | None:
    outs = _over_parts(at, position, along, evaluate)
    return None if outs is None else [jnp.concatenate(outs, out)]


def _over_parts(
    at: Equation, position: int, along: int | None, evaluate: Evaluate
) -> list[Any] | None:
    """The operation on every part, with its own slice of the other operand if there is one."""
    joined, outs = at.values[position], []
    for (low, high), part in zip(joined.ends, joined.parts, strict=True):
        values = list(at.values)
        values[position] = part
        if along is not None:
            other = jnp.asarray(values[1 - position])
            values[1 - position] = jax.lax.slice_in_dim(other, low, high, axis=along)
        found = evaluate(at._replace(values=values))
        if found is None:
            return None
        outs.extend(found)
    return outs
