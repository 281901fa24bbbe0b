"""The base of tasks on text: a language model of the Llama family, by `config.model`."""

import time
from dataclasses import dataclass

import jax.numpy as jnp

from experiments.choices import check_choice
from experiments.settings import Settings
from experiments.tasks.virtual import prompted
from lora_jax.errors import InputError
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import load
from lora_jax.models.model import Model
from lora_jax.prompts import Prompted


@dataclass(frozen=True)
class ModelSettings:
    """Where the base lies and how it computes."""

    source: str = ""
    name: str = ""
    """What PEFT shall call it, such as a hub's owner/name."""
    dtype: str = "float32"
    """Of the computation; adapters are float32 in any case."""
    remat: str = "none"
    """What the backward pass finds kept: all, `projections`, or the inputs of `layers`."""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("model.remat", self.remat, ("none", "projections", "layers"))


def load_model(settings: Settings) -> Model | Prompted:
    """Load the base, with float32 parameters, the compute settings of the config and its prompt."""
    options = settings.model
    if not options.source:
        raise InputError(
            "config.model.source is empty; give a folder, a .gguf file or a hf:// name"
        )
    started = time.perf_counter()
    model = load(options.source)
    print(f"loaded {options.source} in {time.perf_counter() - started:.1f} s", flush=True)
    model = model.with_options(dtype=jnp.dtype(options.dtype), remat=options.remat)
    return prompted(model, settings)


def tokenizer_of(model: Model | Prompted, settings: Settings) -> Tokenizer:
    """The base's tokenizer; InputError when it has none."""
    if model.tokenizer is None:
        raise InputError(
            f"the model '{settings.model.source}' has no tokenizer, which prompts need; put its "
            "tokenizer.json beside the weights"
        )
    return model.tokenizer


def check_length(model: Model | Prompted, settings: Settings) -> None:
    """Raise InputError when `config.data.length` is beyond the model's context."""
    length, context = settings.data.length, model.config.max_position_embeddings
    if length > context:
        raise InputError(
            f"config.data.length is {length}, but the model has room for {context} tokens of text; "
            "lower it"
        )
