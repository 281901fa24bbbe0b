"""The settings of a fine-tuning run: every key there is, checked and completed."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ml_collections import config_dict

import lora_jax as lj
from lora_jax import methods
from lora_jax.errors import InputError


@dataclass(frozen=True)
class ModelSettings:
    """The base: where it lies and how it computes."""

    source: str = ""
    name: str = ""
    """What PEFT shall call it, such as a hub's owner/name."""
    dtype: str = "float32"
    """Of the computation; adapters are float32 in any case."""
    remat: str = "none"
    """What the backward pass finds kept: all, `projections`, or the inputs of `layers`."""


@dataclass(frozen=True)
class DataSettings:
    """The task: where it lies, how much is held out, how wide a batch is."""

    source: str = "reviews"
    threshold: float = 0.5
    """Of reviews: the |rating| above which an opinion is clear."""
    dev: int = 400
    test: int = 500
    length: int = 64
    truncate: bool = False
    end: bool = True
    """Also learn to stop after the answer."""


@dataclass(frozen=True)
class TrainSettings:
    """Steps, batches and the optimizer."""

    steps: int = 160
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-4
    warmup: int = 0
    final: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0
    diverged: float = 3.0
    """Stop when the loss stays above this multiple of its start."""


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured before and after."""

    split: str = "test"
    batch: int = 16
    show: int = 3


@dataclass(frozen=True)
class Settings:
    """Everything a fine-tuning run depends on."""

    seed: int = 0
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    targets: Any = "all_linear"
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
}

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "projections", "layers"),
    "evaluate.split": ("test", "dev"),
    "method.name": tuple(methods.__all__),
}

TARGETS: dict[str, Callable[[lj.Site], bool]] = {"all_linear": lj.all_linear}


def resolve(config: Any) -> Settings:
    """Complete a config with the defaults; InputError for an unknown key, value or method.

    >>> resolve({"model": {"source": "here"}, "method": {"name": "lora", "rank": 4}}).train.batch
    8
    >>> resolve({"trian": {"batch": 4}})
    Traceback (most recent call last):
    lora_jax.errors.InputError: unknown key 'trian' in the config; nearest: 'train'
    """
    given = _plain(config)
    completed = _complete(asdict(Settings()), given, "")
    for key, allowed in CHOICES.items():
        section, name = key.split(".")
        _check_choice(key, completed[section][name], allowed)
    if not completed["model"]["source"]:
        raise InputError(
            "config.model.source is empty; give a folder, a .gguf file or a hf:// name"
        )
    _check_sizes(completed)
    made = {name: section(**completed[name]) for name, section in SECTIONS.items()}
    return Settings(**{**completed, **made})


def make_rules(settings: Settings) -> dict[Any, lj.Method | None]:
    """Turn `targets` and `method` into the rules that `attach` takes.

    `targets` is the name of a predicate, a pattern, or a sequence of these; an entry may be a pair
    of a target and what differs there: {"rank": 4}, or None to leave it alone.
    """
    method = dict(settings.method)
    rules: dict[Any, lj.Method | None] = {}
    for target, changes in _entries(settings.targets):
        rule = _target(target)
        rules[rule] = None if changes is None else make_method({**method, **changes})
    return rules


def make_method(options: Mapping[str, Any]) -> lj.Method:
    """Make a method from its name and options; options that only other methods have are left out.

    >>> make_method({"name": "lora", "rank": 4, "alpha": 8}).hyper["rank"]
    4
    """
    name = options["name"]
    _check_choice("method.name", name, CHOICES["method.name"])
    accepted = _parameters(name)
    return getattr(methods, name)(**{k: v for k, v in options.items() if k in accepted})


def unused_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options that belong to other methods than the one named."""
    return sorted(set(options) - {"name"} - set(_parameters(options["name"])))


def unknown_key(key: str, known: Iterable[str], place: str = "the config") -> InputError:
    """Make the error for a key that does not exist, with the nearest that does."""
    known = sorted(known)
    as_deep = [name for name in known if name.count(".") == key.count(".")]
    close = difflib.get_close_matches(key, as_deep, n=1, cutoff=0.5)
    hint = f"nearest: '{close[0]}'" if close else f"known: {', '.join(known)}"
    return InputError(f"unknown key '{key}' in {place}; {hint}")


def flat_keys(config: Any, prefix: str = "") -> list[str]:
    """List the dotted keys of nested settings, sections among them.

    >>> flat_keys({"seed": 0, "data": {"dev": 1}})
    ['seed', 'data', 'data.dev']
    """
    keys = []
    for name, value in _plain(config).items():
        keys.append(prefix + name)
        if isinstance(value, Mapping):
            keys += flat_keys(value, f"{prefix}{name}.")
    return keys


def _plain(config: Any) -> Any:
    if isinstance(config, config_dict.ConfigDict):
        return config.to_dict()
    return {k: _plain(v) for k, v in config.items()} if isinstance(config, Mapping) else config


def _known_keys() -> list[str]:
    hypers = {f"method.{key}" for name in methods.__all__ for key in _parameters(name)}
    return sorted({*flat_keys(asdict(Settings())), *hypers})


def _complete(defaults: Mapping[str, Any], given: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"config.{prefix.rstrip('.')} is {given!r}; it is a group of keys")
    completed = dict(defaults)
    known = _known_keys()
    for name, value in given.items():
        key = prefix + str(name)
        if key not in known:
            raise unknown_key(key, known)
        default = defaults.get(name)
        if isinstance(default, Mapping):
            completed[name] = _complete(default, value, f"{key}.")
        else:
            completed[name] = value if key == "targets" else _typed(key, value, default)
    return completed


def _typed(key: str, value: Any, default: Any) -> Any:
    """Hold a value to the type of its default; a whole number passes for a real one."""
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise InputError(f"config.{key} is {value!r}; expected {type(default).__name__}")


def _check_choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    hint = f"nearest: '{close[0]}'" if close else f"known: {', '.join(allowed)}"
    raise InputError(f"config.{key} is {value!r}, which is not known; {hint}")


def _check_sizes(settings: Mapping[str, Any]) -> None:
    sizes = ("data.dev", "data.test", "data.length", "train.batch", "train.accumulate")
    for key in (*sizes, "evaluate.batch"):
        section, name = key.split(".")
        if settings[section][name] < 1:
            raise InputError(f"config.{key} is {settings[section][name]}; give at least 1")
    if settings["seed"] < 0:
        raise InputError(f"config.seed is {settings['seed']}; give 0 or more")
    batch, parts = settings["train"]["batch"], settings["train"]["accumulate"]
    if batch % parts:
        raise InputError(
            f"config.train.batch is {batch}, which does not split into accumulate={parts} equal "
            "parts; make it a multiple"
        )


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(methods, name)).parameters)


def _entries(targets: Any) -> list[tuple[str, Mapping[str, Any] | None]]:
    """List (target, changes) pairs of whatever form `targets` has."""
    if isinstance(targets, str):
        several = _literal(targets)  # "('.*/q_proj/kernel', ...)" from a command line
        return _entries(several) if isinstance(several, tuple | list) else [(targets, {})]
    if isinstance(targets, Mapping):
        return list(targets.items())
    entries: list[Any] = [(e, {}) if isinstance(e, str) else tuple(e) for e in targets]
    if not entries or any(len(entry) != 2 for entry in entries):
        raise InputError(
            f"config.targets is {targets!r}; give a pattern or (pattern, changes) pairs"
        )
    return entries


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _target(target: str) -> Any:
    """Find the predicate of that name, or take the text as a pattern."""
    if target in TARGETS:
        return TARGETS[target]
    close = difflib.get_close_matches(target, list(TARGETS), n=1, cutoff=0.8)
    if close:
        raise InputError(f"config.targets names no predicate '{target}'; nearest: '{close[0]}'")
    return target
