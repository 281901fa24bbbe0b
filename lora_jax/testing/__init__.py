"""The laws of a method, for tests of one's own."""

from lora_jax.testing.case import Case, Draw, compiled_as_users_do, quick
from lora_jax.testing.check import check_method
from lora_jax.testing.laws import LAWS
from lora_jax.testing.models import MODELS
from lora_jax.testing.row import Claim, Row

__all__ = [
    "LAWS",
    "MODELS",
    "Case",
    "Claim",
    "Draw",
    "Row",
    "check_method",
    "compiled_as_users_do",
    "quick",
]
