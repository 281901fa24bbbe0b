"""Virtual tokens in a task's model, by `config.prompt`."""

from collections.abc import Mapping
from typing import Any

import jax

import lora_jax as lj
from experiments import choices
from experiments.settings import Settings, in_config
from lora_jax.errors import InputError

TASKS = ("answers", "text", "sentences", "images")
"""Whose models may have them."""


def check_prompt(settings: Settings) -> None:
    """Raise InputError for a wrong section, and for one that the task has no use for."""
    choices.make("prompt", settings.prompt)
    if settings.prompt["name"] != "none" and settings.task not in TASKS:
        raise InputError(
            f"config.prompt puts virtual tokens beside text or images, and the task "
            f"'{settings.task}' reads neither; leave it out"
        )


def prompted(model: Any, settings: Settings) -> Any:
    """The model with the virtual tokens of `config.prompt`, drawn by the run's seed."""
    key = jax.random.fold_in(jax.random.key(settings.seed), 2)
    with in_config("prompt: "):
        return choices.make("prompt", settings.prompt)(model, key)


def prompt_rules(options: Mapping[str, Any]) -> dict[Any, lj.Method]:
    """The rules that train the virtual tokens of such a section."""
    return {} if options["name"] == "none" else {"prompt/.*": lj.full()}


def prompt_record(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved adapter must say of them, so that it can be opened."""
    return {} if options["name"] == "none" else {"prompt": dict(options)}
