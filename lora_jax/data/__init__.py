"""Tasks as prompt and completion, their splits, and batches of token ids."""

from lora_jax.data.batches import (
    Batches,
    Encoded,
    choice_batches,
    collate,
    encode,
    held_out_batches,
)
from lora_jax.data.examples import Example, Splits, read_examples, split_examples
from lora_jax.data.reviews import read_reviews

__all__ = [
    "Batches",
    "Encoded",
    "Example",
    "Splits",
    "choice_batches",
    "collate",
    "encode",
    "held_out_batches",
    "read_examples",
    "read_reviews",
    "split_examples",
]
