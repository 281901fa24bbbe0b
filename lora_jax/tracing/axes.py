"""Which part of a parameter each axis of an array holds: the bookkeeping behind every site.

An *atom* is a run of one axis of the parameter: (axis, stride, size). A whole axis is the atom
(axis, 1, n); reshaping `[d, h*k]` to `[d, h, k]` splits its second atom into (1, k, h) and
(1, 1, k), and reshaping back joins them. Following atoms through transposes and reshapes tells at
each product which axes of the parameter it contracts, whatever layout they have by then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Atom(NamedTuple):
    """A run of `size` indices of one axis of the parameter, `stride` apart."""

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]  # the atoms that each axis of an array holds, outermost first


class View(NamedTuple):
    """How a parameter is read as a stack of matrices `[*stack, d_in, d_out]`.

    `stack`, `ins` and `outs` partition the atoms of the parameter, each in the parameter's order.
    """

    shape: tuple[int, ...]
    stack: tuple[Atom, ...]
    ins: tuple[Atom, ...]
    outs: tuple[Atom, ...]

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The sizes of the stack axes, () for a plain matrix."""
        return tuple(atom.size for atom in self.stack)

    @property
    def d_in(self) -> int:
        """The number of input features of one matrix."""
        return size_of(self.ins)

    @property
    def d_out(self) -> int:
        """The number of output features of one matrix."""
        return size_of(self.outs)

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The parameter as `[*stack, d_in, d_out]`."""
        return regroup(leaf, whole(self.shape), self._target())

    def leaf(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`: `[*stack, d_in, d_out]` in the parameter's own layout."""
        return regroup(matrix, self._target(), whole(self.shape))

    def _target(self) -> Dims:
        return (*((atom,) for atom in self.stack), self.ins, self.outs)


class Window(NamedTuple):
    """How the rows of a convolution's matrix are made of its input channels and its window."""

    ins: tuple[Atom, ...]
    channels: tuple[Atom, ...]
    places: Dims

    @property
    def c_in(self) -> int:
        """The number of input channels of one group."""
        return size_of(self.channels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The window's sizes, in the order of the operation's spatial axes."""
        return tuple(size_of(axis) for axis in self.places)

    def rows(self, array: jax.Array) -> jax.Array:
        """`[c_in * prod(shape), k]`, the channels outermost, in the order of the kernel's rows.

        >>> kernel = View((3, 2, 5), (), whole((3, 2, 5))[0] + whole((3, 2, 5))[1], ())
        >>> window = Window(kernel.ins, kernel.ins[1:], (kernel.ins[:1],))
        >>> window.rows(jnp.arange(6)[:, None])[:, 0].tolist()
        [0, 3, 1, 4, 2, 5]
        """
        column = (Atom(-1, 1, array.shape[1]),)
        array = array.reshape(self.c_in, *self.shape, -1)
        return regroup(array, (self.channels, *self.places, column), (self.ins, column))


def whole(shape: Sequence[int]) -> Dims:
    """The dims of a parameter in its own layout: one whole atom an axis."""
    return tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))


def size_of(atoms: Sequence[Atom]) -> int:
    """The number of indices that a run of atoms spans."""
    return math.prod(atom.size for atom in atoms)


def real(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """The atoms of the parameter itself; one of stride 0 only repeats it (a broadcast)."""
    return tuple(atom for atom in atoms if atom.stride)


def joined(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """Neighbouring atoms that are halves of one larger atom, joined."""
    out: list[Atom] = []
    for atom in atoms:
        last = out[-1] if out else None
        if last and last.axis == atom.axis and last.stride == atom.stride * atom.size:
            out[-1] = Atom(atom.axis, atom.stride, last.size * atom.size)
        else:
            out.append(atom)
    return tuple(out)


def in_order(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """The atoms in the parameter's own order, joined where they touch.

    >>> in_order([Atom(1, 1, 8), Atom(1, 8, 4)])
    (Atom(axis=1, stride=1, size=32),)
    """
    return joined(sorted(atoms, key=lambda atom: (atom.axis, -atom.stride)))


def halved(atoms: Sequence[Atom], count: int) -> tuple[tuple[Atom, ...], tuple[Atom, ...]] | None:
    """An axis cut into `count` equal runs: the atoms that choose one, and those inside it.

    >>> halved([Atom(0, 1, 6)], 2)
    ((Atom(axis=0, stride=3, size=2),), (Atom(axis=0, stride=1, size=3),))
    """
    if count == 1:
        return (), tuple(atoms)
    parts = _split(list(atoms), (count, size_of(atoms) // count))
    return None if parts is None else (parts[0], parts[1])


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The dims after a reshape, or None where an axis would mix parts of two atoms.

    >>> reshaped(whole((6, 20)), (6, 4, 5))[1:]
    ((Atom(axis=1, stride=5, size=4),), (Atom(axis=1, stride=1, size=5),))
    """
    sizes = [size_of(axis) for axis in dims]
    out: list[tuple[Atom, ...]] = []
    i = j = 0
    while i < len(sizes) or j < len(shape):
        stop_i, stop_j = _block(sizes, shape, i, j)
        if (stop_i - i, stop_j - j) == (1, 1):
            out.append(dims[i])  # an axis of size one keeps its atom
        else:
            atoms = [atom for axis in dims[i:stop_i] for atom in axis if atom.size > 1]
            split = _split(atoms, shape[j:stop_j])
            if split is None:
                return None
            out.extend(split)
        i, j = stop_i, stop_j
    return tuple(out)


def regroup(array: jax.Array, source: Dims, target: Dims) -> jax.Array:
    """Rearrange an array whose axes hold `source` atoms so that they hold `target` ones.

    Both sides hold the same runs of indices, cut or joined differently; atoms of size one are free.
    A rearrangement that changes nothing returns the array itself.
    """
    fine = _refined(source, target)
    flat_source = [atom for axis in source for atom in fine(axis)]
    flat_target = [atom for axis in target for atom in fine(axis)]
    order = [flat_source.index(atom) for atom in flat_target]
    if order != list(range(len(order))):
        array = jnp.transpose(array.reshape([atom.size for atom in flat_source]), order)
    shape = tuple(size_of(axis) for axis in target)
    return array if array.shape == shape else array.reshape(shape)


def _block(sizes: Sequence[int], shape: Sequence[int], i: int, j: int) -> tuple[int, int]:
    """The ends of the shortest runs of axes from i and j that hold equally many elements."""
    if i == len(sizes) or j == len(shape):
        return len(sizes), len(shape)
    left, right = sizes[i], shape[j]
    i, j = i + 1, j + 1
    while left != right:
        if left < right:
            left, i = left * sizes[i], i + 1
        else:
            right, j = right * shape[j], j + 1
    return i, j


def _split(atoms: list[Atom], shape: Sequence[int]) -> list[tuple[Atom, ...]] | None:
    rest, out = list(atoms), []
    for size in shape:
        axis: list[Atom] = []
        while size > 1:
            atom = rest.pop(0)
            if size % atom.size == 0:
                size //= atom.size
            elif atom.size % size == 0:
                low = atom.size // size
                rest.insert(0, Atom(atom.axis, atom.stride, low))
                atom, size = Atom(atom.axis, atom.stride * low, size), 1
            else:
                return None
            axis.append(atom)
        out.append(joined(axis))
    return out


def _refined(*groups: Dims) -> Callable[[tuple[Atom, ...]], list[Atom]]:
    """A function that cuts atoms at every boundary that any group has, dropping sizes of one."""
    cuts: dict[int, set[int]] = {}
    for atom in (atom for dims in groups for axis in dims for atom in axis):
        cuts.setdefault(atom.axis, set()).update((atom.stride, atom.stride * atom.size))

    def fine(axis: tuple[Atom, ...]) -> list[Atom]:
        out = []
        for atom in axis:
            end = atom.stride * atom.size
            marks = sorted(c for c in cuts[atom.axis] if atom.stride <= c <= end)
            pairs = list(itertools.pairwise(marks))
            out += [Atom(atom.axis, low, high // low) for low, high in reversed(pairs)]
        return out

    return fine
