"""Loss, step and loop, each usable without the others."""

from lora_jax.train.loop import Outcome, Progress, Watch, fit
from lora_jax.train.loss import answer_loss, cross_entropy
from lora_jax.train.optimizer import Optimizer, adamw, warm_cosine
from lora_jax.train.step import StepInfo, TrainState, adapter_loss, init_state, make_step

__all__ = [
    "Optimizer",
    "Outcome",
    "Progress",
    "StepInfo",
    "TrainState",
    "Watch",
    "adamw",
    "adapter_loss",
    "answer_loss",
    "cross_entropy",
    "fit",
    "init_state",
    "make_step",
    "warm_cosine",
]
