"""A Llama-family decoder in Flax NNX: one stacked block, scanned over its layers.

Letters: B batch, T time, S keys, D width, F feed-forward, H heads, K kv heads, d head size,
L layers, V vocabulary. Kernels are [d_in, d_out] and meet their input as `x @ kernel`.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.config import LlamaConfig
from lora_jax.models.layers import Embed, Linear, after, attend, stacked
from lora_jax.models.rope import rotate, rotations

Rotations: TypeAlias = tuple[jax.Array, jax.Array]
LayerCache: TypeAlias = tuple[jax.Array, jax.Array]
Layer: TypeAlias = Callable[[jax.Array, tuple[nnx.State, Any]], tuple[jax.Array, None]]
REMATS = ("none", "projections", "layers")

_PROJECTION = "projection"  # the name of outputs that remat="projections" keeps


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; every row writes the same slot next.

    Rows of different lengths are told apart by `valid`, so padding may stand on either side.
    """

    keys: jax.Array
    """[L, B, S, K, d]"""
    values: jax.Array
    """[L, B, S, K, d]"""
    valid: jax.Array
    """[B, S] bool: slots that hold a token"""
    lengths: jax.Array
    """[B] int32: tokens a row has seen, which is its next position"""
    slot: jax.Array
    """[] int32: the slot written next"""


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., D] -> [..., D], in x's dtype."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        unit = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return unit * jax.lax.broadcast(self.scale[...].astype(x.dtype), x.shape[:-1])


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` for T <= S and a causal mask, without most of what such a mask throws away.

    The last T keys are those of the queries. Queries go in up to four blocks, each against the keys
    up to its own end: at T = S, four take 5/8 of the products. At T = 256 on two CPU cores that is
    14 % of a whole training step.
    """
    time, before = q.shape[1], k.shape[1] - q.shape[1]
    blocks = min(4, max(1, time // 64))
    ends = [time * block // blocks for block in range(blocks + 1)]
    parts = [
        attend(
            q[:, start:end],
            k[:, : before + end],
            v[:, : before + end],
            mask[:, start:end, : before + end],
        )
        for start, end in pairwise(ends)
    ]
    return jnp.concatenate(parts, axis=1)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        outer = config.num_attention_heads * config.head_dim
        inner = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, outer, bias=bias, rngs=rngs)
        self.k_proj = Linear(width, inner, bias=bias, rngs=rngs)
        self.v_proj = Linear(width, inner, bias=bias, rngs=rngs)
        self.o_proj = Linear(outer, width, bias=bias, rngs=rngs)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def __call__(
        self,
        x: jax.Array,
        turns: Rotations,
        mask: jax.Array,
        past: LayerCache | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """`x` [B, T, D] -> output [B, T, D] and the keys and values attended to.

        With `past`, the new keys and values are first written into it from `slot` on; without a
        slot they come after it, and `past` is one [n, K, d] each for all rows.
        """
        q, k, v = (
            self._heads(checkpoint_name(project(x), _PROJECTION))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *turns), rotate(k, *turns)
        if past is not None and slot is None:
            k, v = (after(old, new) for old, new in zip(past, (k, v), strict=True))
        if past is None or slot is None:
            return self.o_proj(attend_causally(q, k, v, mask)), (k, v)
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)
            for old, new in zip(past, (k, v), strict=True)
        )
        return self.o_proj(attend(q, k, v, mask)), (k, v)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias, rngs=rngs)
        self.up_proj = Linear(width, inner, bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [B, T, D] -> [B, T, D]."""
        gate = checkpoint_name(self.gate_proj(x), _PROJECTION)
        up = checkpoint_name(self.up_proj(x), _PROJECTION)
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One decoder layer: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        turns: Rotations,
        mask: jax.Array,
        past: LayerCache | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """`x` [B, T, D] -> the next layer's x and this layer's keys and values."""
        attended, kept = self.attn(self.attn_norm(x), turns, mask, past, slot)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kept


def recomputed(layer: Layer, remat: str) -> Layer:
    """A scanned layer that keeps for its backward pass what `remat` says."""
    if remat == "none":
        return layer
    names = (_PROJECTION,) if remat == "projections" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    # Under a scan XLA cannot undo the recomputation, so its guard against that is left out.
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


class Llama(nnx.Module):
    """The decoder, computing in `dtype`; `remat` says what the backward pass finds kept.

    `none`: all intermediate values are kept; `layers`: each layer's input, the rest is computed
    again; `projections`: also what q, k, v, gate and up gave, so that no kernel is applied twice.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: str = "none",
    ) -> None:
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stacked(partial(Block, config), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        head = (config.hidden_size, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(*head, bias=False, rngs=rngs)

    def hidden(
        self, ids: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`ids` [B, T] -> the last layer's output after the final norm [B, T, D].

        `positions` [B, T] default to 0..T-1; `mask` [B, T] is True at tokens, False at padding,
        which no token attends to. Attention is always causal.
        """
        return self.trunk(self.embed(ids), positions, mask)

    def trunk(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        prefix: LayerCache | None = None,
    ) -> jax.Array:
        """The layers and the final norm over embedded inputs x [B, T, D]; as `hidden` otherwise.

        `prefix` are keys and values [L, n, K, d] that stand before x in every row, seen by all; the
        default positions then start at n.
        """
        time, before = x.shape[1], 0 if prefix is None else prefix[0].shape[1]
        positions = before + jnp.arange(time)[None, :] if positions is None else positions
        turns = rotations(self.config, positions)
        causal = jnp.tril(jnp.ones((time, time), bool))[None]
        seen = causal if mask is None else jnp.logical_and(causal, mask[:, None, :])
        seen = jnp.pad(seen, ((0, 0), (0, 0), (before, 0)), constant_values=True)
        graph, stack = nnx.split(self.layers)

        def layer(x: jax.Array, own: tuple[nnx.State, Any]) -> tuple[jax.Array, None]:
            weights, past = own
            return nnx.merge(graph, weights)(x, turns, seen, past)[0], None

        each = (stack, prefix)
        x, _ = jax.lax.scan(recomputed(layer, self.remat), x.astype(self.dtype), each)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden` [..., D] -> float32 scores of the next token [..., V]."""
        head = self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self, ids: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`ids` [B, T] -> float32 logits [B, T, V]; arguments as in `hidden`."""
        return self.logits(self.hidden(ids, positions, mask))

    def decode(
        self, ids: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Appends ids [B, T] to the cache -> logits [B, V] after each row's last token, cache.

        `mask` [B, T] is False at padding, on whichever side. The cache must have room for T more.
        """
        return self.advance(self.embed(ids), cache, mask)

    def advance(
        self, x: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """`decode` from embedded inputs x [B, T, D] on."""
        time = x.shape[1]
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
        turns = rotations(self.config, jnp.maximum(cache.lengths[:, None] + counts - 1, 0))
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, mask, cache.slot, axis=1)
        slots = jnp.arange(valid.shape[1])[None, :]
        causal = slots <= cache.slot + jnp.arange(time)[:, None]
        seen = jnp.logical_and(causal[None], valid[:, None, :])
        graph, stack = nnx.split(self.layers)

        def layer(
            x: jax.Array, weights_and_past: tuple[nnx.State, LayerCache]
        ) -> tuple[jax.Array, LayerCache]:
            weights, past = weights_and_past
            return nnx.merge(graph, weights)(x, turns, seen, past, cache.slot)

        start = x.astype(self.dtype)
        x, (keys, values) = jax.lax.scan(layer, start, (stack, (cache.keys, cache.values)))
        last = jnp.where(mask, jnp.arange(time)[None, :], 0).max(axis=1)
        final = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        moved = Cache(keys, values, valid, cache.lengths + counts[:, -1], cache.slot + time)
        return self.logits(self.norm(final)), moved
