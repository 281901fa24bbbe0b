"""Parameterisations of a kernel, one a file."""

from lora_jax.methods.adalora import adalora
from lora_jax.methods.boft import boft
from lora_jax.methods.delta_lora import delta_lora
from lora_jax.methods.dora import dora
from lora_jax.methods.fixed import fixed
from lora_jax.methods.fourierft import fourierft
from lora_jax.methods.full import full
from lora_jax.methods.houlsby import houlsby
from lora_jax.methods.hra import hra
from lora_jax.methods.ia3 import ia3, ia3_bias, ia3_rules
from lora_jax.methods.intrinsic import intrinsic
from lora_jax.methods.loha import loha
from lora_jax.methods.lokr import lokr
from lora_jax.methods.lora import lora
from lora_jax.methods.miss import miss
from lora_jax.methods.oft import oft
from lora_jax.methods.randlora import randlora
from lora_jax.methods.tied import tied
from lora_jax.methods.vblora import vblora
from lora_jax.methods.vera import vera

__all__ = [
    "adalora",
    "boft",
    "delta_lora",
    "dora",
    "fixed",
    "fourierft",
    "full",
    "houlsby",
    "hra",
    "ia3",
    "ia3_bias",
    "ia3_rules",
    "intrinsic",
    "loha",
    "lokr",
    "lora",
    "miss",
    "oft",
    "randlora",
    "tied",
    "vblora",
    "vera",
]
