"""Generation from text to text."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from lora_jax.errors import InputError
from lora_jax.generate.decode import Decode, generate
from lora_jax.generate.sample import GREEDY, Sampling

_WIDTH_STEP = 32
"""Prompts are padded to a multiple of this, so that near lengths share one compilation."""


class Writer(Protocol):
    """What `complete` needs of a model; `lora_jax.models.Model` has it."""

    @property
    def config(self) -> Any:
        """With max_position_embeddings and eos_token_ids."""
        ...

    @property
    def params(self) -> Any:
        """The parameters used when none are given."""
        ...

    @property
    def tokenizer(self) -> Any:
        """With encode, decode and eos_id; or None."""
        ...

    @property
    def decode(self) -> Decode:
        """The decode function used when none is given."""
        ...

    @property
    def init_cache(self) -> Callable[[int, int], Any]:
        """An empty cache from (batch, length)."""
        ...


def complete(
    model: Writer,
    prompts: Sequence[str],
    *,
    params: Any = None,
    decode: Decode | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    add_special_tokens: bool = True,
) -> list[str]:
    """What the model writes after each prompt, up to its end token.

    With adapters: `params=lj.bind(frozen, trained), decode=lj.factored(model.decode)`. A prompt
    made by `model.tokenizer.chat(...)` wants `add_special_tokens=False`. Raises InputError for a
    model without a tokenizer and as `generate` does.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("this model has no tokenizer; use generate() with ids")
    ids = [tokenizer.encode(prompt, add_special_tokens) for prompt in prompts]
    limit = model.config.max_position_embeddings - max_new_tokens
    longest = max(map(len, ids), default=0)
    rounded = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    ends = {*model.config.eos_token_ids, tokenizer.eos_id} - {None}
    rows = generate(
        model.decode if decode is None else decode,
        model.params if params is None else params,
        ids,
        model.init_cache,
        max_new_tokens=max_new_tokens,
        eos=sorted(ends),
        sampling=sampling,
        key=key,
        width=rounded if rounded <= limit else longest,
    )
    return [tokenizer.decode(row) for row in rows]
