"""Plain models that have never heard of adapters."""

from lora_jax.models.config import LlamaConfig, RopeScaling
from lora_jax.models.heads import with_head
from lora_jax.models.load import load
from lora_jax.models.load_bert import load_bert
from lora_jax.models.load_efficientnet import load_efficientnet
from lora_jax.models.load_silero import load_silero
from lora_jax.models.load_vit import load_vit
from lora_jax.models.model import Model, initialise
from lora_jax.models.network import Network

__all__ = [
    "LlamaConfig",
    "Model",
    "Network",
    "RopeScaling",
    "initialise",
    "load",
    "load_bert",
    "load_efficientnet",
    "load_silero",
    "load_vit",
    "with_head",
]
