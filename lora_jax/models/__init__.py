"""Plain models that have never heard of adapters."""

from lora_jax.models.config import LlamaConfig, RopeScaling
from lora_jax.models.load import load
from lora_jax.models.model import Model, initialise

__all__ = ["LlamaConfig", "Model", "RopeScaling", "initialise", "load"]
