"""Layers that the models share, in Flax NNX.

Letters: B batch, T time, S keys, D width, F feed-forward, H heads, K kv heads, d head size,
L layers, V vocabulary. Kernels are [d_in, d_out] and meet their input as `x @ kernel`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models.virtual import each_row

LayerPrefix: TypeAlias = tuple[jax.Array, jax.Array]
Block = TypeVar("Block", bound=nnx.Module, covariant=True)

_normal = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), in the dtype of x; kernel [d_in, d_out]."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_normal(rngs.params(), (d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., d_in] -> [..., d_out]."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is None:
            return y
        return y + jax.lax.broadcast(self.bias[...].astype(x.dtype), y.shape[:-1])


class Embed(nnx.Module):
    """A table of token vectors [V, D]."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(_normal(rngs.params(), (vocab, width), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` [B, T] -> rows [B, T, D], in the table's dtype."""
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32 (Ba et al. 2016, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., D] -> [..., D], in x's dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        unit = (centred * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        scale, bias = (
            jax.lax.broadcast(value[...].astype(x.dtype), x.shape[:-1])
            for value in (self.scale, self.bias)
        )
        return unit * scale + bias


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention with grouped heads: head h reads kv head h // (H/K).

    q [B, T, H, d], k and v [B, S, K, d], mask [B or 1, T or 1, S] (True: may look; none: all may)
    -> [B, T, H * d]. Scores and softmax are float32. A query that may look nowhere (padding) gets
    the plain mean.
    """
    batch, time, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, time, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * size**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, time, heads * size)


def after(old: jax.Array, new: jax.Array) -> jax.Array:
    """Keys (or values) `new` [B, T, K, d] behind those `old` [n, K, d] that all rows have first."""
    return jnp.concatenate([each_row(old.astype(new.dtype), len(new)), new], axis=1)


class SelfAttention(nnx.Module):
    """Multi-head self-attention without positions of its own; every projection has a bias."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.q_proj = Linear(width, width, bias=True, rngs=rngs)
        self.k_proj = Linear(width, width, bias=True, rngs=rngs)
        self.v_proj = Linear(width, width, bias=True, rngs=rngs)
        self.o_proj = Linear(width, width, bias=True, rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, prefix: LayerPrefix | None = None
    ) -> jax.Array:
        """`x` [B, T, D] -> [B, T, D]; `mask` as in `attend`, `prefix` [n, H, d] each first."""
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if prefix is not None:
            k, v = (after(old, new) for old, new in zip(prefix, (k, v), strict=True))
        return self.o_proj(attend(q, k, v, mask))


class FeedForward(nnx.Module):
    """down(activation(up(x))), both with biases."""

    def __init__(
        self,
        width: int,
        inner: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.up_proj = Linear(width, inner, bias=True, rngs=rngs)
        self.down_proj = Linear(inner, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., D] -> [..., D]."""
        return self.down_proj(self.activation(self.up_proj(x)))


class Build(Protocol[Block]):
    """Makes one layer with the random streams it is given."""

    def __call__(self, *, rngs: nnx.Rngs) -> Block:
        """One fresh layer."""
        ...


def stacked(build: Build[Block], depth: int, rngs: nnx.Rngs) -> Block:
    """One layer whose parameters carry a leading axis [L]: `depth` fresh layers in one."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0, axis_size=depth)
    def layers(rngs: nnx.Rngs) -> Block:
        return build(rngs=rngs)

    return layers(rngs)


def scan(layers: nnx.Module, x: jax.Array, *beside: jax.Array | None, own: Any) -> jax.Array:
    """Sends x through every layer of a stack, one after another: x = layer(x, *beside, own[l]).

    `own` is a tree whose arrays [L, ...] are split among the layers, or None.
    """
    graph, stack = nnx.split(layers)

    def layer(x: jax.Array, each: tuple[nnx.State, Any]) -> tuple[jax.Array, None]:
        weights, own = each
        return nnx.merge(graph, weights)(x, *beside, own), None

    return jax.lax.scan(layer, x, (stack, own))[0]
