"""Adapters in PEFT's format, both ways."""

from lora_jax.io.peft.files import load_peft, save_peft
from lora_jax.io.peft.prompts import load_prompt, save_prompt

__all__ = ["load_peft", "load_prompt", "save_peft", "save_prompt"]
