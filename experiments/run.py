"""One run: a base is adapted to a task, and measured before and after."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lora_jax as lj
from experiments import choices, saving
from experiments.measure import merge_error
from experiments.rules import NONE, make_rules
from experiments.run_folder import staged
from experiments.settings import Settings, TrainSettings, in_config, resolve
from experiments.tasks import TASKS
from experiments.tasks.task import Measured, Task
from lora_jax.errors import InputError
from lora_jax.io.peft.notes import describe
from lora_jax.train import (
    Optimizer,
    Outcome,
    Watch,
    adamw,
    adapter_loss,
    fit,
    init_state,
    make_step,
)
from lora_jax.train.report import append, json_lines, live_line, loss_picture


class Result(NamedTuple):
    """What a run found. `after` is None when Ctrl-C ended it."""

    before: Measured
    after: Measured | None
    outcome: Outcome
    parameters: int
    """How many numbers were trained."""
    seconds: float
    """Of training alone."""


class Shared:
    """A task and its base's score, for runs that differ in method, targets and training alone."""

    def __init__(self) -> None:
        self._task: tuple[Settings, Task] | None = None
        self._before: Measured | None = None

    def task(self, settings: Settings) -> Task:
        """Load the task, unless the one before was the same."""
        key = replace(settings, method={}, targets="", train=_batch_alone(settings))
        if self._task is None or self._task[0] != key:
            self._task = self._before = None  # let go of one base before the next is loaded
            self._task = key, TASKS[settings.task](settings)
        return self._task[1]

    def before(self, frozen: Any, trained: Any) -> Measured:
        """Measure the task's base, once: fresh adapters change nothing."""
        assert self._task is not None
        self._before = self._before or self._task[1].measure(frozen, trained)
        return self._before


def finetune(config: Any, workdir: str | Path, shared: Shared | None = None) -> Result:
    """Run a config and write config.json, metrics.jsonl, adapter/ and loss.png into `workdir`.

    What was there before stays whole until the new files are. InputError for a mistake in the
    config or in what it names, before anything is trained.
    """
    settings, workdir = resolve(config), Path(workdir)
    make_rules(settings)  # a wrong method or rank fails before a model is fetched
    optimizer = make_optimizer(settings)
    saving.check_replaceable(workdir / "adapter")
    shared = shared or Shared()
    with staged(workdir) as stage:
        _write_json(stage / "config.json", asdict(settings))
        task = shared.task(settings)
        frozen, trained = adapt(task, settings)
        peft = saving.rehearse(stage, task, frozen, trained)
        print(f"\n{task.about}\nmeasuring on the {settings.evaluate.split} split ...", flush=True)
        before = shared.before(frozen, trained)
        print(f"{settings.evaluate.split} before: {before}", flush=True)
        result = train(task, frozen, trained, optimizer, settings, before, stage)
        _save(workdir, stage, task, frozen, settings, result, peft)
        _draw(stage, frozen)
    _say_result(task, settings, result)
    return result


def adapt(task: Task, settings: Settings) -> tuple[Any, Any]:
    """Find the base's kernels and attach the method to those that `targets` chooses."""
    rules = {**task.fresh, **make_rules(settings)}
    if not rules:
        raise InputError(
            f"config.targets is {NONE!r} and the task '{settings.task}' trains nothing of its own; "
            "give a pattern"
        )
    sites = lj.find_sites(task.apply, task.params, *task.inputs)
    frozen, trained = lj.attach(jax.random.key(settings.seed), task.params, rules, sites)
    words: dict[Any, Any] = {rule: method and describe(method) for rule, method in rules.items()}
    print(f"\n{sites.table(words)}\n\n{lj.summary(frozen, trained)}")
    if ignored := choices.unused("method", settings.method):
        print(f"note: {settings.method['name']} has no {', '.join(ignored)}; left out")
    return frozen, trained


def train(
    task: Task,
    frozen: Any,
    trained: Any,
    optimizer: Optimizer,
    settings: Settings,
    before: Measured,
    stage: Path,
) -> Result:
    """Train from a fresh state, progress shown and a line of metrics a step, and measure again."""
    options, started = settings.train, time.perf_counter()
    loss = adapter_loss(task.loss, dropout=_drops(frozen))
    step = make_step(loss, optimizer.transform, accumulate=options.accumulate, seed=settings.seed)
    with live_line() as show:
        outcome = fit(
            step,
            init_state(trained, optimizer.transform),
            frozen,
            task.batches,
            steps=options.steps,
            schedule=optimizer.schedule,
            observers=(show, json_lines(stage / "metrics.jsonl")),
            watch=Watch(factor=options.diverged),
        )
    seconds = time.perf_counter() - started
    after = None if outcome.interrupted else task.measure(frozen, outcome.trained)
    return Result(before, after, outcome, lj.tree.count(trained), seconds)


def make_optimizer(settings: Settings) -> Optimizer:
    """Make the optimizer that the settings describe."""
    names = ("steps", "learning_rate", "warmup", "final", "weight_decay", "b1", "b2", "clip")
    with in_config("train."):
        return adamw(**{name: getattr(settings.train, name) for name in names})


def _batch_alone(settings: Settings) -> TrainSettings:
    """The one setting of training that a task's batches depend on."""
    return TrainSettings(batch=settings.train.batch)


def _save(
    workdir: Path,
    stage: Path,
    task: Task,
    frozen: Any,
    settings: Settings,
    result: Result,
    peft: bool,
) -> None:
    """Save the adapter with its card, and the scores as the last lines of the metrics."""
    outcome, metrics = result.outcome, stage / "metrics.jsonl"
    merged = lj.merge(frozen, outcome.trained)
    error = merge_error(task.apply, frozen, outcome.trained, merged, task.inputs)
    card = saving.make_card(task, settings, result.before, result.after, outcome, error)
    saving.save(workdir / "adapter", task, frozen, outcome.trained, peft=peft, card=card)
    for name, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            split = settings.evaluate.split
            append(metrics, {"event": name, "split": split, **measured.record()})
    end = {"event": "end", "step": outcome.step, "stopped": outcome.stopped, "merge_error": error}
    append(metrics, end)


def _draw(stage: Path, frozen: Any) -> None:
    """Draw the losses, last of all: a picture is not worth a finished adapter."""
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    try:
        if losses and not loss_picture(stage / "loss.png", losses, title=_title(frozen)):
            print('no loss.png: matplotlib is not installed; pip install "lora-jax[plots]"')
    except OSError as error:
        print(f"no loss.png: {error}")


def _say_result(task: Task, settings: Settings, result: Result) -> None:
    split, outcome = settings.evaluate.split, result.outcome
    if outcome.stopped:
        print(f"training stopped: {outcome.stopped}; the adapter of step {outcome.step} is kept")
        if not outcome.interrupted:
            print("try a lower config.train.learning_rate or a longer config.train.warmup")
    if result.after is not None:
        print(f"\n{split} before: {result.before}\n{split} after:  {result.after}\n")
    if task.show:
        print(task.show(result.before, result.after))


def _drops(frozen: Any) -> bool:
    """Whether any adapter has dropout."""
    methods = [node.method for node in lj.adapted(frozen).values()]
    return any(method.hyper.get("dropout", 0.0) for method in methods)


def _title(frozen: Any) -> str:
    names = sorted({describe(node.method) for node in lj.adapted(frozen).values()})
    return names[0] if len(names) == 1 else f"{len(names)} methods"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
