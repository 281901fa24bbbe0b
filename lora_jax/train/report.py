"""Observers of a run: a live line for people, JSON lines for programs, a picture of the loss."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from lora_jax.train.loop import Progress

Observer = Callable[[Progress], None]


def describe(progress: Progress) -> str:
    """Say where a run stands in one line.

    >>> describe(Progress(20, 160, 0.51234, 4.8e-4, 1.0, 310.4, 1.26, 131.0))
    'step 20/160  loss 0.512  310 tokens/s  lr 4.80e-04  peak 1.3 GB  2:11 left'
    """
    peak = progress.peak_memory_gb
    parts = [
        f"step {progress.step}/{progress.steps}",
        f"loss {progress.loss:.3f}",
        f"{progress.per_second:,.0f} {progress.unit}/s",
        f"lr {progress.learning_rate:.2e}",
        f"peak {'?' if peak is None else f'{peak:.1f}'} GB",
        f"{_clock(progress.seconds_left)} left",
    ]
    return "  ".join(parts)


@contextmanager
def live_line(stream: TextIO | None = None, *, every: float = 10.0) -> Iterator[Observer]:
    """Yield an observer that shows progress: a moving bar on a terminal, else a line now and then.

    Away from a terminal (a file, a pipe, CI) it writes a plain line for the first and last step and
    at most one every `every` seconds between.
    """
    console = Console(file=stream or sys.stdout)
    if not console.is_terminal:
        yield _plain(stream or sys.stdout, every)
        return
    with Bar(BarColumn(24), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("compiling the first step")

        def observe(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.steps,
                completed=progress.step,
                description=describe(progress),
            )

        yield observe


def json_lines(path: str | Path) -> Observer:
    """Make an observer that adds one JSON object a step to the file, whole lines only."""
    path = Path(path)

    def observe(progress: Progress) -> None:
        record = progress._asdict()
        record[f"{record.pop('unit')}_per_second"] = record.pop("per_second")
        append(path, {**record, "seconds_left": round(progress.seconds_left, 1)})

    return observe


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def loss_picture(path: str | Path, losses: Sequence[float], *, title: str = "") -> bool:
    """Draw the loss of each step and its running mean as a PNG; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="one batch")
    axes.plot(steps, running_mean(losses), color="C0", label="running mean")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)
    return True


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start.

    >>> running_mean([2.0, 2.0])
    [2.0, 2.0]
    """
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        means.append(total / weight)
    return means


def _plain(stream: TextIO, every: float) -> Observer:
    last = -float("inf")

    def observe(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.step == progress.steps or now - last >= every:
            last = now
            print(describe(progress), file=stream, flush=True)

    return observe


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
