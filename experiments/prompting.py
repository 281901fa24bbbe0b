"""Virtual tokens beside the input of a model: what `config.prompt` may name."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax import prompts

__all__ = ["none", "p_tuning", "prefix_tuning", "prompt_tuning"]

Wrap = Callable[[Any, jax.Array], Any]
"""Of a Model or Network and a key: the same, or with virtual tokens."""


def none() -> Wrap:
    """The input alone."""
    return lambda model, key: model


def prompt_tuning(length: int = 20, init: str | None = None, deep: bool = False) -> Wrap:
    """`lora_jax.prompts.prompt_tuning`: trained embeddings."""
    return lambda model, key: prompts.prompt_tuning(model, length, key, init=init, deep=deep)


def p_tuning(
    length: int = 20, hidden: int | None = None, encoder: str = "mlp", layers: int = 2
) -> Wrap:
    """`lora_jax.prompts.p_tuning`: embeddings made by a small network."""
    options: Any = {"hidden": hidden, "encoder": encoder, "layers": layers}
    return lambda model, key: prompts.p_tuning(model, length, key, **options)


def prefix_tuning(length: int = 20, hidden: int | None = None, init: str = "normal") -> Wrap:
    """`lora_jax.prompts.prefix_tuning`: trained keys and values in every layer."""
    return lambda model, key: prompts.prefix_tuning(model, length, key, hidden=hidden, init=init)
