"""The left operand of each kind of product in one canonical form, so that `x @ m` suits them all.

A method is written for `x: [T, d_in]` and matrices `m`. Each product brings its operand to that
form (free axes flattened to one: the backward pass of a product over `[B, T, D]` takes twice as
long on CPUs), multiplies it by any matrix in place of the kernel, and brings the method's result
back to the layout of the operation.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import axes
from lora_jax._compat import run
from lora_jax.axes import Atom, Dims, View
from lora_jax.tracked import Equation, Tracked

Multiply = Callable[[jax.Array, jax.Array], jax.Array]


class Operand:
    """What multiplies a kernel, as a method sees it: `x @ m` is the site's own contraction.

    `m` may be the kernel, `[d_in, d_out]`, or any matrix `[d_in, k]`, and is cast to `x.dtype`;
    the result is an ordinary array, `[T, d_out]` or `[T, k]`.
    """

    def __init__(self, array: jax.Array, multiply: Multiply, dtype: Any, key: Any = None) -> None:
        self.dtype = dtype
        self._array, self._multiply, self._key = array, multiply, key

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return self._multiply(self._array, matrix)

    def dropout(self, rate: float) -> Operand:
        """Entries dropped with probability `rate`, the others scaled by `1 / (1 - rate)`.

        Itself where the rate is zero, where no key is bound, and for rows looked up by index.
        """
        if rate == 0 or self._key is None or not jnp.issubdtype(self._array.dtype, jnp.inexact):
            return self
        keep = jax.random.bernoulli(self._key, 1 - rate, self._array.shape)
        dropped = jnp.where(keep, self._array / (1 - rate), 0).astype(self._array.dtype)
        return Operand(dropped, self._multiply, self.dtype, self._key)


class Product(abc.ABC):
    """A product with a kernel, taken apart: its operand, how to multiply, where the result goes.

    `view` reads the kernel in the direction of this use. `operand` is canonical,
    `[*stack, T, d_in]` (or indices, for a lookup); `multiply` works on one matrix of the stack.
    """

    def __init__(self, at: Equation, position: int, tracked: Tracked, view: View) -> None:
        self.at, self.position, self.tracked, self.view = at, position, tracked, view
        self.dtype = at.eqn.invars[position].aval.dtype
        self.out_dtype = at.eqn.outvars[0].aval.dtype
        self.free: tuple[Atom, ...] = ()
        self.operand: jax.Array
        self.out_dims: Dims

    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """`array @ matrix` as this operation does it; on a whole kernel by the operation itself."""
        whole = matrix.shape == (self.view.d_in, self.view.d_out)
        if not whole or self.tracked.stack:
            return self.narrow(array, matrix)
        kernel = axes.regroup(matrix, (self.view.ins, self.view.outs), self.tracked.dims)
        for dtype in (*self.tracked.casts, self.dtype):
            kernel = kernel.astype(dtype)
        values = list(self.at.values)
        values[self.position] = kernel
        values[1 - self.position] = self.restored(array)
        (out,) = run(self.at.jaxpr, self.at.eqn, values)
        return axes.regroup(out, self.out_dims, (self.free, self.view.outs))

    def result(self, y: jax.Array) -> jax.Array:
        """The method's result `[*stack, T, d_out]` as the operation's own output."""
        stack = tuple((atom,) for atom in self.tracked.stack or ())
        y = y.astype(self.out_dtype)
        return axes.regroup(y, (*stack, self.free, self.view.outs), self.out_dims)

    def transposed(self, apply: Callable[[Operand], jax.Array], array: jax.Array) -> jax.Array:
        """`array @ w'.T`: the transpose of a method's `apply(x) = x @ w'`, which is linear in x."""

        def forward(z: jax.Array) -> jax.Array:
            return apply(Operand(z, self.narrow, z.dtype)).astype(array.dtype)

        array = array.astype(self.out_dtype)  # so that logits keep what they accumulate in
        z = jax.ShapeDtypeStruct((array.shape[0], self.view.d_out), array.dtype)
        return jax.linear_transpose(forward, z)(array)[0]

    @abc.abstractmethod
    def narrow(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """`array @ matrix` for any matrix `[d_in, k]`."""

    @abc.abstractmethod
    def restored(self, array: jax.Array) -> jax.Array:
        """The canonical operand in the operation's own layout."""


class Dense(Product):
    """`dot_general` with the kernel on either side, batch axes as stack axes."""

    def __init__(self, at: Equation, position: int, tracked: Tracked, view: View) -> None:
        super().__init__(at, position, tracked, view)
        contract, batch = at.eqn.params["dimension_numbers"]
        mine, other = position, 1 - position
        self.x = jnp.asarray(at.values[other])
        x = self.x if jnp.issubdtype(self.x.dtype, jnp.inexact) else self.x.astype(self.dtype)
        held: dict[int, tuple[Atom, ...]] = {}
        for pairs in (contract, batch):
            for i, j in zip(pairs[mine], pairs[other], strict=True):
                held[j] = tracked.dims[i]
        labels = _free_labels(self.x.shape)
        self.x_dims = tuple(held.get(j, (labels[j],)) for j in range(self.x.ndim))
        self.free = tuple(labels[j] for j in range(self.x.ndim) if j not in held)
        stack = tuple((atom,) for atom in tracked.stack or ())
        self.x_canonical = (*stack, self.free, view.ins)
        self.operand = axes.regroup(x, self.x_dims, self.x_canonical)
        outs = tuple(
            axis
            for i, axis in enumerate(tracked.dims)
            if i not in contract[mine] and i not in batch[mine]
        )
        sides = [tuple((atom,) for atom in self.free), outs]
        batches = tuple(tracked.dims[i] for i in batch[mine])
        self.out_dims = (*batches, *sides[position == 0], *sides[position != 0])

    def narrow(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """A matrix product that keeps the operation's precision and accumulation.

        A thin matrix goes in transposed, behind a barrier: so its gradient is computed as
        `[k, d_in]`, `k` rows at full width. Left alone, XLA turns it to `[d_in, k]`, which takes
        four to six times as long on CPUs (1024 x 1536 by 8: 1.3 ms against 0.2).
        """
        params, whole = self.at.eqn.params, (self.view.d_in, self.view.d_out)
        if matrix.shape in (whole, whole[::-1]):
            matrix = functools.reduce(jnp.astype, self.tracked.casts, matrix)
        matrix = matrix.astype(array.dtype)
        thin = matrix.shape not in (whole, whole[::-1]) and 4 * matrix.shape[1] <= matrix.shape[0]
        return jax.lax.dot_general(
            array,
            jax.lax.optimization_barrier(matrix.T) if thin else matrix,
            (((1,), (1 if thin else 0,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    def restored(self, array: jax.Array) -> jax.Array:
        """The operand itself, unless a method has changed it (dropout)."""
        if array is self.operand:
            return self.x
        return axes.regroup(array, self.x_canonical, self.x_dims)


class Lookup(Product):
    """`gather` of rows by index."""

    def __init__(self, at: Equation, position: int, tracked: Tracked, view: View) -> None:
        super().__init__(at, position, tracked, view)
        numbers = at.eqn.params["dimension_numbers"]
        self.operand = jnp.asarray(at.values[1])
        labels = _free_labels(self.operand.shape[:-1])
        others = [axis for i, axis in enumerate(tracked.dims) if i not in numbers.start_index_map]
        places = dict(zip(numbers.offset_dims, others, strict=True))
        rest = iter(labels)
        ndim = len(at.eqn.outvars[0].aval.shape)
        self.free = tuple(labels)
        self.out_dims = tuple(places[i] if i in places else (next(rest),) for i in range(ndim))

    def narrow(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """Rows of a `[d_in, k]` matrix at the same indices, in the same mode: `[T, k]`."""
        params = self.at.eqn.params
        width = matrix.shape[1]
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(array.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        rows = jax.lax.gather(
            matrix.astype(self.dtype),
            array,
            numbers,
            (1, width),
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
            fill_value=0,  # the base term alone says what an index out of range gives
        )
        return rows.reshape(math.prod(array.shape[:-1]), width)

    def restored(self, array: jax.Array) -> jax.Array:
        """Indices stay as they are."""
        return array


def _free_labels(shape: Sequence[int]) -> list[Atom]:
    """Names for axes that the kernel knows nothing of: atoms of negative axes."""
    return [Atom(-1 - i, 1, size) for i, size in enumerate(shape)]


PRODUCTS: dict[str, type[Product]] = {"dense": Dense, "lookup": Lookup}
