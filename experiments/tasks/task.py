"""What a task is to the command that fine-tunes: a base, a loss, batches and a measure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io.card import Card
from lora_jax.io.sources import Source
from lora_jax.method import Method

Batch = Mapping[str, Any]


class Score(Protocol):
    """A number with its 95 % interval; `lora_jax.evaluate` has Accuracy, Likelihood, Estimate."""

    @property
    def name(self) -> str:
        """What is measured: "accuracy"."""
        ...

    @property
    def value(self) -> float:
        """The number itself."""
        ...

    @property
    def low(self) -> float | None:
        """The interval's lower end; None where there is no interval."""
        ...

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        ...

    def record(self) -> dict[str, float]:
        """The score as numbers for a file."""
        ...


class Measured(NamedTuple):
    """A score, and whatever it was taken from that `Task.show` wants to see."""

    score: Score
    details: Any = None

    def record(self) -> dict[str, float]:
        """Give the score as numbers for metrics.jsonl."""
        return self.score.record()

    def __str__(self) -> str:
        return str(self.score)


@dataclass(frozen=True, eq=False)
class Task:
    """A base and what it is to learn. `experiments.finetune` knows nothing else about either."""

    apply: Callable[..., Any]
    """apply(params, *inputs), which `find_sites` traces."""
    params: Any
    """The base's parameters, a fresh head included."""
    inputs: tuple[Any, ...]
    """Example inputs: arrays, or jax.ShapeDtypeStruct."""
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    """loss(params, batch) -> (sum of losses, sum of weights)."""
    batches: Callable[[int], Batch]
    """The training batch of step i, numpy arrays [B, ...]: a pure function of (seed, i)."""
    measure: Callable[[Any, Any], Measured]
    """measure(frozen, trained) on the held-out split; `compiled` runs the base's functions."""
    about: str
    """One line about the data: sizes, classes."""
    fresh: Mapping[Any, Method] = field(default_factory=dict)
    """Rules that come with the task, put before the config's: {"head/.*": lj.full()}."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What a saved adapter must say, beside its base, for it to be opened."""
    source: Source | None = None
    """Of the base, for the record."""
    name: str = ""
    """What PEFT shall call the base, where it has a name of its own."""
    peft: bool = False
    """Whether peft knows this base, so that its format can hold what is trained."""
    card: Card = field(default_factory=lambda: Card())
    """Facts about the data for the adapter's card."""
    show: Callable[[Measured, Measured | None], str] | None = None
    """show(before, after) -> some examples in words."""


def check_positive(section: str, settings: Any, *names: str) -> None:
    """Raise InputError unless these whole numbers of a section are at least 1.

    >>> check_positive("data", type("Data", (), {"dev": 0}), "dev")
    Traceback (most recent call last):
    lora_jax.errors.InputError: config.data.dev is 0; give at least 1
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(
                f"config.{section}.{name} is {getattr(settings, name)}; give at least 1"
            )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lift `function(params, *args)` to compiled `(frozen, trained, *args)`, adapters factored."""
    factored = lj.factored(function)

    @jax.jit
    def run(frozen: Any, trained: Any, *args: Any) -> Any:
        return factored(lj.bind(frozen, trained), *args)

    return run


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in an epoch, from (seed, epoch) alone and for ever the same.

    A bit generator's raw words are sorted: NumPy keeps that stream between versions.

    >>> sorted(shuffled(5, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4]
    """
    raw = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(raw, kind="stable")


def draw_rows(count: int, size: int, seed: int, step: int) -> np.ndarray:
    """The numbers [size] of the examples in a step's batch, each epoch in an order of its own.

    >>> draw_rows(4, size=2, seed=0, step=0).shape
    (2,)
    """
    places = [divmod(n, count) for n in range(step * size, (step + 1) * size)]
    orders = {epoch: shuffled(count, seed, epoch) for epoch, _ in places}
    return np.array([orders[epoch][place] for epoch, place in places])
