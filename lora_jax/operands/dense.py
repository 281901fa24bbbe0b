"""Matrix products and look-ups."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.operands.product import Product, free_labels
from lora_jax.tracing import axes
from lora_jax.tracing.axes import Atom


class Dense(Product):
    """`dot_general` with the kernel on either side, batch axes as stack axes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        at, position, tracked = self.at, self.position, self.tracked
        contract, batch = at.params["dimension_numbers"]
        mine, other = position, 1 - position
        x = jnp.asarray(at.values[other])
        x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(self.dtype)
        backwards = [i for i, axis in enumerate(tracked.dims) if tracked.flips & set(axis)]
        pairs = zip(contract[mine], contract[other], strict=True)
        turned = [j for i, j in pairs if i in backwards]
        x = jax.lax.rev(x, turned) if turned else x
        held: dict[int, tuple[Atom, ...]] = {}
        labels = free_labels(x.shape)
        for pairs in (contract, batch):
            for i, j in zip(pairs[mine], pairs[other], strict=True):
                if tracked.held[i] == tracked.dims[i]:  # else it only repeats the kernel
                    held[j] = tracked.dims[i]
        x_dims = tuple(held.get(j, (labels[j],)) for j in range(x.ndim))
        self.free = tuple(label for j, label in enumerate(labels) if j not in held)
        self.operand = axes.regroup(x, x_dims, (*self.stack_dims, self.free, self.view.ins))
        sides = [
            tuple(x_dims[j] for j in range(x.ndim) if j not in (*contract[other], *batch[other])),
            tuple(
                axis
                for i, axis in enumerate(tracked.dims)
                if i not in (*contract[mine], *batch[mine])
            ),
        ]
        batches = tuple(x_dims[j] for j in batch[other])
        self.out_dims = (*batches, *sides[position == 0], *sides[position != 0])
        self.turned = [i for i, axis in enumerate(self.out_dims) if tracked.flips & set(axis)]

    def base(self) -> jax.Array:
        """The model's own operation; outputs that run backwards are turned."""
        (out,) = self.at.plain()
        return self.canonical(jax.lax.rev(out, self.turned) if self.turned else out)

    def result(self, y: jax.Array) -> jax.Array:
        """The method's result as the operation's output, turned again."""
        out = super().result(y)
        return jax.lax.rev(out, self.turned) if self.turned else out

    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """A matrix product that keeps the operation's precision and accumulation.

        A thin matrix goes in transposed, behind a barrier: so its gradient is computed as
        `[k, d_in]`, `k` rows at full width. Left alone, XLA turns it to `[d_in, k]`, which takes
        four to six times as long on CPUs (1024 x 1536 by 8: 1.3 ms against 0.2).
        """
        params, whole = self.at.params, (self.view.d_in, self.view.d_out)
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


class Lookup(Product):
    """`gather` of rows by index."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        at, dims = self.at, self.tracked.dims
        numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
        cut = [i for i, axis in enumerate(dims) if sizes[i] != axes.size_of(axis)]
        (row,) = cut or numbers.start_index_map
        column = numbers.start_index_map.index(row)
        self.operand = jnp.asarray(at.values[1])[..., column : column + 1]
        labels = free_labels(self.operand.shape[:-1])
        kept = [i for i in range(len(dims)) if i not in numbers.collapsed_slice_dims]
        own = [() if i == row else dims[i] for i in kept]
        places = dict(zip(numbers.offset_dims, own, strict=True))
        rest = iter(labels)
        ndim = len(at.eqn.outvars[0].aval.shape)
        self.free = tuple(labels)
        self.out_dims = tuple(places[i] if i in places else (next(rest),) for i in range(ndim))

    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """Rows of a `[d_in, k]` matrix at the same indices, in the same mode: `[T, k]`.

        The base term alone says what an index out of range gives; a packed base comes as a matrix.
        """
        params = self.at.params
        width = matrix.shape[1]
        whole = self.tracked.value is None and width == self.view.d_out
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
            fill_value=params["fill_value"] if whole else 0,
        )
        return rows.reshape(math.prod(array.shape[:-1]), width)
