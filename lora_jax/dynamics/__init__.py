"""What changes between steps: budgets and masks, a kernel that moves, restarts."""

from lora_jax.dynamics.adalora import adalora, budget
from lora_jax.dynamics.delta_lora import delta_lora
from lora_jax.dynamics.dynamics import Dynamics
from lora_jax.dynamics.pruning import pruned
from lora_jax.dynamics.relora import Restart, relora, restart, rewarmed, trimmed

__all__ = [
    "Dynamics",
    "Restart",
    "adalora",
    "budget",
    "delta_lora",
    "pruned",
    "relora",
    "restart",
    "rewarmed",
    "trimmed",
]
