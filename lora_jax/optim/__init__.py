"""Optimizers that know what a trained array is to its method, and where their moments live."""

from lora_jax.optim.host import host_bytes, in_host_memory
from lora_jax.optim.lora_fa import LoraFaState, lora_fa
from lora_jax.optim.lora_plus import lora_plus
from lora_jax.optim.roles import ROLES, roles

__all__ = [
    "ROLES",
    "LoraFaState",
    "host_bytes",
    "in_host_memory",
    "lora_fa",
    "lora_plus",
    "roles",
]
