"""A loaded model: plain parameters, and pure functions over them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.config import LlamaConfig
from lora_jax.models.llama import REMATS, Cache, LayerCache, Llama

if TYPE_CHECKING:
    from lora_jax.io.sources import Source
    from lora_jax.io.tokenizer import Tokenizer

Params: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Model:
    """A Llama-family decoder used functionally: `model.apply(params, ids)`.

    The functions take parameters as an argument, any tree of the structure of `model.params`, and
    never read `model.params` themselves, so a transform or a gradient sees every weight.

    >>> config = LlamaConfig(48, 16, 24, 2, 2, 1, 8, max_position_embeddings=32)
    >>> model = initialise(config, jax.random.key(0))
    >>> model.apply(model.params, jnp.zeros((3, 5), int)).shape
    (3, 5, 48)
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: "Tokenizer | None" = None
    source: "Source | None" = None
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: str = "none"

    def with_options(
        self, *, dtype: jax.typing.DTypeLike | None = None, remat: str | None = None
    ) -> "Model":
        """The same parameters, computed otherwise.

        `dtype` is that of activations and of kernels at use (parameters stay as they are);
        `remat` says what the backward pass finds kept: everything (`none`), the outputs of
        projections (`projections`: a quarter of the memory and no slower) or only the layers'
        inputs (`layers`: least memory, the forward pass is computed twice).
        """
        if remat is not None and remat not in REMATS:
            raise InputError(f"remat={remat!r} is unknown; give one of {', '.join(REMATS)}")
        return dataclasses.replace(
            self,
            dtype=self.dtype if dtype is None else dtype,
            remat=self.remat if remat is None else remat,
        )

    def apply(
        self,
        params: Params,
        ids: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`ids` [B, T] -> float32 logits [B, T, V]; `mask` [B, T] is False at padding."""
        self._check_length(ids.shape[1])
        return self._module(params)(ids, positions, mask)

    def hidden(
        self,
        params: Params,
        ids: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`ids` [B, T] -> what the output head reads [B, T, D], in the compute dtype."""
        self._check_length(ids.shape[1])
        return self._module(params).hidden(ids, positions, mask)

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """`ids` [B, T] -> their rows of the embedding [B, T, D]."""
        return self._module(params).embed(ids)

    def trunk(
        self,
        params: Params,
        x: jax.Array,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        prefix: LayerCache | None = None,
    ) -> jax.Array:
        """`hidden` from embedded inputs `x` [B, T, D] on, for inputs that are no tokens.

        `prefix` are keys and values [L, n, K, d] that every row attends to before its own.
        """
        self._check_length(x.shape[1] + (0 if prefix is None else prefix[0].shape[1]))
        return self._module(params).trunk(x, positions, mask, prefix)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """`hidden` [..., D] -> float32 logits [..., V]; `apply` is `logits` after `hidden`."""
        return self._module(params).logits(hidden)

    def decode(
        self, params: Params, ids: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads ids [B, T] after what the cache holds -> logits [B, V] of what follows, cache.

        Rows may be padded on either side, `mask` [B, T] being False there.
        """
        return self._module(params).decode(ids, cache, mask)

    def advance(
        self, params: Params, x: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """`decode` from embedded inputs `x` [B, T, D] on, for inputs that are no tokens."""
        return self._module(params).advance(x, cache, mask)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, padding included."""
        self._check_length(length)
        config = self.config
        shape = (config.num_hidden_layers, batch, length)
        shape += (config.num_key_value_heads, config.head_dim)
        return Cache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            valid=jnp.zeros((batch, length), bool),
            lengths=jnp.zeros((batch,), jnp.int32),
            slot=jnp.zeros((), jnp.int32),
        )

    @cached_property
    def _graph(self) -> Any:
        return nnx.graphdef(_abstract(self.config, self.dtype, self.remat))

    def _module(self, params: Params) -> Llama:
        return nnx.merge(self._graph, params)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise InputError(
                f"{length} tokens are longer than the model's context of {limit}; "
                "shorten the text, or ask for fewer new ones"
            )


def _abstract(config: LlamaConfig, dtype: jax.typing.DTypeLike, remat: str) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))


def param_shapes(config: LlamaConfig) -> dict[str, Any]:
    """The parameter tree that `config` asks for, with ShapeDtypeStructs (float32) as leaves."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, jnp.float32, "none"), nnx.Param))


def initialise(
    config: LlamaConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> Model:
    """A model with fresh random weights: normal of deviation 0.02, norms one, biases zero."""

    def fresh(key: jax.Array) -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key)), nnx.Param))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return Model(config, jax.jit(fresh)(key), dtype=dtype)
