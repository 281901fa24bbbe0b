"""The settings of a fine-tuning run: every key there is, checked and completed."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ml_collections import config_dict

from experiments import choices
from experiments.choices import check_choice
from experiments.tasks import TASKS
from experiments.tasks.task import check_positive
from lora_jax.errors import InputError

_LIMITS = (
    ("b1", 0, 1),
    ("b2", 0, 1),
    ("final", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("clip", 0, math.inf),
    ("diverged", 1, math.inf),
)


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
    optimizer: str = "adamw"
    """Or lora_plus, lora_fa."""
    ratio: float = 16.0
    """Of lora_plus: the rate of b over that of a."""
    embedding_rate: float = 1e-6
    """Of lora_plus: the rate of an embedding's factors."""
    corrected: bool = True
    """Of lora_fa: whether its gradient is corrected."""
    on_host: bool = False
    """Whether the optimizer's moments rest in host memory."""
    calibrate: int = 8
    """How many batches a start from data (eva, corda, lora_ga) looks at."""
    diverged: float = 3.0
    """Stop when the loss stays above this multiple of its start."""

    def __post_init__(self) -> None:
        check_positive("train", self, "batch", "accumulate", "calibrate")
        check_choice("train.optimizer", self.optimizer, ("adamw", "lora_plus", "lora_fa"))
        if self.batch % self.accumulate:
            raise InputError(
                f"config.train.batch is {self.batch}, which does not split into "
                f"config.train.accumulate={self.accumulate} equal parts; make it a multiple"
            )
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if not low <= value < high:
                below = f" and less than {high}" if high < math.inf else ""
                raise InputError(f"config.train.{name} is {value}; give at least {low}{below}")


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured before and after."""

    split: str = "test"
    batch: int = 16
    show: int = 3

    def __post_init__(self) -> None:
        check_positive("evaluate", self, "batch")
        check_choice("evaluate.split", self.split, ("test", "dev"))


def _default(kind: str) -> dict[str, Any]:
    return {"name": choices.DEFAULTS[kind]}


@dataclass(frozen=True)
class Settings:
    """Everything a fine-tuning run depends on; `model` and `data` are the task's own."""

    task: str
    model: Any
    data: Any
    seed: int = 0
    method: Mapping[str, Any] = field(default_factory=lambda: _default("method"))
    dynamics: Mapping[str, Any] = field(default_factory=lambda: _default("dynamics"))
    quantize: Mapping[str, Any] = field(default_factory=lambda: _default("quantize"))
    prompt: Mapping[str, Any] = field(default_factory=lambda: _default("prompt"))
    targets: Any = "all_linear"
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


def resolve(config: Any) -> Settings:
    """Complete a config with the defaults; InputError for an unknown key, value or method.

    >>> resolve({"model": {"source": "here"}, "method": {"name": "lora", "rank": 4}}).train.batch
    8
    >>> resolve({"trian": {"batch": 4}})
    Traceback (most recent call last):
    lora_jax.errors.InputError: unknown key 'trian' in the config; nearest: 'train'
    """
    given = plain(config)
    defaults = _defaults(given)
    completed = _complete(defaults, given, "", flat_keys(defaults) | _chosen_keys(given))
    if completed["dynamics"]["name"] == "auto":
        name = completed["method"]["name"]
        own = name if name in choices.KINDS["dynamics"].__all__ else "none"
        completed["dynamics"] = {**completed["dynamics"], "name": own}
    if completed["seed"] < 0:
        raise InputError(f"config.seed is {completed['seed']}; give 0 or more")
    entry = TASKS[completed["task"]]
    sections = {"model": entry.model, "data": entry.settings}
    sections |= {"train": TrainSettings, "evaluate": EvaluateSettings}
    made = {name: section(**completed[name]) for name, section in sections.items()}
    return Settings(**{**completed, **made})


def known_keys(config: Any) -> dict[str, Any]:
    """Every dotted key that a config for this task may have, with its default.

    >>> known_keys({"task": "answers"})["train.batch"]
    8
    """
    anything = {"targets": None}  # of several types
    given = plain(config)
    return flat_keys(_defaults(given)) | _chosen_keys(given) | anything | {"arm": ""}


def unknown_key(key: str, known: Iterable[str], place: str = "the config") -> InputError:
    """Make the error for a key that does not exist, with the nearest that does."""
    known = sorted(known)
    as_deep = [name for name in known if name.count(".") == key.count(".")]
    close = difflib.get_close_matches(key, as_deep, n=1, cutoff=0.5)
    hint = f"nearest: '{close[0]}'" if close else f"known: {', '.join(as_deep or known)}"
    return InputError(f"unknown key '{key}' in {place}; {hint}")


def check_type(key: str, value: Any, default: Any) -> Any:
    """Hold a value to the type of its default; a whole number passes for a real one.

    >>> check_type("train.clip", 1, 0.5)
    1.0
    """
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    kind = "a group of keys" if isinstance(default, Mapping) else type(default).__name__
    raise InputError(f"config.{key} is {value!r}; expected {kind}")


@contextmanager
def in_config(prefix: str) -> Iterator[None]:
    """Put the config's key before the message of an InputError that knows only the option."""
    try:
        yield
    except InputError as error:
        raise InputError(f"config.{prefix}{error}") from error


def flat_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by dotted key, sections among them.

    >>> flat_keys({"seed": 0, "data": {"dev": 1}})
    {'seed': 0, 'data': {'dev': 1}, 'data.dev': 1}
    """
    found: dict[str, Any] = {}
    for name, value in plain(config).items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, Mapping):
            found.update(flat_keys(value, f"{prefix}{name}."))
    return found


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested dicts, making the sections that are not there.

    >>> config = {"seed": 0}
    >>> set_key(config, "data.dev", 1)
    >>> config
    {'seed': 0, 'data': {'dev': 1}}
    """
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise InputError(f"unknown key '{key}'; '{section}' is no group of keys")
    config[name] = value


def plain(config: Any) -> Any:
    """A config as plain nested dicts."""
    if isinstance(config, config_dict.ConfigDict):
        return config.to_dict()
    return {k: plain(v) for k, v in config.items()} if isinstance(config, Mapping) else config


def _chosen_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted options of the functions that sections name, and of others of their kind."""
    found: dict[str, Any] = {}
    for kind in choices.KINDS:
        section = config.get(kind, {})
        options = choices.defaults(kind, dict(section).get("name", choices.DEFAULTS[kind]))
        found |= {f"{kind}.{name}": value for name, value in options.items() if name != "name"}
    return found


def _defaults(given: Any) -> dict[str, Any]:
    """The nested defaults of the task that a config chooses."""
    if not isinstance(given, Mapping):
        raise InputError(f"the config is {given!r}; it is a group of keys")
    task = given.get("task", "answers")
    check_choice("task", task, TASKS)
    model, data = asdict(TASKS[task].model()), asdict(TASKS[task].settings())
    return asdict(Settings(task, model, data))


def _complete(
    defaults: Mapping[str, Any], given: Any, prefix: str, known: Mapping[str, Any]
) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"config.{prefix.rstrip('.')} is {given!r}; it is a group of keys")
    completed = dict(defaults)
    for name, value in given.items():
        key = prefix + str(name)
        if key not in known:
            raise unknown_key(key, known)
        default = known[key]
        if isinstance(default, Mapping):
            completed[name] = _complete(default, value, f"{key}.", known)
        else:
            completed[name] = value if key == "targets" else check_type(key, value, default)
    return completed
