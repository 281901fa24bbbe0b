"""The left operand of each kind of product in one canonical form, so that `x @ m` suits them all.

A method is written for `x: [T, d_in]` and matrices `m`. Each product brings its operand to that
form (free axes flattened to one: the backward pass of a product over `[B, T, D]` takes twice as
long on CPUs), multiplies it by any matrix in place of the kernel, and brings the method's result
back to the layout of the operation.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.tracing import axes
from lora_jax.tracing.axes import Atom, Dims, View
from lora_jax.tracing.tracked import Equation, Tracked

Single = Callable[[Any, Any, Any], jax.Array]  # riders, operand, base term -> result, one matrix
KEPT = "product"  # the name, for checkpoint policies, of products with a `kept` operand


class Operand:
    """What multiplies a kernel, as a method sees it: `x @ m` is the site's own contraction.

    `m` may be the kernel, `[d_in, d_out]`, or any matrix `[d_in, k]`, and is cast to `x.dtype`;
    the result is an ordinary array, `[T, d_out]` or `[T, k]`. `x @ w` with the frozen kernel itself
    is the model's own operation, bit for bit.
    """

    def __init__(
        self,
        product: Product,
        array: jax.Array,
        key: Any = None,
        known: tuple[Any, Any] = (None, None),
        name: str = "",
    ) -> None:
        self.dtype, self.linear = product.dtype, False
        self._product, self._array, self._key, self._known = product, array, key, known
        self._name = name

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        kernel, base = self._known
        if base is not None and matrix is kernel:
            return base
        y = self._product.multiply(self._array, matrix)
        return checkpoint_name(y, self._name) if self._name else y

    def kept(self) -> Operand:
        """The same, whose products a `jax.checkpoint` may keep, as it finds them by the name KEPT.

        Itself where it is about to be transposed: there is no transpose of a name.
        """
        if self.linear:
            return self
        return Operand(self._product, self._array, self._key, self._known, KEPT)

    def dropout(self, rate: float) -> Operand:
        """Entries dropped with probability `rate`, the others scaled by `1 / (1 - rate)`.

        Itself where the rate is zero, where no key is bound, and for rows looked up by index.
        """
        if rate == 0 or self._key is None or not jnp.issubdtype(self._array.dtype, jnp.inexact):
            return self
        keep = jax.random.bernoulli(self._key, 1 - rate, self._array.shape)
        dropped = jnp.where(keep, self._array / (1 - rate), 0).astype(self._array.dtype)
        return Operand(self._product, dropped, self._key, name=self._name)

    def mask(self, rate: float, shape: tuple[int, ...], draw: int = 0) -> jax.Array | None:
        """Ones, and zeros with probability `rate`, drawn once for all rows of a result.

        Every matrix of a stack has its own, and `draw` tells one mask of a method from another.
        None, to be left out, where the rate is zero and where no key is bound.
        """
        if rate == 0 or self._key is None:
            return None
        key = jax.random.fold_in(self._product.own(self._key), draw)
        return jax.random.bernoulli(key, 1 - rate, shape)

    @property
    def places(self) -> tuple[int, ...]:
        """The sizes of the axes that the T rows of a result run over, such as batch and time."""
        return tuple(atom.size for atom in self._product.free)

    def rows(self, vector: jax.Array) -> jax.Array:
        """A vector of the matrix as it meets each row of a result: `rows(c) * (x @ w)`.

        The vector itself, but for a ragged product `[T, k]`: every row's own expert's.
        """
        return self._product.rows(vector)

    def total(self, part: jax.Array) -> jax.Array:
        """A sum over the kernel's input axis, where devices inside a `shard_map` hold parts of it.

        A method that sums over `d_in` itself (a norm of columns) passes such sums through here.
        """
        names = self._product.spread
        return jax.lax.psum(part, names) if names else part


class Product(abc.ABC):
    """A product with a kernel, taken apart: its operand, how to multiply, where the result goes.

    `view` reads the kernel in the direction of this use. `operand` is canonical,
    `[*stack, T, d_in]` (or what the operation has: an image, indices); `multiply` works on one
    matrix of the stack. `spread` are the mesh axes over which devices hold parts of `d_in`.
    """

    def __init__(
        self, at: Equation, position: int, tracked: Tracked, view: View, spread: Sequence[str] = ()
    ) -> None:
        self.at, self.position, self.tracked, self.view = at, position, tracked, view
        self.spread = tuple(spread)
        self.dtype = at.eqn.invars[position].aval.dtype
        self.out_dtype = at.eqn.outvars[0].aval.dtype
        self.stack = tuple(atom.size for atom in tracked.stack or ())
        self.stack_dims: Dims = tuple((atom,) for atom in tracked.stack or ())
        self.free: tuple[Atom, ...] = ()
        self.operand: jax.Array
        self.out_dims: Dims

    @abc.abstractmethod
    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """`array @ matrix` for any matrix `[d_in, k]`: `[T, k]`."""

    def base(self) -> jax.Array:
        """The model's own operation on the frozen kernel, `[*stack, T, d_out]`."""
        (out,) = self.at.plain()
        return self.canonical(out)

    def canonical(self, out: jax.Array) -> jax.Array:
        """The operation's output as `[*stack, T, d_out]`."""
        return axes.regroup(out, self.out_dims, (*self.stack_dims, self.free, self.view.outs))

    def result(self, y: jax.Array) -> jax.Array:
        """The method's result `[*stack, T, d_out]` as the operation's own output."""
        y = y.astype(self.out_dtype)
        return axes.regroup(y, (*self.stack_dims, self.free, self.view.outs), self.out_dims)

    def over_stack(self, single: Single, riders: Any, base: Any) -> jax.Array:
        """`single` over the stack axes of riders, operand and base term."""
        return lifted(single, self.stack)(riders, self.operand, base)

    def rows(self, vector: jax.Array) -> jax.Array:
        """A vector of the matrix as it meets each row of a result."""
        return vector

    def own(self, key: jax.Array) -> jax.Array:
        """The key of one matrix of the stack."""
        return key

    def transposed(self, apply: Callable[[Operand], jax.Array], array: jax.Array) -> jax.Array:
        """`array @ w'.T`: the transpose of a method's `apply(x) = x @ w'`, which is linear in x."""

        def forward(z: jax.Array) -> jax.Array:
            operand = Operand(self, z)
            operand.dtype, operand.linear = z.dtype, True
            return apply(operand).astype(array.dtype)

        array = array.astype(self.out_dtype)  # so that logits keep what they accumulate in
        z = jax.ShapeDtypeStruct((array.shape[0], self.view.d_out), array.dtype)
        return jax.linear_transpose(forward, z)(array)[0]


def lifted(function: Callable[..., Any], stack: Sequence[int]) -> Callable[..., Any]:
    """A function on single matrices, over leading stack axes of these sizes.

    An array with an axis of size one there is shared by all matrices along it.
    """
    if not stack:
        return function
    inner, size = lifted(function, stack[1:]), stack[0]

    def over(*args: Any) -> Any:
        where = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, args)
        args = jax.tree.map(lambda x: x if x.shape[0] == size else x[0], args)
        return jax.vmap(inner, in_axes=where, axis_size=size)(*args)

    return over


def free_labels(shape: Sequence[int]) -> list[Atom]:
    """Names for axes that the kernel knows nothing of: atoms of negative axes."""
    return [Atom(-1 - i, 1, size) for i, size in enumerate(shape)]
