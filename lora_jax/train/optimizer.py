"""AdamW under a warm-up and a cosine."""

from typing import NamedTuple

import optax

from lora_jax.errors import InputError


class Optimizer(NamedTuple):
    """A gradient transformation and the learning rate it uses at each step."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def adamw(
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> Optimizer:
    """AdamW under `warm_cosine`; `make_step` clips the gradient.

    `weight_decay` is decoupled and meets trained values only. InputError for settings outside their
    range.

    >>> float(adamw(steps=10, learning_rate=0.5).schedule(0))
    0.5
    """
    schedule = warm_cosine(steps=steps, learning_rate=learning_rate, warmup=warmup, final=final)
    transform = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    return Optimizer(transform, schedule)


def warm_cosine(
    *, steps: int, learning_rate: float, warmup: int = 0, final: float = 0.0
) -> optax.Schedule:
    """A rate that rises over `warmup` steps, then falls as a cosine to `final` times its peak.

    >>> schedule = warm_cosine(steps=10, learning_rate=1e-3, warmup=2)
    >>> [round(float(schedule(step)), 6) for step in (0, 1, 2, 10)]
    [0.000333, 0.000667, 0.001, 0.0]
    """
    _check(steps, learning_rate, warmup)
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, max(warmup, 1))
    fall = optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), alpha=final)
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def _check(steps: int, learning_rate: float, warmup: int) -> None:
    if steps < 1:
        raise InputError(f"steps={steps} trains nothing; give at least 1")
    if not 0 <= warmup < steps:
        raise InputError(f"warmup={warmup} must lie in 0 .. steps-1 with steps={steps}")
    if not 0 < learning_rate < float("inf"):
        raise InputError(f"learning_rate={learning_rate} must be positive and finite")
