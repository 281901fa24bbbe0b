"""Adapters written by a run: with the base they belong to, and a card of what was measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.measure import Measured
from experiments.settings import Settings
from experiments.task import REVIEWS, Task
from lora_jax.errors import InputError
from lora_jax.evaluate import Accuracy
from lora_jax.io.card import Card, Metric
from lora_jax.io.peft import save_peft
from lora_jax.io.peft.files import CONFIG, NOTES, README, WEIGHTS
from lora_jax.models.model import Model
from lora_jax.train import Outcome


def save(
    folder: Path, model: Model, frozen: Any, trained: Any, card: Card, settings: Settings
) -> None:
    """Save an adapter in PEFT's format, with the base's source and fingerprint."""
    source = model.source
    provenance = {"source": source.uri, "fingerprint": source.fingerprint} if source else {}
    name = settings.model.name or (source.name if source else "base")
    save_peft(folder, frozen, trained, base_name=name, card=card, provenance=provenance)


def rehearse(stage: Path, frozen: Any, trained: Any) -> None:
    """Save the fresh adapter once and drop it: what cannot be saved fails before training."""
    folder = save_peft(stage / "rehearsal", frozen, trained, base_name="rehearsal")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def check_replaceable(folder: Path) -> None:
    """Raise InputError when saving an adapter in `folder` would delete other files."""
    if not folder.exists():
        return
    known = {CONFIG, NOTES, README, WEIGHTS}
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - known):
        raise InputError(
            f"'{folder}' holds {', '.join(others[:5])}, which saving an adapter there would "
            "delete; give another --workdir"
        )


def make_card(
    task: Task, before: Measured, after: Measured | None, outcome: Outcome, merge_error: float
) -> Card:
    """Gather what the run knows for the model card."""
    settings = task.settings
    card: Card = {
        "seed": settings.seed,
        "data": _data_name(settings.data.source),
        "data_sha256": task.splits.sha256(),
        "examples": {n: len(s) for n, s in zip(task.splits._fields, task.splits, strict=True)},
        "hyper": {"optimizer": "AdamW, warm-up and cosine", **asdict(settings.train)},
        "merge_error": merge_error,
    }
    if outcome.stopped:
        card["limits"] = f"Training ended early: {outcome.stopped}."
    if after is not None:
        card["metrics"] = [_metric(settings.evaluate.split, before, after)]
    return card


def _metric(split: str, before: Measured, after: Measured) -> Metric:
    old, new = before.score, after.score
    if isinstance(old, Accuracy) and isinstance(new, Accuracy):
        return {
            "name": f"{split} accuracy",
            "before": old.share,
            "after": new.share,
            "interval": (new.low, new.high),
            "examples": new.total,
        }
    perplexities = [measured.record()["perplexity"] for measured in (before, after)]
    return {
        "name": f"{split} perplexity",
        "before": perplexities[0],
        "after": perplexities[1],
    }


def _data_name(source: str) -> str:
    if source == REVIEWS:
        return "film-review snippets with readers' ratings, vaderSentiment 3.3.2"
    return Path(source).name
