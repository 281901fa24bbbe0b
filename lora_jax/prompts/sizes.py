"""What virtual tokens must know of a model: how wide it is, how many layers and heads it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.models import LlamaConfig, Model, Network
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.vit import ViTConfig


class Sizes(NamedTuple):
    """The sizes of virtual tokens in a model."""

    width: int
    """D, of embeddings."""
    layers: int
    heads: int
    """K, of keys and values."""
    head_dim: int
    vocabulary: int | None
    """How many tokens it knows; None where it reads images."""
    spread: float
    """Random embeddings start between this and its negative."""


def sizes_of(model: Model | Network) -> Sizes:
    """The sizes of a Llama, a BERT or a ViT; InputError for other models."""
    config = model.config
    if isinstance(config, LlamaConfig):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        return Sizes(config.hidden_size, layers, heads, config.head_dim, config.vocab_size, 0.5)
    if not isinstance(config, BertConfig | ViTConfig):
        raise InputError(
            "virtual tokens stand beside those of a Llama, a BERT or a ViT, and this model is a "
            f"network of {type(config).__name__}; train an adapter instead"
        )
    width, heads = config.hidden_size, config.num_attention_heads
    vocabulary, spread = None, 0.5
    if isinstance(config, BertConfig):
        vocabulary = config.vocab_size
    else:
        spread = (6 / (3 * config.patch_size**2 + width)) ** 0.5
    return Sizes(width, config.num_hidden_layers, heads, width // heads, vocabulary, spread)


def embed(model: Model | Network, ids: jax.Array) -> jax.Array:
    """The rows [n, D] of a text model's embedding for token ids [n]."""
    if isinstance(model, Model):
        return model.embed(model.params, ids[None])[0]
    return jnp.take(model.params["embed"]["word"]["embedding"], ids, axis=0)


def keys_and_values(prompt: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """`prompt` [n, 2 L K d] -> keys and values of every layer, [L, n, K, d]."""
    pairs = prompt.reshape(len(prompt), sizes.layers, 2, sizes.heads, sizes.head_dim)
    keys, values = jnp.transpose(pairs, (2, 1, 0, 3, 4))
    return keys, values


def without_prompt(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model without virtual tokens."""
    return {name: value for name, value in params.items() if name != "prompt"}
