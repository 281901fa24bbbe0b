"""One run: a base is adapted to a task, and measured before and after."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lora_jax as lj
from experiments import choices, saving
from experiments.changes import Change
from experiments.measure import merge_error
from experiments.optimizers import make_optimizer, make_schedule
from experiments.rules import NONE, make_rules, target_of
from experiments.run_folder import staged
from experiments.settings import Settings, TrainSettings, in_config, resolve
from experiments.storages import stored
from experiments.tasks import TASKS
from experiments.tasks.task import Measured, Task
from experiments.tasks.virtual import check_prompt
from lora_jax.calibrate import with_data
from lora_jax.errors import InputError
from lora_jax.io.peft.notes import describe
from lora_jax.train import (
    Outcome,
    Watch,
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
        self._before: dict[str, Measured] = {}

    def task(self, settings: Settings) -> Task:
        """Load the task, unless the one before was the same."""
        same: Any = {"method": {}, "dynamics": {}, "quantize": {}, "targets": ""}
        key = replace(settings, **same, train=_batch_alone(settings))
        if self._task is None or self._task[0] != key:
            self._task, self._before = None, {}  # let go of one base before the next is loaded
            self._task = key, TASKS[settings.task](settings)
        return self._task[1]

    def before(self, frozen: Any, trained: Any, settings: Settings) -> Measured:
        """Measure the task's base, once for each way to keep it: fresh adapters change nothing."""
        assert self._task is not None
        kept = repr(settings.quantize)
        if kept not in self._before:
            self._before[kept] = self._task[1].measure(frozen, trained)
        return self._before[kept]


def finetune(config: Any, workdir: str | Path, shared: Shared | None = None) -> Result:
    """Run a config and write config.json, metrics.jsonl, adapter/ and loss.png into `workdir`.

    What was there before stays whole until the new files are. InputError for a mistake in the
    config or in what it names, before anything is trained.
    """
    settings, workdir = resolve(config), Path(workdir)
    change = check(settings)
    saving.check_replaceable(workdir / "adapter")
    shared = shared or Shared()
    with staged(workdir) as stage:
        _write_json(stage / "config.json", asdict(settings))
        task = shared.task(settings)
        frozen, trained, sites = adapt(task, settings, change)
        peft = saving.rehearse(stage, task, frozen, trained)
        print(f"\n{task.about}\nmeasuring on the {settings.evaluate.split} split ...", flush=True)
        before = shared.before(frozen, trained, settings)
        print(f"{settings.evaluate.split} before: {before}", flush=True)
        result = train(task, frozen, trained, sites, change, settings, before, stage)
        _save(workdir, stage, task, settings, result, peft)
        _draw(stage, frozen)
    _say_result(task, settings, result)
    return result


def adapt(task: Task, settings: Settings, change: Change) -> tuple[Any, Any, lj.Sites]:
    """Find the base's kernels and attach the method to those that `targets` chooses."""
    rules = {**task.fresh, **make_rules(settings)}
    if not rules:
        raise InputError(
            f"config.targets is {NONE!r} and the task '{settings.task}' trains nothing of its own; "
            "give a pattern"
        )
    sites = lj.find_sites(task.apply, task.params, *task.inputs)
    words: dict[Any, Any] = {rule: method and describe(method) for rule, method in rules.items()}
    print(f"\n{sites.table(words)}")
    key = jax.random.key(settings.seed)
    rules = _with_data(rules, task, sites, settings.train.calibrate)
    rules = change.rules(rules, key=key, task=task, sites=sites, steps=settings.train.steps)
    base = choices.make("quantize", settings.quantize)
    rules = stored(base, target_of(base.targets), rules, sites)
    frozen, trained = lj.attach(key, task.params, rules, sites)
    print(f"\n{lj.summary(frozen, trained)}")
    for kind in choices.KINDS:
        section = getattr(settings, kind)
        if ignored := choices.unused(kind, section):
            print(f"note: {kind} {section['name']} has no {', '.join(ignored)}; left out")
    return frozen, trained, sites


def _with_data(rules: Any, task: Task, sites: lj.Sites, count: int) -> Any:
    """The rules, with what their methods' starts want to know of the first batches."""
    if not any(isinstance(m, lj.Method) and m.data is not None for m in rules.values()):
        return rules
    batches = [task.batches(i) for i in range(count)]
    mask = (lambda batch: batch["mask"]) if "mask" in batches[0] else None
    how: Any = {"loss": task.loss, "apply": task.loss, "mask": mask}
    return with_data(rules, task.params, sites, batches, **how)


def train(
    task: Task,
    frozen: Any,
    trained: Any,
    sites: lj.Sites,
    change: Change,
    settings: Settings,
    before: Measured,
    stage: Path,
) -> Result:
    """Train from a fresh state, progress shown and a line of metrics a step, and measure again."""
    options, started = settings.train, time.perf_counter()
    loss = adapter_loss(task.loss, dropout=_drops(frozen))
    optimizer = change.optimizer(make_optimizer(options, frozen, trained, sites))
    transform, dynamics = optimizer.transform, change.dynamics(options.steps)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    how: Any = {"accumulate": options.accumulate, "clip": options.clip, "seed": settings.seed}
    with in_config("dynamics: "), live_line() as show:
        outcome = fit(
            make_step(loss, transform, **how, dynamics=dynamics),
            init_state(trained, transform, frozen=frozen, dynamics=dynamics),
            frozen,
            task.batches,
            steps=options.steps,
            schedule=optimizer.schedule,
            observers=(show, json_lines(stage / "metrics.jsonl")),
            watch=Watch(factor=options.diverged),
            dynamics=dynamics,
            between=change.between and change.between(key, transform),
        )
    seconds, count = time.perf_counter() - started, lj.tree.count(trained)
    kept = change.finish(outcome.frozen, outcome.trained)
    outcome = outcome._replace(frozen=kept[0], trained=kept[1])
    after = None if outcome.interrupted else task.measure(*kept)
    return Result(before, after, outcome, count, seconds)


def check(settings: Settings) -> Change:
    """Find a wrong method, schedule or target before a model is fetched.

    Returns what changes during the run.
    """
    rules = make_rules(settings)
    make_schedule(settings.train)
    choices.make("quantize", settings.quantize)
    check_prompt(settings)
    change: Change = choices.make("dynamics", settings.dynamics)
    with in_config("dynamics: "):
        change.dynamics(settings.train.steps)
        change.suits(method.innermost for method in rules.values() if method)
    return change


def _batch_alone(settings: Settings) -> TrainSettings:
    """The one setting of training that a task's batches depend on."""
    return TrainSettings(batch=settings.train.batch)


def _save(
    workdir: Path, stage: Path, task: Task, settings: Settings, result: Result, peft: bool
) -> None:
    """Save the adapter with its card, and the scores as the last lines of the metrics."""
    outcome, metrics = result.outcome, stage / "metrics.jsonl"
    frozen, trained = outcome.frozen, outcome.trained
    mergeable = all(node.method.weight for node in lj.adapted(frozen).values())
    merged = lj.merge(frozen, trained) if mergeable else None
    error = merged and merge_error(task.apply, frozen, trained, merged, task.inputs)
    card = saving.make_card(task, settings, result.before, result.after, outcome, error)
    saving.save(workdir / "adapter", task, frozen, trained, peft=peft, card=card)
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
