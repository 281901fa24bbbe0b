"""Plain text for a language model, every token scored: `config.task = "text"`."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import Settings, in_config
from experiments.tasks.language import ModelSettings as ModelSettings
from experiments.tasks.language import check_length, load_model, tokenizer_of
from experiments.tasks.task import Measured, Task, check_positive, compiled
from experiments.tasks.virtual import prompt_record, prompt_rules
from lora_jax.data import Batches, Encoded, collate
from lora_jax.data.prose import PYDOC, Document, Prose, prose_rows, read_prose, split_prose
from lora_jax.evaluate import Estimate
from lora_jax.evaluate.bootstrap import bootstrap
from lora_jax.io.card import Card
from lora_jax.train import answer_loss

Batch = Mapping[str, Any]
Rows = Callable[[Document], list[Encoded]]


@dataclass(frozen=True)
class Data:
    """Where the text lies, how many documents are held out, how long a row is."""

    source: str = PYDOC
    """Or a text file, or a folder of .txt, .md and .rst."""
    dev: int = 10
    test: int = 20
    length: int = 64

    def __post_init__(self) -> None:
        check_positive("data", self, "dev", "test", "length")


def make(settings: Settings) -> Task:
    """Load the language model, read and split the documents, cut them into rows."""
    prose = _read(settings.data, settings.seed)
    model = load_model(settings)
    check_length(model, settings)
    tokenizer = tokenizer_of(model, settings)
    length, pad = settings.data.length, tokenizer.pad_id or 0
    rows: Rows = partial(prose_rows, tokenize=tokenizer.encode, length=length)
    train = [row for document in prose.train for row in rows(document)]
    held_out = [
        _filled(rows(document), settings.evaluate.batch, length, pad)
        for document in getattr(prose, settings.evaluate.split)
    ]
    loss = answer_loss(model.hidden, model.logits)
    return Task(
        apply=model.apply,
        params=model.params,
        inputs=(jax.ShapeDtypeStruct((1, min(8, length)), jnp.int32),),
        loss=loss,
        batches=Batches(train, settings.train.batch, length, settings.seed, pad),
        measure=_make_measure(compiled(loss), held_out),
        about=_about(settings.data.source, prose),
        source=model.source,
        fresh=prompt_rules(settings.prompt),
        record=prompt_record(settings.prompt),
        name=settings.model.name,
        peft=True,
        card=_card(settings.data.source, prose),
        show=_show,
    )


def _read(data: Data, seed: int) -> Prose:
    with in_config("data: "):
        return split_prose(read_prose(data.source), dev=data.dev, test=data.test, seed=seed)


def _filled(rows: Sequence[Encoded], size: int, length: int, pad: int) -> list[Batch]:
    """A document as batches of one shape, the last filled with rows that score nothing."""
    empty = [Encoded((pad,), 1)] * (-len(rows) % size)
    full = [*rows, *empty]
    return [
        collate(full[at : at + size], length=length, answers=length, pad=pad)
        for at in range(0, len(full), size)
    ]


def _make_measure(
    loss: Callable[..., Any], documents: Sequence[Sequence[Batch]]
) -> Callable[[Any, Any], Measured]:
    """Perplexity over all documents; `details` are each one's loss and count of tokens [G, 2]."""

    def measure(frozen: Any, trained: Any) -> Measured:
        parts = [[loss(frozen, trained, batch) for batch in batches] for batches in documents]
        sums = np.array([np.sum(part, axis=0) for part in parts if part], np.float64)
        found = bootstrap(lambda totals: np.exp(totals[..., 0] / totals[..., 1]), sums)
        return Measured(Estimate("perplexity", *found, round(sums[:, 1].sum())), sums)

    return measure


def _show(before: Measured, after: Measured | None) -> str:
    """Say by how much perplexity fell, document by document."""
    if after is None:
        return ""
    sums = np.column_stack([after.details[:, 0] - before.details[:, 0], before.details[:, 1]])
    value, low, high = bootstrap(lambda totals: np.exp(totals[..., 0] / totals[..., 1]), sums)
    better = int(np.sum(sums[:, 0] < 0))
    return (
        f"  perplexity after / before: {value:.3f} (95 % interval {low:.3f} to {high:.3f}, "
        f"documents drawn again); lower on {better} of {len(sums)} documents"
    )


def _about(source: str, prose: Prose) -> str:
    sizes = [
        f"{len(part)} {name} ({sum(len(document.text) for document in part)} characters)"
        for name, part in zip(prose._fields, prose, strict=True)
    ]
    return f"text {_title(source)}: documents {', '.join(sizes)}"


def _card(source: str, prose: Prose) -> Card:
    return {
        "data": _title(source),
        "data_sha256": prose.sha256(),
        "examples": {name: len(part) for name, part in zip(prose._fields, prose, strict=True)},
    }


def _title(source: str) -> str:
    if source == PYDOC:
        return f"the language reference of Python {platform.python_version()} (pydoc_data.topics)"
    return Path(source).name
