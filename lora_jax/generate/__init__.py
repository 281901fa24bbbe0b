"""Text and ids from any decode function, adapted or not."""

from lora_jax.generate.decode import generate
from lora_jax.generate.sample import Sampling
from lora_jax.generate.text import complete

__all__ = ["Sampling", "complete", "generate"]
