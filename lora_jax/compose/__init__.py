"""Several adapters on one base: weighted sums of them, and any of them as a plain LoRA.

Adapters of one base share its arrays: a `(frozen, trained)` pair holds the very kernels that
`attach` was given, so to switch is to pass another pair, which compiles nothing anew where only
alpha or the numbers differ, and to disable is to pass `params` itself.
"""

from lora_jax.compose.conversion import Fit, as_lora
from lora_jax.compose.recipes import METHODS
from lora_jax.compose.tensors import Recipe, combined, dropped, elected, trimmed
from lora_jax.compose.weighted import weighted_sum

__all__ = [
    "METHODS",
    "Fit",
    "Recipe",
    "as_lora",
    "combined",
    "dropped",
    "elected",
    "trimmed",
    "weighted_sum",
]
