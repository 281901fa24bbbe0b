"""Convolutions in one to three dimensions, with strides, padding, dilation and groups."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.operands.product import Product, free_labels
from lora_jax.tracing import axes
from lora_jax.tracing.axes import Atom

_WIDTH = -1_000  # the axis of a factor's own columns, apart from all labels


class Convolution(Product):
    """`conv_general_dilated`: `x @ m` convolves with `m` as a kernel of `k` output channels.

    The kernel's window and input channels are `d_in`; of a `[kh, kw, c_in, c_out]` kernel LoRA's
    `a` is a `[kh, kw, c_in, r]` one with the same strides, padding and dilation, and `b` acts on
    every output position. Groups are a stack: each convolves its own channels.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        at, tracked = self.at, self.tracked
        self.numbers = at.params["dimension_numbers"]
        self.out_shape = at.eqn.outvars[0].aval.shape
        x = jnp.asarray(at.values[0])
        if self.stack:
            feature = self.numbers.lhs_spec[1]
            groups = self.stack[0]
            x = x.reshape(*x.shape[:feature], groups, -1, *x.shape[feature + 1 :])
            x = jnp.moveaxis(x, feature, 0)
        self.operand = x
        labels = free_labels(self.out_shape)
        places = self.numbers.out_spec[1]
        self.free = tuple(label for i, label in enumerate(labels) if i != places)
        out = (*(tracked.stack or ()), *self.view.outs)
        self.out_dims = tuple((label,) for label in labels)
        self.out_dims = (*self.out_dims[:places], out, *self.out_dims[places + 1 :])

    def multiply(self, array: jax.Array, matrix: jax.Array) -> jax.Array:
        """The operation itself, with a kernel of as many output channels as the matrix is wide."""
        params, tracked = self.at.params, self.tracked
        column = (Atom(_WIDTH, 1, matrix.shape[1]),)
        place = self.numbers.rhs_spec[0]
        dims = tuple(column if i == place else axis for i, axis in enumerate(tracked.dims))
        kernel = axes.regroup(matrix, (self.view.ins, column), dims)
        backwards = [i for i, axis in enumerate(dims) if tracked.flips & set(axis)]
        kernel = jax.lax.rev(kernel, backwards) if backwards else kernel
        if matrix.shape[1] == self.view.d_out:
            kernel = functools.reduce(jnp.astype, tracked.casts, kernel)
        out = jax.lax.conv_general_dilated(
            array,
            kernel.astype(array.dtype),
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=self.numbers,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        return jnp.moveaxis(out, self.numbers.out_spec[1], -1).reshape(-1, matrix.shape[1])
