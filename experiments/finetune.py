"""Fine-tune a model on prompts and answers, and measure it before and after.

python -m experiments.finetune --config=configs/quickstart.py --config.method.rank=4
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

import lora_jax as lj
from experiments import cli, saving
from experiments.measure import Measured, make_measure, merge_error, show_examples
from experiments.run_folder import staged
from experiments.settings import Settings, make_rules, resolve, unused_options
from experiments.task import Task, load_task
from lora_jax.errors import InputError
from lora_jax.io.peft.notes import describe
from lora_jax.models import load
from lora_jax.models.model import Model
from lora_jax.train import (
    Optimizer,
    Outcome,
    Watch,
    adamw,
    adapter_loss,
    answer_loss,
    fit,
    init_state,
    make_step,
)
from lora_jax.train.report import append, json_lines, live_line, loss_picture


class Adaptation(NamedTuple):
    """A model with adapters on it."""

    model: Model
    frozen: Any
    trained: Any


class Result(NamedTuple):
    """What a run found. `after` is None when Ctrl-C ended it."""

    before: Measured
    after: Measured | None
    outcome: Outcome


def finetune(config: Any, workdir: str | Path) -> Result:
    """Run a config and write config.json, metrics.jsonl, adapter/ and loss.png into `workdir`.

    What was there before stays whole until the new files are. InputError for a mistake in the
    config or in what it names, before anything is trained.
    """
    settings = resolve(config)
    make_rules(settings)  # a wrong method or rank fails before a model is fetched
    optimizer = make_optimizer(settings)
    saving.check_replaceable(Path(workdir) / "adapter")
    with staged(workdir) as stage:
        _write_json(stage / "config.json", asdict(settings))
        model = load_model(settings)
        task = load_task(model, settings)
        batches = task.batches()
        adaptation = adapt(model, settings)
        saving.rehearse(stage, adaptation.frozen, adaptation.trained)
        measure = make_measure(model, task)
        _say_task(task)
        print(f"measuring on {len(task.held_out)} held-out examples ...", flush=True)
        before = measure(adaptation.frozen, adaptation.trained)
        print(f"{settings.evaluate.split} before: {before.score}", flush=True)
        losses: list[float] = []
        outcome = train(adaptation, batches, optimizer, settings, stage, losses)
        after = None if outcome.interrupted else measure(adaptation.frozen, outcome.trained)
        result = Result(before, after, outcome)
        _save(Path(workdir), stage, adaptation, task, result)
        _draw(stage / "loss.png", losses, adaptation.frozen)
    _say_result(task, result)
    return result


def load_model(settings: Settings) -> Model:
    """Load the base, with float32 parameters and the compute settings of the config."""
    started = time.perf_counter()
    model = load(settings.model.source)
    print(f"loaded {settings.model.source} in {time.perf_counter() - started:.1f} s", flush=True)
    return model.with_options(dtype=jnp.dtype(settings.model.dtype), remat=settings.model.remat)


def adapt(model: Model, settings: Settings) -> Adaptation:
    """Find the model's kernels and attach the method to those that `targets` chooses."""
    rules = make_rules(settings)
    sites = lj.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    frozen, trained = lj.attach(jax.random.key(settings.seed), model.params, rules, sites)
    notes = {path: describe(node.method) for path, node in lj.adapted(frozen).items()}
    print(f"\n{sites.table(notes)}\n\n{lj.summary(frozen, trained)}")
    if ignored := unused_options(settings.method):
        print(f"note: {settings.method['name']} has no {', '.join(ignored)}; left out")
    return Adaptation(model, frozen, trained)


def train(
    adaptation: Adaptation,
    batches: Any,
    optimizer: Optimizer,
    settings: Settings,
    stage: Path,
    losses: list[float],
) -> Outcome:
    """Train from a fresh state: progress shown, a line of metrics a step, losses collected."""
    options, model = settings.train, adaptation.model
    loss = adapter_loss(answer_loss(model.hidden, model.logits), dropout=_drops(adaptation.frozen))
    step = make_step(loss, optimizer.transform, accumulate=options.accumulate, seed=settings.seed)
    state = init_state(adaptation.trained, optimizer.transform)
    with live_line() as show:
        observers = (
            show,
            json_lines(stage / "metrics.jsonl"),
            lambda progress: losses.append(progress.loss),
        )
        return fit(
            step,
            state,
            adaptation.frozen,
            batches,
            steps=options.steps,
            schedule=optimizer.schedule,
            observers=observers,
            watch=Watch(factor=options.diverged),
        )


def make_optimizer(settings: Settings) -> Optimizer:
    """Make the optimizer that the settings describe."""
    names = ("steps", "learning_rate", "warmup", "final", "weight_decay", "b1", "b2", "clip")
    return adamw(**{name: getattr(settings.train, name) for name in names})


def define_flags() -> None:
    """Define the flags of this command."""
    config_flags.DEFINE_config_file("config", None, "What to run: configs/quickstart.py")
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/CONFIG by default.")


def main() -> int:
    """Run the config of the command line; 1 when training was lost, 130 after Ctrl-C."""
    options = flags.FLAGS
    if options.config is None:
        raise InputError("give a config: --config=configs/quickstart.py")
    workdir = options.workdir or str(Path("runs") / cli.config_stem())
    result = finetune(options.config, workdir)
    names = sorted(entry.name for entry in Path(workdir).iterdir())
    print(f"written to {workdir}: {', '.join(names)}")
    if result.outcome.stopped is None:
        return 0
    return 130 if result.outcome.interrupted else 1


def _save(workdir: Path, stage: Path, adaptation: Adaptation, task: Task, result: Result) -> None:
    """Save the adapter with its card, and the scores as the last lines of the metrics."""
    settings, outcome = task.settings, result.outcome
    model, frozen = adaptation.model, adaptation.frozen
    ids = np.array(task.prompts(task.held_out[:1]), np.int32)
    error = merge_error(model, frozen, outcome.trained, lj.merge(frozen, outcome.trained), ids)
    card = saving.make_card(task, result.before, result.after, outcome, error)
    saving.save(workdir / "adapter", model, frozen, outcome.trained, card, settings)
    for name, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            record = {"event": name, "split": settings.evaluate.split, **measured.record()}
            append(stage / "metrics.jsonl", record)
    end = {"event": "end", "step": outcome.step, "stopped": outcome.stopped, "merge_error": error}
    append(stage / "metrics.jsonl", end)


def _draw(path: Path, losses: list[float], frozen: Any) -> None:
    """Draw the losses, last of all: a picture is not worth a finished adapter."""
    try:
        if losses and not loss_picture(path, losses, title=_title(frozen)):
            print('no loss.png: matplotlib is not installed; pip install "lora-jax[plots]"')
    except OSError as error:
        print(f"no loss.png: {error}")


def _say_task(task: Task) -> None:
    sizes = ", ".join(
        f"{len(s)} {n}" for n, s in zip(task.splits._fields, task.splits, strict=True)
    )
    answers = f"; answers: {', '.join(map(repr, task.choices))}" if task.choices else ""
    print(f"\ndata {task.settings.data.source}: {sizes}{answers}", flush=True)


def _say_result(task: Task, result: Result) -> None:
    split, outcome = task.settings.evaluate.split, result.outcome
    if outcome.stopped:
        print(f"training stopped: {outcome.stopped}; the adapter of step {outcome.step} is kept")
        if not outcome.interrupted:
            print("try a lower train.learning_rate or a longer train.warmup")
    if result.after is not None:
        print(f"\n{split} before: {result.before.score}\n{split} after:  {result.after.score}\n")
    print(show_examples(task, result.before, result.after, task.settings.evaluate.show))


def _drops(frozen: Any) -> bool:
    """Whether any adapter has dropout."""
    methods = [node.method for node in lj.adapted(frozen).values()]
    return any(method.hyper.get("dropout", 0.0) for method in methods)


def _title(frozen: Any) -> str:
    names = sorted({describe(node.method) for node in lj.adapted(frozen).values()})
    return names[0] if len(names) == 1 else f"{len(names)} methods"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, define_flags)
