"""A Llama that reads virtual tokens before its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import LlamaConfig, Model

Encode = Callable[[Mapping[str, Any]], jax.Array]


@dataclass(frozen=True, eq=False)
class Prompted:
    """A model that reads `length` virtual tokens before each row; used like `Model`.

    `encode(params["prompt"])` gives them: embeddings [n, D], or with `keys_values` what every layer
    attends to, [n, 2 L K d]: layer after layer, its keys before its values. They have the positions
    0 .. n - 1, the text those from n on; outputs are for the text alone, so that losses ignore the
    virtual tokens. A mask or positions that a caller gives are those of the text.
    """

    model: Model
    params: dict[str, Any]
    length: int
    encode: Encode
    keys_values: bool

    @property
    def config(self) -> LlamaConfig:
        """The model's, with the context that is left for the text."""
        context = self.model.config.max_position_embeddings - self.length
        return replace(self.model.config, max_position_embeddings=context)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    @property
    def source(self) -> Any:
        """The model's."""
        return self.model.source

    def apply(
        self,
        params: Mapping[str, Any],
        ids: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`ids` [B, T] -> float32 logits [B, T, V]; `mask` [B, T] is False at padding."""
        return self.logits(params, self.hidden(params, ids, positions, mask))

    def hidden(
        self,
        params: Mapping[str, Any],
        ids: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`ids` [B, T] -> what the output head reads [B, T, D]."""
        base, prompt = _base(params), self.encode(params["prompt"])
        x, n = self.model.embed(base, ids), self.length
        positions = None if positions is None else n + positions
        if self.keys_values:
            prefix = self._layers(prompt)
            return self.model.trunk(base, x, positions, mask, prefix)
        x = jnp.concatenate([_rows(prompt, len(ids)), x.astype(_wide(x))], axis=1)
        if positions is not None:
            places = jnp.broadcast_to(jnp.arange(n)[None], (len(positions), n))
            positions = jnp.concatenate([places, positions], axis=1)
        if mask is not None:
            mask = jnp.concatenate([jnp.ones((len(ids), n), bool), mask], axis=1)
        return self.model.trunk(base, x, positions, mask)[:, n:]

    def logits(self, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
        """`hidden` [..., D] -> float32 logits [..., V]."""
        return self.model.logits(_base(params), hidden)

    def decode(
        self, params: Mapping[str, Any], ids: jax.Array, cache: Any, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """As `Model.decode`, for `generate`; a fresh cache gets the virtual tokens first."""
        if self.length:
            cache = jax.lax.cond(cache.slot == 0, lambda: self._begun(params, cache), lambda: cache)
        return self.model.decode(_base(params), ids, cache, mask)

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for `batch` rows of at most `length` tokens beside the virtual ones."""
        return self.model.init_cache(batch, self.length + length)

    def exported(self, params: Mapping[str, Any]) -> Prompted:
        """What stays after training: these parameters with the encoder's outputs in its place."""
        made = {**params, "prompt": {"embedding": self.encode(params["prompt"])}}
        return replace(self, params=made, encode=as_they_are)

    def _layers(self, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer, [L, n, K, d]."""
        config = self.model.config
        heads = (config.num_key_value_heads, config.head_dim)
        pairs = prompt.reshape(self.length, config.num_hidden_layers, 2, *heads)
        keys, values = jnp.transpose(pairs, (2, 1, 0, 3, 4))
        return keys, values

    def _begun(self, params: Mapping[str, Any], cache: Any) -> Any:
        """A cache that has seen the virtual tokens."""
        batch, n, prompt = cache.lengths.shape[0], self.length, self.encode(params["prompt"])
        if not self.keys_values:
            return self.model.advance(_base(params), _rows(prompt, batch), cache)[1]
        keys, values = (
            old.at[:, :, :n].set(new.astype(old.dtype)[:, None])
            for old, new in zip((cache.keys, cache.values), self._layers(prompt), strict=True)
        )
        moved = {"lengths": cache.lengths + n, "slot": cache.slot + n}
        return cache._replace(
            keys=keys, values=values, valid=cache.valid.at[:, :n].set(True), **moved
        )


def as_they_are(prompt: Mapping[str, Any]) -> jax.Array:
    """The virtual tokens themselves, without an encoder."""
    return prompt["embedding"]


def _base(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model without virtual tokens."""
    return {name: value for name, value in params.items() if name != "prompt"}


def _rows(prompt: jax.Array, batch: int) -> jax.Array:
    return jnp.broadcast_to(prompt[None], (batch, *prompt.shape))


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
