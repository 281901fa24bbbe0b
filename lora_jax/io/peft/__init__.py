"""Adapters in PEFT's format, both ways."""

from lora_jax.io.peft.files import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
