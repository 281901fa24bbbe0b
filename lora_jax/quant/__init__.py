"""The frozen kernel in few bits: storages, and any method over them."""

from lora_jax.quant.int8 import int8
from lora_jax.quant.loftq import loftq
from lora_jax.quant.nf4 import nf4
from lora_jax.quant.quantized import quantized
from lora_jax.quant.storage import Storage

__all__ = ["Storage", "int8", "loftq", "nf4", "quantized"]
