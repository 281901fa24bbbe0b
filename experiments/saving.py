"""Adapters written by a run: with the base they belong to, and a card of what was measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.settings import Settings
from experiments.tasks.task import Measured, Task
from lora_jax.errors import InputError
from lora_jax.io import native
from lora_jax.io.card import Card, Metric
from lora_jax.io.native import save_adapter
from lora_jax.io.peft import save_peft
from lora_jax.io.peft.files import CONFIG, NOTES, README, WEIGHTS
from lora_jax.io.swap import whole_folder
from lora_jax.train import Outcome

FILES = {CONFIG, NOTES, README, WEIGHTS, native.WEIGHTS, native.NOTES}


def save(
    folder: Path, task: Task, frozen: Any, trained: Any, *, peft: bool, card: Card | None = None
) -> None:
    """Save an adapter in PEFT's format or in ours, with the base's source and fingerprint.

    It replaces an adapter of either format.
    """
    source = task.source
    known = {"source": source.uri, "fingerprint": source.fingerprint} if source else {}
    provenance: dict[str, Any] = {**known, **task.record}
    with whole_folder(folder.resolve(), FILES) as place:
        new = place / "new"
        if peft:
            name = task.name or (source.name if source else "base")
            save_peft(new, frozen, trained, base_name=name, card=card, provenance=provenance)
        else:
            save_adapter(new, frozen, trained, provenance=provenance)
        for file in new.iterdir():
            file.replace(place / file.name)
        new.rmdir()


def rehearse(stage: Path, task: Task, frozen: Any, trained: Any) -> bool:
    """Save the fresh adapter once and drop it: what cannot be saved fails before training.

    Returns whether PEFT's format holds it; otherwise ours does, and a line says why.
    """
    folder = stage / "rehearsal"
    try:
        save(folder, task, frozen, trained, peft=task.peft)
        peft = task.peft
    except InputError as error:
        if not task.peft:
            raise
        print(f"note: saved as {native.WEIGHTS}, not in PEFT's format: {error}")
        save(folder, task, frozen, trained, peft=False)
        peft = False
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return peft


def check_replaceable(folder: Path) -> None:
    """Raise InputError when saving an adapter in `folder` would delete other files."""
    if not folder.exists():
        return
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - FILES):
        raise InputError(
            f"'{folder}' holds {', '.join(others[:5])}, which saving an adapter there would "
            "delete; give another --workdir"
        )


def make_card(
    task: Task,
    settings: Settings,
    before: Measured,
    after: Measured | None,
    outcome: Outcome,
    merge_error: float | None,
) -> Card:
    """Gather what the run knows for the model card."""
    card: Card = {
        "data": task.about,
        "seed": settings.seed,
        "hyper": {"schedule": "warm-up and cosine", **asdict(settings.train)},
        **task.card,
    }
    if merge_error is not None:
        card["merge_error"] = merge_error
    if outcome.stopped:
        card["limits"] = f"Training ended early: {outcome.stopped}."
    if after is not None:
        card["metrics"] = [_metric(settings.evaluate.split, before, after)]
    return card


def _metric(split: str, before: Measured, after: Measured) -> Metric:
    old, new = before.score, after.score
    metric: Metric = {"name": f"{split} {new.name}", "before": old.value, "after": new.value}
    if new.low is not None and new.high is not None:
        metric["interval"] = (new.low, new.high)
    if "examples" in (record := new.record()):
        metric["examples"] = int(record["examples"])
    return metric
