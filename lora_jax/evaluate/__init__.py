"""Measures of a model on held-out examples."""

from lora_jax.evaluate.choices import (
    Accuracy,
    answer_logprobs,
    answer_numbers,
    choice_logprobs,
    find_choices,
)
from lora_jax.evaluate.estimate import Estimate
from lora_jax.evaluate.interval import wilson
from lora_jax.evaluate.likelihood import Likelihood, mean_loss

__all__ = [
    "Accuracy",
    "Estimate",
    "Likelihood",
    "answer_logprobs",
    "answer_numbers",
    "choice_logprobs",
    "find_choices",
    "mean_loss",
    "wilson",
]
