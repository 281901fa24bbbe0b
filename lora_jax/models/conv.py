"""Convolution and batch normalisation in Flax NNX, channels last.

Letters: B batch, H height, W width, C channels; kernels are [kh, kw, c_in / groups, c_out].
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Padding: TypeAlias = Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]]

# He et al. 2015, eq. 10, by the outputs that one input reaches (Tan and Le 2019's code).
_initial = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv2d(nnx.Module):
    """y[h, w] = sum over i, j of x[s h + i, s w + j] @ kernel[i, j] (+ bias), in the dtype of x.

    `padding` is "SAME" (TensorFlow's: ceil(H / stride) rows, the odd zero below and to the right),
    "VALID" (none), zeros on every side, or (before, after) for rows and for columns. `groups` that
    equal `c_in` make it depthwise: every channel has filters of its own.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: Padding = "SAME",
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (size, size, c_in // groups, c_out)
        self.kernel = nnx.Param(_initial(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32)) if bias else None
        self.stride, self.groups = stride, groups
        self.padding = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [B, H, W, c_in] -> [B, H', W', c_out]."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        if self.bias is None:
            return y
        return y + jax.lax.broadcast(self.bias[...].astype(x.dtype), y.shape[:-1])


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias for every channel (Ioffe and Szegedy 2015).

    At inference `mean` and `var` are the stored ones (Algorithm 2, line 11). In training they are
    the batch's own, over all axes but the last, and the stored ones move towards them: old + rate *
    (new - old), where the variance counts n - 1 numbers (line 10). All of it in float32.
    """

    def __init__(self, width: int, eps: float = 1e-3, rate: float = 0.01) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))
        self.eps, self.rate = eps, rate

    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        """`x` [..., C] -> [..., C], in x's dtype."""
        wide = x.astype(jnp.float32)
        mean, var = self._observe(wide) if training else (self.mean[...], self.var[...])
        factor = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        shift = self.bias[...] - mean * factor
        factor, shift = (jax.lax.broadcast(value, x.shape[:-1]) for value in (factor, shift))
        return (wide * factor + shift).astype(x.dtype)

    def _observe(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The batch's mean and variance, after moving the stored ones."""
        axes = tuple(range(x.ndim - 1))
        mean, var = jnp.mean(x, axes), jnp.var(x, axes)
        count = x.size // x.shape[-1]
        unbiased = var * (count / max(count - 1, 1))
        self.mean[...] += self.rate * (mean - self.mean[...])
        self.var[...] += self.rate * (unbiased - self.var[...])
        return mean, var
