"""The optimizer of a run, from `config.train`."""

from typing import Any

import optax

from experiments.settings import TrainSettings, in_config
from lora_jax import optim
from lora_jax.train import Optimizer, warm_cosine


def make_schedule(train: TrainSettings) -> optax.Schedule:
    """The learning rate of each step; InputError for settings outside their range."""
    names = ("steps", "learning_rate", "warmup", "final")
    with in_config("train."):
        return warm_cosine(**{name: getattr(train, name) for name in names})


def make_optimizer(train: TrainSettings, frozen: Any, trained: Any, sites: Any) -> Optimizer:
    """The optimizer that the settings describe, for one adapter's arrays."""
    schedule = make_schedule(train)
    moments: Any = {"b1": train.b1, "b2": train.b2, "weight_decay": train.weight_decay}
    with in_config("train."):
        match train.optimizer:
            case "lora_plus":
                rates: Any = {"ratio": train.ratio, "embedding_rate": train.embedding_rate}
                labels = optim.roles(frozen, trained, sites)
                transform = optim.lora_plus(schedule, labels, **rates, **moments)
            case "lora_fa":
                transform = optim.lora_fa(schedule, frozen, corrected=train.corrected, **moments)
            case _:
                transform = optax.adamw(schedule, **moments)
    return Optimizer(optim.in_host_memory(transform) if train.on_host else transform, schedule)
