"""Examples as token ids, and batches of one shape as a pure function of (seed, step).

A sequence of n tokens gives n - 1 inputs. Only the answer is scored, so a batch carries the few
positions that predict it instead of a weight for every position:

    ids      [B, T] int32    inputs, padded on the right
    mask     [B, T] bool     true on real tokens
    at       [B, P] int32    positions whose next token is scored
    targets  [B, P] int32    those next tokens
    weights  [B, P] float32  1 for a scored token, 0 for filling
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lora_jax.data.examples import Example
from lora_jax.errors import InputError

Batch = dict[str, np.ndarray]


class Encoded(NamedTuple):
    """A tokenised example: prompt and answer in `ids`, the answer from index `start` on."""

    ids: tuple[int, ...]
    start: int


def encode(
    examples: Sequence[Example],
    tokenize: Callable[[str], Sequence[int]],
    tokenize_answer: Callable[[str], Sequence[int]] | None = None,
    *,
    length: int,
    end: int | None = None,
    truncate: bool = False,
) -> list[Encoded]:
    """Tokenise prompts and answers apart, so that the prompt's tokens stay a prefix.

    `tokenize_answer` is for a tokenizer that puts something before a prompt, and is `tokenize`
    otherwise. `length` is the most inputs a batch holds (a sequence may have one token more), `end`
    a token put after the answer. A longer example is an InputError that names it, unless
    `truncate`, which cuts the prompt on the left.

    >>> encode([Example("ab", "c")], lambda text: [ord(c) for c in text], length=3, end=0)
    [Encoded(ids=(97, 98, 99, 0), start=2)]
    """
    tokenize_answer = tokenize_answer or tokenize
    last = [] if end is None else [end]
    rows = []
    for number, example in enumerate(examples):
        prompt = list(tokenize(example.prompt))
        answer = [*tokenize_answer(example.completion), *last]
        rows.append(_fit(number, example, prompt, answer, length, truncate))
    return rows


def _fit(
    number: int, example: Example, prompt: list[int], answer: list[int], length: int, truncate: bool
) -> Encoded:
    """Join prompt and answer within length + 1 tokens."""
    surplus = len(prompt) + len(answer) - (length + 1)
    if surplus > 0 and not (truncate and surplus < len(prompt)):
        raise InputError(
            f"example {number} ({example.prompt[:40]!r}...) has {len(prompt)} prompt and "
            f"{len(answer)} answer tokens, {surplus} more than the length of {length} inputs "
            "holds; raise the length (at most the model's context), shorten the example, or set "
            "truncate to cut the prompt on the left"
        )
    if not prompt or not answer:
        raise InputError(
            f"example {number} ({example.prompt[:40]!r}) has {len(prompt)} prompt and "
            f"{len(answer)} answer tokens; both need at least one"
        )
    kept = prompt[max(surplus, 0) :]
    return Encoded((*kept, *answer), len(kept))


def collate(rows: Sequence[Encoded], *, length: int, answers: int, pad: int = 0) -> Batch:
    """Pad rows to `length` inputs and `answers` scored positions.

    >>> batch = collate([Encoded((5, 6, 7), 1)], length=4, answers=3)
    >>> batch["ids"].tolist(), batch["at"].tolist(), batch["targets"].tolist()
    ([[5, 6, 0, 0]], [[0, 1, 0]], [[6, 7, 0]])
    """
    count = len(rows)
    ids = np.full((count, length), pad, np.int32)
    mask = np.zeros((count, length), bool)
    at = np.zeros((count, answers), np.int32)
    targets = np.full((count, answers), pad, np.int32)
    weights = np.zeros((count, answers), np.float32)
    for row, (tokens, start) in enumerate(rows):
        inputs, scored = len(tokens) - 1, len(tokens) - start
        ids[row, :inputs], mask[row, :inputs] = tokens[:-1], True
        at[row, :scored] = np.arange(start - 1, inputs)
        targets[row, :scored], weights[row, :scored] = tokens[start:], 1.0
    return {"ids": ids, "mask": mask, "at": at, "targets": targets, "weights": weights}


@dataclass(frozen=True)
class Batches:
    """Training batches: `batches(step)` depends on (seed, step) and nothing else.

    Every epoch is a new permutation of all rows; a batch may straddle two epochs, so each row is
    seen once an epoch whatever the batch size.

    >>> rows = [Encoded((n, n + 1), 1) for n in range(3)]
    >>> batches = Batches(rows, size=3, length=2, seed=0)
    >>> sorted(batches(0)["ids"][:, 0].tolist())
    [0, 1, 2]
    >>> batches(7)["ids"].tolist() == batches(7)["ids"].tolist()
    True
    """

    rows: Sequence[Encoded]
    size: int
    length: int
    seed: int
    pad: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"a batch of {self.size} examples is empty; give at least 1")
        if not self.rows:
            raise InputError("there are no examples to make batches of")

    @cached_property
    def answers(self) -> int:
        """The most scored tokens of any row: the static P of every batch."""
        return max(len(row.ids) - row.start for row in self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the rows in this epoch.

        Sorting a bit generator's raw words: NumPy keeps that stream between versions, which it
        does not promise for `permutation`.
        """
        raw = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.rows))
        return np.argsort(raw, kind="stable")

    def __call__(self, step: int) -> Batch:
        """Make the batch of this step."""
        first = step * self.size
        places = [divmod(n, len(self.rows)) for n in range(first, first + self.size)]
        orders = {epoch: self.order(epoch) for epoch, _ in places}
        return collate(
            [self.rows[orders[epoch][place]] for epoch, place in places],
            length=self.length,
            answers=self.answers,
            pad=self.pad,
        )


def held_out_batches(
    rows: Sequence[Encoded], *, size: int, length: int, pad: int = 0, multiple: int = 16
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (row numbers [n], batch of `size` rows) over all rows, shortest rows first.

    A batch is only as wide as its longest row asks, rounded up to `multiple`, so short texts cost
    little and few shapes are compiled. The last batch is filled with rows of weight 0, beyond n.

    >>> rows = [Encoded((1, 2, 3), 2), Encoded((1, 2), 1), Encoded((4, 5), 1)]
    >>> [(n.tolist(), b["ids"].shape) for n, b in held_out_batches(rows, size=2, length=2)]
    [([1, 2], (2, 2)), ([0], (2, 2))]
    """
    if not rows:
        return
    order = np.argsort([len(row.ids) for row in rows], kind="stable")
    answers = max(len(row.ids) - row.start for row in rows)
    for first in range(0, len(rows), size):
        numbers = order[first : first + size]
        chosen = [rows[number] for number in numbers]
        widest = max(len(row.ids) - 1 for row in chosen)
        width = min(length, -(-widest // multiple) * multiple)
        batch = collate(chosen, length=width, answers=answers, pad=pad)
        yield numbers, _fill(batch, size)


def choice_batches(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    size: int,
    length: int,
    pad: int = 0,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (row numbers, batch) that let every choice be scored after every prompt.

    Choices of one token each need one row a prompt, and stand in the batch as "choices" [C]. Longer
    ones take a row for each prompt and choice, those of a prompt one after another.

    >>> batches = choice_batches([(1, 2)], [(3,), (4,)], size=1, length=8)
    >>> [(batch["ids"][0, :2].tolist(), batch["choices"].tolist()) for _, batch in batches]
    [([1, 2], [3, 4])]
    """
    if all(len(choice) == 1 for choice in choices):
        rows = [Encoded((*prompt, pad), len(prompt)) for prompt in prompts]
        extra = {"choices": np.array([choice[0] for choice in choices], np.int32)}
    else:
        rows = [Encoded((*p, *choice), len(p)) for p in prompts for choice in choices]
        extra = {}
    for numbers, batch in held_out_batches(rows, size=size, length=length, pad=pad):
        yield numbers, {**batch, **extra}


def _fill(batch: Batch, size: int) -> Batch:
    """Repeat the first row, with weight 0, up to `size` rows."""
    missing = size - len(batch["ids"])
    if not missing:
        return batch
    filled = {name: np.concatenate([a, np.repeat(a[:1], missing, 0)]) for name, a in batch.items()}
    filled["weights"][-missing:] = 0.0
    return filled
