"""Small models in the styles that a method meets: one of each kind of product, stacks and modules.

Input and output widths are multiples of four and differ, so that methods in blocks fit too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lora_jax.frameworks import from_linen, from_nnx
from lora_jax.testing.case import Case, Draw

Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def dense(key: jax.Array) -> Built:
    """A perceptron; its second kernel is stored output first."""
    draw = Draw(key)
    params = {"up": draw.kernel(8, 12), "down": draw.kernel(4, 12), "bias": draw.array(12)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["up"] + params["bias"][None, None]) @ params["down"].T

    return apply, params, (draw.array(2, 3, 8),)


def heads(key: jax.Array) -> Built:
    """Attention with three-dimensional kernels."""
    draw = Draw(key)
    params = {"q": draw.kernel(8, 3, 4), "v": draw.kernel(8, 3, 4), "out": draw.kernel(3, 4, 8)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        q, v = (jnp.einsum("btd,dhk->bhtk", x, params[name]) for name in ("q", "v"))
        scores = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, q))
        return jnp.einsum("bhts,bhsk,hkd->btd", scores, v, params["out"])

    return apply, params, (draw.array(2, 5, 8),)


def scanned(key: jax.Array) -> Built:
    """Layers stacked and scanned, each recomputed in the backward pass."""
    draw = Draw(key)
    params = {"up": draw.kernel(3, 8, 12), "down": draw.kernel(3, 12, 8)}

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer), x, params)[0]

    return apply, params, (draw.array(2, 5, 8),)


def convolution(key: jax.Array) -> Built:
    """A strided convolution and one in two groups."""
    draw = Draw(key)
    params = {"first": draw.kernel(3, 2, 4, 8), "second": draw.kernel(2, 2, 4, 16)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layout: Any = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        x = jax.lax.conv_general_dilated(x, params["first"], (2, 1), "SAME", **layout)
        return jax.lax.conv_general_dilated(
            jnp.tanh(x), params["second"], (1, 1), "VALID", feature_group_count=2, **layout
        )

    return apply, params, (draw.array(2, 6, 5, 4),)


def embedding(key: jax.Array) -> Built:
    """A table that is looked up, and a kernel."""
    draw = Draw(key)
    params = {"table": draw.array(16, 8), "kernel": draw.kernel(8, 12)}

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.take(params["table"], ids, axis=0) @ params["kernel"]

    return apply, params, (draw.ids(16, 2, 5),)


def tied(key: jax.Array) -> Built:
    """A table that is looked up, and used again as the output head."""
    draw = Draw(key)
    params = {"table": draw.array(16, 8), "kernel": draw.kernel(8, 8)}

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        hidden = jnp.tanh(jnp.take(params["table"], ids, axis=0) @ params["kernel"])
        return hidden @ params["table"].T

    return apply, params, (draw.ids(16, 2, 5),)


def experts(key: jax.Array) -> Built:
    """Two kernels of three experts, one by einsum and one by a ragged product."""
    draw = Draw(key)
    params = {"up": draw.kernel(3, 8, 12), "down": draw.kernel(3, 12, 4)}

    def apply(params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        h = jnp.einsum("etd,edf->etf", x, params["up"])
        return jax.lax.ragged_dot(jnp.tanh(h).reshape(-1, 12), params["down"], sizes)

    return apply, params, (draw.array(3, 5, 8), jnp.array([4, 0, 11]))


class _Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(4)(linen.relu(linen.Dense(12)(x)))


def nnx_module(key: jax.Array) -> Built:
    """A Flax NNX module."""
    apply, params = from_nnx(_Nnx(nnx.Rngs(0)))
    return apply, params, (Draw(key).array(2, 8),)


def linen_module(key: jax.Array) -> Built:
    """A Flax Linen module."""
    draw = Draw(key)
    module, x = _Linen(), draw.array(2, 8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return *from_linen(module, draw.fill(shapes)), (x,)


MODELS = (
    Case("dense", dense),
    Case("heads", heads),
    Case("scanned", scanned),
    Case("convolution", convolution),
    Case("embedding", embedding),
    Case("tied", tied, transposed=True),
    Case("experts", experts, mapped=False),
    Case("nnx", nnx_module),
    Case("linen", linen_module),
)
