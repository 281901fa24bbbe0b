"""Parameterisations of a kernel, one a file."""

from lora_jax.methods.dora import dora
from lora_jax.methods.full import full
from lora_jax.methods.lora import lora

__all__ = ["dora", "full", "lora"]
