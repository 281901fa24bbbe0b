"""The training loop: take a batch, take a step, tell the observers, stop when it goes wrong."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lora_jax.dynamics import Dynamics
from lora_jax.errors import InputError
from lora_jax.train.memory import peak_memory
from lora_jax.train.step import Batch, StepInfo, TrainState


class Progress(NamedTuple):
    """What is known after a step; `per_second` counts `unit`: tokens without padding, or examples.

    A batch with a "mask" is one of tokens.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    per_second: float
    peak_memory_gb: float | None
    seconds_left: float
    unit: str = "tokens"


class Outcome(NamedTuple):
    """How training ended: `stopped` says why it ended early, None at the full length.

    `frozen` is what `trained` belongs to: the tree that `fit` was given, unless dynamics or a
    restart changed it.
    """

    trained: Any
    step: int
    stopped: str | None
    interrupted: bool = False
    frozen: Any = None


@dataclass
class Watch:
    """Tells when a run is lost, and keeps the values from before it was.

    The start is the mean loss of the first `patience` steps, at least `floor` nats; a run has
    diverged when `patience` losses in a row exceed `factor` times the start. A copy of the trained
    values is taken every `keep_every` steps while the losses are below that.
    """

    factor: float = 3.0
    patience: int = 8
    floor: float = 0.5
    keep_every: int = 20

    def __post_init__(self) -> None:
        self.first: list[float] = []
        self.above = 0
        self.good: tuple[int, Any] | None = None

    def __call__(
        self, state: TrainState, step: int, loss: float, applied: bool, frozen: Any = None
    ) -> str | None:
        """Take in one step's result; return why the run should stop, or None."""
        if not applied:
            return f"the loss ({loss}) or its gradient is not finite at step {step}"
        if len(self.first) < self.patience:
            self.first.append(loss)
        limit = self.factor * max(sum(self.first) / len(self.first), self.floor)
        self.above = self.above + 1 if loss > limit else 0
        if self.above >= self.patience:
            return (
                f"the loss exceeds {limit:.3g} ({self.factor:g} times its start) for "
                f"{self.patience} steps up to step {step}"
            )
        if not self.above and step % self.keep_every == 0:
            self.good = step, (*jax.device_get((state.trained, state.dynamics)), frozen)
        return None

    def last_good(
        self, state: TrainState, step: int, frozen: Any = None
    ) -> tuple[int, tuple[Any, Any, Any]]:
        """Return the step and the values to keep when the run stops at `step`.

        The values are what is trained, what the dynamics keep, and the frozen tree of both.
        """
        if self.above and self.good is not None:
            return self.good
        return step, (state.trained, state.dynamics, frozen)


Between = Callable[[TrainState, Any], tuple[TrainState, Any]]


def fit(
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, StepInfo]],
    state: TrainState,
    frozen: Any,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    schedule: Callable[[int], Any],
    observers: Iterable[Callable[[Progress], None]] = (),
    watch: Watch | None = None,
    dynamics: Dynamics | None = None,
    between: Between | None = None,
) -> Outcome:
    """Train from `state.step` up to `steps`, one `batches(index)` a step.

    Every observer gets a `Progress` after every step. Ctrl-C ends the run after the current step
    with all that was trained (pressed twice, it ends at once). A loss that is not finite, or that
    `watch` calls diverged, ends it with the last good values. `dynamics` are those of `step`: a
    run shorter than their schedule is refused, and the frozen arrays that they made are part of the
    outcome. `between(state, frozen)` may change both after a step that another one follows.
    """
    _check_length(dynamics, steps)
    watch = watch or Watch()
    clock = _Clock(steps)

    def outcome(held: tuple[Any, Any, Any], *end: Any, **how: Any) -> Outcome:
        trained, kept, frozen = held
        return Outcome(trained, *end, **how, frozen=_final(dynamics, kept, frozen))

    with _interrupts() as interrupted:
        for index in range(int(state.step), steps):
            batch = batches(index)
            state, info = step(state, frozen, batch)
            loss, norm, applied = (x.item() for x in jax.device_get(info))
            progress = clock.read(index, loss, norm, float(schedule(index)), batch)
            for observe in observers:
                observe(progress)
            if why := watch(state, index, loss, applied, frozen):
                good_step, held = watch.last_good(state, index, frozen)
                return outcome(held, good_step, why)
            if interrupted.is_set():
                why = f"Ctrl-C after step {index + 1} of {steps}"
                held = state.trained, state.dynamics, frozen
                return outcome(held, index + 1, why, interrupted=True)
            if between and index + 1 < steps:
                state, frozen = between(state, frozen)
    return outcome((state.trained, state.dynamics, frozen), steps, None)


def _final(dynamics: Dynamics | None, kept: Any, frozen: Any) -> Any:
    """The frozen tree with what the dynamics put into it."""
    return dynamics.frozen(kept, frozen) if dynamics else frozen


def _check_length(dynamics: Dynamics | None, steps: int) -> None:
    if dynamics and dynamics.steps and dynamics.steps > steps:
        raise InputError(
            f"dynamics.{dynamics.name} has a schedule of {dynamics.steps} steps, but the run ends "
            f"after {steps}; give it steps={steps}"
        )


class _Clock:
    """Rates over the steps seen, the first apart: it holds the compilation."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.started: float | None = None
        self.seen = self.count = 0
        self.previous = time.perf_counter()

    def read(self, index: int, loss: float, norm: float, rate: float, batch: Batch) -> Progress:
        now = time.perf_counter()
        size, unit = _size(batch)
        if self.started is None:
            self.started, speed, pace = now, size / (now - self.previous), now - self.previous
        else:
            self.seen, self.count = self.seen + size, self.count + 1
            elapsed = now - self.started
            speed, pace = self.seen / elapsed, elapsed / self.count
        left = pace * (self.steps - index - 1)
        return Progress(index + 1, self.steps, loss, rate, norm, speed, peak_memory(), left, unit)


def _size(batch: Batch) -> tuple[int, str]:
    """How much a batch holds, and of what."""
    if "mask" in batch:
        return int(batch["mask"].sum()), "tokens"
    return len(next(iter(batch.values()))), "examples"


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag: between steps the state is whole, within one it is not."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("stopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
