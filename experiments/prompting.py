"""Virtual tokens before the text of a language model: what `config.prompt` may name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import lora_jax as lj
from lora_jax import prompts
from lora_jax.models.model import Model
from lora_jax.prompts import Prompted

__all__ = ["none", "p_tuning", "prefix_tuning", "prompt_tuning"]

Wrap = Callable[[Model, jax.Array], Model | Prompted]


def none() -> Wrap:
    """The text alone."""
    return lambda model, key: model


def prompt_tuning(length: int = 20, init: str = "vocabulary") -> Wrap:
    """`lora_jax.prompts.prompt_tuning`: trained embeddings."""
    return lambda model, key: prompts.prompt_tuning(model, length, key, init=init)


def p_tuning(
    length: int = 20, hidden: int | None = None, encoder: str = "mlp", layers: int = 2
) -> Wrap:
    """`lora_jax.prompts.p_tuning`: embeddings made by a small network."""
    options: Any = {"hidden": hidden, "encoder": encoder, "layers": layers}
    return lambda model, key: prompts.p_tuning(model, length, key, **options)


def prefix_tuning(length: int = 20, hidden: int | None = None, init: str = "normal") -> Wrap:
    """`lora_jax.prompts.prefix_tuning`: trained keys and values in every layer."""
    return lambda model, key: prompts.prefix_tuning(model, length, key, hidden=hidden, init=init)


def prompt_rules(options: Mapping[str, Any]) -> dict[Any, lj.Method]:
    """The rules that train the virtual tokens of such a section."""
    return {} if options["name"] == "none" else {"prompt/.*": lj.full()}


def prompt_record(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved adapter must say of them, so that it can be opened."""
    return {} if options["name"] == "none" else {"prompt": dict(options)}
