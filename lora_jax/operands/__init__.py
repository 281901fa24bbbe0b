"""What multiplies a kernel, for each kind of product."""

from lora_jax.operands.convolution import Convolution
from lora_jax.operands.dense import Dense, Lookup
from lora_jax.operands.product import KEPT, Operand, Product, lifted
from lora_jax.operands.ragged import Ragged

PRODUCTS: dict[str, type[Product]] = {
    "dense": Dense,
    "lookup": Lookup,
    "conv": Convolution,
    "ragged": Ragged,
}

__all__ = ["KEPT", "PRODUCTS", "Operand", "Product", "lifted"]
