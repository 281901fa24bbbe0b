"""Sections of a config that name a function and give its arguments: {"name": "lora", "rank": 4}.

The name is one of ours or `module:function` of the user's own, found as Python finds modules.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from experiments import changes, prompting, storages
from lora_jax import methods
from lora_jax.errors import InputError
from lora_jax.method import Method

Factory = Callable[..., Any]

KINDS: dict[str, ModuleType] = {
    "method": methods,
    "dynamics": changes,
    "quantize": storages,
    "prompt": prompting,
}
"""The functions of ours that each section may name."""

DEFAULTS = {"method": "lora", "dynamics": "auto", "quantize": "none", "prompt": "none"}
"""What a section names when it names nothing."""


def make(kind: str, options: Mapping[str, Any]) -> Any:
    """Call the function that a section names; options that only others of its kind have are left
    out.

    >>> make("method", {"name": "lora", "rank": 4, "detach_norm": True}).hyper["rank"]
    4
    """
    factory = named(kind, options["name"])
    accepted = inspect.signature(factory).parameters
    try:
        made = factory(**{k: v for k, v in options.items() if k in accepted and k != "name"})
    except InputError as error:
        raise InputError(f"config.{kind}: {error}") from error
    if kind == "method" and not isinstance(made, Method):
        raise InputError(
            f"config.method.name: {options['name']}(...) gives {made!r}, and no lora_jax.Method"
        )
    return made


def named(kind: str, name: str) -> Factory:
    """The function that a section's name means; InputError says which names there are."""
    if ":" in name:
        return _imported(kind, name)
    check_choice(f"{kind}.name", name, _names(kind))
    return getattr(KINDS[kind], name)


def unused(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The options of a section that the function it names does not have.

    >>> unused("method", {"name": "full", "rank": 4})
    ['rank']
    """
    return sorted(set(options) - {"name"} - set(_options(named(kind, options["name"]))))


def defaults(kind: str, name: str) -> dict[str, Any]:
    """Every option that a section of this kind may have, those of the function named first.

    Options of the others pass, so that a command line may change the name alone. None where there
    is no default.
    """
    known: dict[str, Any] = {}
    for factory in (named(kind, name), *(getattr(KINDS[kind], other) for other in _names(kind))):
        known = {**_options(factory), **known}
    return {"name": name, **known}


def check_choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise InputError unless `config.key` is one of the allowed words, with the nearest named."""
    allowed = list(allowed)
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"nearest: '{close[0]}'" if close else f"known: {', '.join(allowed)}"
    raise InputError(f"config.{key} is {value!r}, which is not known; {hint}")


def _names(kind: str) -> list[str]:
    return list(KINDS[kind].__all__)


def _options(factory: Factory) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _imported(kind: str, name: str) -> Factory:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(
            f"config.{kind}.name is {name!r}, but Python finds no module '{module}' ({error}); run "
            "the command from its folder, or add that to PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise InputError(f"config.{kind}.name is {name!r}: {error}") from error
    if not callable(found):
        raise InputError(f"config.{kind}.name is {name!r}, which is {found!r} and no function")
    return found
