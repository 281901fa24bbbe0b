"""A Llama that reads virtual tokens before its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import LlamaConfig, Model
from lora_jax.prompts.encoders import encoded
from lora_jax.prompts.sizes import keys_and_values, sizes_of, without_prompt


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
        base, prompt = without_prompt(params), self.encode(params["prompt"])
        x, n = self.model.embed(base, ids), self.length
        positions = None if positions is None else n + positions
        if self.keys_values:
            prefix = keys_and_values(prompt, sizes_of(self.model))
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
        return self.model.logits(without_prompt(params), hidden)

    def decode(
        self, params: Mapping[str, Any], ids: jax.Array, cache: Any, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """As `Model.decode`, for `generate`; a fresh cache gets the virtual tokens first."""
        if self.length:
            cache = jax.lax.cond(cache.slot == 0, lambda: self._begun(params, cache), lambda: cache)
        return self.model.decode(without_prompt(params), ids, cache, mask)

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for `batch` rows of at most `length` tokens beside the virtual ones."""
        return self.model.init_cache(batch, self.length + length)

    def encode(self, prompt: Mapping[str, Any]) -> jax.Array:
        """The virtual tokens that the parameters `prompt` stand for."""
        return encoded(prompt, self.keys_values)

    def exported(self, params: Mapping[str, Any]) -> Prompted:
        """What stays after training: these parameters with the encoder's outputs in its place."""
        made = {**params, "prompt": {"embedding": self.encode(params["prompt"])}}
        return replace(self, params=made)

    def _begun(self, params: Mapping[str, Any], cache: Any) -> Any:
        """A cache that has seen the virtual tokens."""
        batch, n, prompt = cache.lengths.shape[0], self.length, self.encode(params["prompt"])
        if not self.keys_values:
            return self.model.advance(without_prompt(params), _rows(prompt, batch), cache)[1]
        made = keys_and_values(prompt, sizes_of(self.model))
        keys, values = (
            old.at[:, :, :n].set(new.astype(old.dtype)[:, None])
            for old, new in zip((cache.keys, cache.values), made, strict=True)
        )
        moved = {"lengths": cache.lengths + n, "slot": cache.slot + n}
        return cache._replace(
            keys=keys, values=values, valid=cache.valid.at[:, :n].set(True), **moved
        )


def _rows(prompt: jax.Array, batch: int) -> jax.Array:
    return jnp.broadcast_to(prompt[None], (batch, *prompt.shape))


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
