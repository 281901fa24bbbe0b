"""Products in which every run of rows has its own matrix: experts after the tokens were sorted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lora_jax.operands.product import Product, Single, free_labels
from lora_jax.tracing import axes


class Ragged(Product):
    """`ragged_dot`: rows `[T, d_in]`, matrices `[experts, d_in, d_out]`, rows of each expert.

    A method's code for one matrix runs under `vmap` over the experts, in which `x @ m` with the
    experts' matrices is again one ragged product, so `(x @ a) @ b` costs `2 T r (d_in + d_out)`
    FLOPs where the hardware has ragged products. (XLA's CPU backend computes every expert on every
    row and masks, for the base as for the factors.) Rows of no expert give zero, as in the base.

    `which` is the expert's number under that `vmap`. It goes into every function that has a rule of
    its own for `vmap`, so that the rule runs also where all else is shared: left to JAX, a function
    with such a rule cannot be differentiated.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        numbers = self.at.params["ragged_dot_dimension_numbers"]
        ((contracted,), _), _ = numbers.dot_dimension_numbers
        self.operand = jnp.moveaxis(jnp.asarray(self.at.values[0]), contracted, -1)
        self.sizes = jnp.asarray(self.at.values[2])
        self.which = jnp.zeros((), jnp.int32)
        self.free = tuple(free_labels(self.operand.shape[:1]))
        self.out_dims = (self.free, self.view.outs)
        names = ("precision", "preferred_element_type")
        self.product = ragged(**{name: self.at.params[name] for name in names})

    def base(self) -> jax.Array:
        """The operation on the frozen kernel, which also runs under a `vmap` from outside."""
        kernel = self.tracked.read()
        target = (*self.stack_dims, self.view.ins, self.view.outs)
        kernel = axes.regroup(kernel, self.tracked.dims, target)
        return self.product(self.operand, kernel, self.sizes)

    def result(self, y: jax.Array) -> jax.Array:
        """The rows, which belong to all experts together, as the operation's output."""
        return y.astype(self.out_dtype)

    def over_stack(self, single: Single, riders: Any, base: Any) -> jax.Array:
        """`single` for all experts at once, each row its own expert's."""
        (size,) = self.stack

        def expert(riders: Any, which: jax.Array) -> jax.Array:
            self.which = which
            return _own(single(riders, self.operand, base), self.sizes, which)

        if "key" in riders and riders["key"] is not None:
            riders = {**riders, "key": riders["key"][:1]}
        where = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, riders)
        riders = jax.tree.map(lambda x: x if x.shape[0] == size else x[0], riders)
        mapped = jax.vmap(expert, in_axes=(where, 0), out_axes=None, axis_size=size)
        return mapped(riders, jnp.arange(size))

    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """The rows of each expert times its own matrix."""

        @custom_vmap
        def product(x: jax.Array, m: jax.Array, sizes: jax.Array, which: jax.Array) -> jax.Array:
            return x @ m

        @product.def_vmap
        def experts(size: int, batched: Any, x: Any, m: Any, sizes: Any, which: Any) -> Any:
            x = _choose(x, sizes) if batched[0] else x
            return (self.product(x, m, sizes) if batched[1] else x @ m), False

        return product(array, matrix.astype(array.dtype), self.sizes, self.which)

    def rows(self, vector: jax.Array) -> jax.Array:
        """Every row's own expert's vector, `[T, k]`."""
        return _rows(vector, self.sizes, self.which, self.operand.shape[0])

    def own(self, key: jax.Array) -> jax.Array:
        """The expert's key, of one that belongs to all rows together."""
        return jax.random.fold_in(key, self.which)


def ragged(**options: Any) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`ragged_dot(x, m, sizes)` that may stand under `vmap`, also with only some arguments mapped.

    JAX (0.10 to 0.12) maps the operation only when every argument is; here those that are not are
    repeated. The FLOPs are those of the single products.
    """

    def plain(x: jax.Array, m: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, m, sizes, **options)

    def pulled(x: jax.Array, m: jax.Array, sizes: jax.Array, y: jax.Array) -> Any:
        return jax.vjp(lambda x, m: plain(x, m, sizes), x, m)[1](y)

    forward, backward = _mapped(plain), _mapped(pulled)

    @jax.custom_vjp
    def call(x: jax.Array, m: jax.Array, sizes: jax.Array) -> jax.Array:
        return forward(x, m, sizes)

    call.defvjp(
        lambda x, m, sizes: (forward(x, m, sizes), (x, m, sizes)),
        lambda saved, y: (*backward(*saved, y), None),
    )
    return call


def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under `vmap` as the function of arguments that are all mapped."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> Any:
        full = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(args, batched, strict=True)
        ]
        outs = jax.vmap(function)(*full)
        return outs, jax.tree.map(lambda _: True, outs)

    return mapped


def _expert_of(sizes: jax.Array, rows: int) -> jax.Array:
    """The expert of every row, `[T]`; rows beyond the last group count to the last expert."""
    ends = jnp.cumsum(sizes)
    found = jnp.searchsorted(ends, jnp.arange(rows), side="right")
    return jnp.minimum(found, len(sizes) - 1)


def _choose(stacked: jax.Array, sizes: jax.Array) -> jax.Array:
    """Of `[experts, T, k]` every row's own expert's: `[T, k]`."""
    rows = stacked.shape[1]
    return stacked[_expert_of(sizes, rows), jnp.arange(rows)]


@custom_vmap
def _own(y: jax.Array, sizes: jax.Array, which: jax.Array) -> jax.Array:
    return y


@_own.def_vmap
def _own_rows(size: int, batched: Any, y: jax.Array, sizes: jax.Array, which: Any) -> Any:
    return (_choose(y, sizes) if batched[0] else y), False


def _rows(vector: jax.Array, sizes: jax.Array, which: jax.Array, rows: int) -> jax.Array:
    @custom_vmap
    def spread(vector: jax.Array, sizes: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.broadcast_to(vector, (rows, *vector.shape))

    @spread.def_vmap
    def own(size: int, batched: Any, vector: jax.Array, sizes: jax.Array, which: Any) -> Any:
        if not batched[0]:
            return jnp.broadcast_to(vector, (rows, *vector.shape)), False
        return vector[_expert_of(sizes, rows)], False

    return spread(vector, sizes, which)
