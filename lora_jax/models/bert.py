"""BERT, RoBERTa and MiniLM encoders in Flax NNX: one stacked block, scanned over its layers.

Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Wang et al. 2020 (MiniLM). Letters: B batch,
T time, D width, L layers, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.bert_config import GELUS, BertConfig
from lora_jax.models.layers import (
    Embed,
    FeedForward,
    LayerNorm,
    LayerPrefix,
    Linear,
    SelfAttention,
    scan,
    stacked,
)
from lora_jax.models.network import Network
from lora_jax.models.virtual import NONE, Virtual, each_row

if TYPE_CHECKING:
    from lora_jax.io.sources import Source
    from lora_jax.io.tokenizer import Tokenizer

POOLINGS = ("mean", "cls", "pooler")


class Embeddings(nnx.Module):
    """norm(word[id] + position[place] + type[segment])."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.config = config
        self.word = Embed(config.vocab_size, width, rngs=rngs)
        self.position = Embed(config.max_position_embeddings, width, rngs=rngs)
        self.type = Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(
        self, ids: jax.Array, types: jax.Array | None = None, virtual: Virtual = NONE
    ) -> jax.Array:
        """`ids` and `types` [B, T] (default: all 0) -> [B, T, D], or with tokens [B, n + T, D].

        Virtual tokens stand where word embeddings do, of type 0. All of them take up positions.
        """
        types = jnp.zeros_like(ids) if types is None else types
        words, places = self.word(ids), self._places(ids, virtual.length)
        if virtual.tokens is not None:
            n, batch = virtual.length, len(ids)
            words = jnp.concatenate([each_row(virtual.tokens, batch), words], axis=1)
            first = jnp.broadcast_to(jnp.arange(n)[None] + self._first, (len(places), n))
            places = jnp.concatenate([first, places], axis=1)
            types = jnp.pad(types, ((0, 0), (n, 0)))
        return self.norm(words + self.position(places) + self.type(types))

    @property
    def _first(self) -> int:
        """The position of a first token."""
        return self.config.pad_token_id + 1 if self.config.counts_from_pad else 0

    def _places(self, ids: jax.Array, before: int) -> jax.Array:
        if not self.config.counts_from_pad:
            return before + jnp.arange(ids.shape[1])[None, :]
        tokens = ids != self.config.pad_token_id
        return (before + jnp.cumsum(tokens, axis=1)) * tokens + self.config.pad_token_id


class EncoderLayer(nnx.Module):
    """x = norm(x + attn(x)), then norm(x + mlp(x)): the norms come after the sums."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        gelu = partial(jax.nn.gelu, approximate=GELUS[config.hidden_act])
        self.attn = SelfAttention(width, config.num_attention_heads, rngs=rngs)
        self.attn_norm = LayerNorm(width, eps)
        self.mlp = FeedForward(width, config.intermediate_size, gelu, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, prefix: LayerPrefix | None
    ) -> jax.Array:
        """`x` [B, T, D], `mask` [B, 1, n + T] and `prefix` [n, H, d] each -> [B, T, D]."""
        x = self.attn_norm(x + self.attn(x, mask, prefix))
        return self.mlp_norm(x + self.mlp(x))


class Bert(nnx.Module):
    """The encoder; `pooler` adds the dense layer that pretraining put on the first token."""

    def __init__(self, config: BertConfig, *, pooler: bool = False, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.embed = Embeddings(config, rngs=rngs)
        self.layers = stacked(partial(EncoderLayer, config), config.num_hidden_layers, rngs)
        self.pooler = Linear(width, width, bias=True, rngs=rngs) if pooler else None

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        virtual: Virtual = NONE,
    ) -> jax.Array:
        """`ids`, `mask` (True at tokens) and `types` [B, T] -> hidden states [B, T, D].

        Those of virtual tokens come before them: [B, n + T, D].
        """
        seen = None if mask is None else behind(mask, virtual.length)[:, None, :]
        x = self.embed(ids, types, virtual)
        return scan(self.layers, x, seen, own=virtual.keys_values)

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """`hidden` [B, T, D] -> tanh(first token @ kernel + bias) [B, D]."""
        if self.pooler is None:
            raise InputError("this BERT has no pooler; load it with pooling='pooler'")
        return jnp.tanh(self.pooler(hidden[:, 0]))


def masked_mean(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean of the hidden states [B, T, D] over tokens (mask [B, T] true) -> [B, D]."""
    if mask is None:
        return jnp.mean(hidden, axis=1)
    weights = mask.astype(hidden.dtype)[:, :, None]
    return jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


def behind(mask: jax.Array, n: int) -> jax.Array:
    """A mask [B, T] behind n tokens that are all there: [B, n + T].

    >>> behind(jnp.array([[True, False]]), 1).tolist()
    [[True, True, False]]
    """
    return jnp.pad(mask.astype(bool), ((0, 0), (n, 0)), constant_values=True)


def as_network(
    config: BertConfig,
    params: dict[str, Any],
    pooling: str = "mean",
    source: "Source | None" = None,
    tokenizer: "Tokenizer | None" = None,
) -> Network:
    """Pure functions over BERT's parameters.

    `apply(params, ids, mask=None, types=None)` gives hidden states [B, T, D]; `mask` is True at
    tokens (default: everywhere), `types` are segment numbers (default: 0). `features`, of the same
    inputs, pools them to [B, D]: the "mean" over tokens, the first token ("cls"), or the tanh
    layer over the first token ("pooler"). Both take `virtual` tokens (`lora_jax.prompts`) before
    the text: embeddings of theirs are pooled as tokens, and left out of the hidden states.
    """
    graph = nnx.graphdef(_abstract(config, pooling))

    def whole(params: Mapping[str, Any], ids: Any, mask: Any, types: Any, virtual: Virtual) -> Any:
        _check_inputs(config, ids, mask, types, virtual.length)
        return nnx.merge(graph, params)(ids, mask, types, virtual)

    def apply(
        params: Mapping[str, Any],
        ids: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        virtual: Virtual = NONE,
    ) -> jax.Array:
        hidden = whole(params, ids, mask, types, virtual)
        return hidden[:, hidden.shape[1] - ids.shape[1] :]

    def features(
        params: Mapping[str, Any],
        ids: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        virtual: Virtual = NONE,
    ) -> jax.Array:
        hidden = whole(params, ids, mask, types, virtual)
        if pooling == "pooler":
            return nnx.merge(graph, params).pooled(hidden)
        if pooling == "cls":
            return hidden[:, 0]
        before = hidden.shape[1] - ids.shape[1]
        return masked_mean(hidden, None if mask is None else behind(mask, before))

    shape = (2, min(8, config.context))
    inputs = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_))
    return Network(apply, params, config, source, tokenizer, features=features, inputs=inputs)


def initialise_bert(config: BertConfig, key: jax.Array, pooling: str = "mean") -> Network:
    """A BERT with fresh weights: normal of deviation 0.02, norms one, biases zero.

    >>> config = BertConfig(48, 12, 20, 2, 3)
    >>> network = initialise_bert(config, jax.random.key(0))
    >>> network.features(network.params, jnp.zeros((2, 5), int)).shape
    (2, 12)
    """
    pooler = _has_pooler(pooling)

    def fresh(key: jax.Array) -> dict[str, Any]:
        module = Bert(config, pooler=pooler, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return as_network(config, jax.jit(fresh)(key), pooling)


def param_shapes(config: BertConfig, pooling: str = "mean") -> dict[str, Any]:
    """The parameter tree of a BERT, with ShapeDtypeStructs (float32) as leaves."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, pooling), nnx.Param))


def sentence_embedding(features: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Make `embed(params, *inputs)`: features of length one [B, D], so that cosines are products.

    x / max(||x||, 1e-12) (Reimers and Gurevych 2019 compare sentences so).
    """

    def embed(params: Any, *inputs: Any) -> jax.Array:
        x = features(params, *inputs)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return embed


def _abstract(config: BertConfig, pooling: str) -> Bert:
    pooler = _has_pooler(pooling)
    return nnx.eval_shape(lambda: Bert(config, pooler=pooler, rngs=nnx.Rngs(0)))


def _has_pooler(pooling: str) -> bool:
    if pooling not in POOLINGS:
        raise InputError(f"pooling={pooling!r} is unknown; give one of {', '.join(POOLINGS)}")
    return pooling == "pooler"


def _check_inputs(config: BertConfig, ids: Any, mask: Any, types: Any, before: int) -> None:
    if len(ids.shape) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(
            f"BERT reads token ids [B, T] of an integer type, got {list(ids.shape)} {ids.dtype}"
        )
    length = before + ids.shape[1]
    if length > config.context:
        raise InputError(
            f"{length} tokens are longer than the model's context of {config.context}; "
            "shorten the text"
        )
    for name, value in (("mask", mask), ("types", types)):
        if value is not None and value.shape != ids.shape:
            raise InputError(f"{name} {list(value.shape)} must have the shape of ids {ids.shape}")
