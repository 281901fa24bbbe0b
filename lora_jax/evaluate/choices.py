"""Multiple choice: the answer to which the model gives the highest probability."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.evaluate.interval import wilson

Batch = Mapping[str, Any]


class Accuracy(NamedTuple):
    """A share of right answers with its 95 % interval.

    >>> print(Accuracy.of(89, 100))
    89.0 % (95 % interval 81.4 to 93.7, n = 100)
    """

    correct: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, total: int) -> "Accuracy":
        """Count `correct` answers among `total`."""
        return cls(correct, total, *wilson(correct, total))

    @property
    def share(self) -> float:
        """Right answers over all answers."""
        return self.correct / self.total

    @property
    def name(self) -> str:
        """What is measured."""
        return "accuracy"

    @property
    def value(self) -> float:
        """The share."""
        return self.share

    def record(self) -> dict[str, float]:
        """The accuracy as numbers for a file."""
        return {"accuracy": self.share, "low": self.low, "high": self.high, "examples": self.total}

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.1f} % (95 % interval {100 * self.low:.1f} to "
            f"{100 * self.high:.1f}, n = {self.total})"
        )


def answer_logprobs(
    hidden: Callable[..., jax.Array], logits: Callable[[Any, jax.Array], jax.Array]
) -> Callable[[Any, Batch], jax.Array]:
    """Make `scores(params, batch)`: log-probabilities of the answers, float32.

    A batch with "choices" [C] is scored by the next token at `batch["at"][:, 0]`: [B, C]. Without,
    each row's own answer is scored, summed over its tokens: [B].
    """

    def scores(params: Any, batch: Batch) -> jax.Array:
        body = hidden(params, batch["ids"], mask=batch["mask"])
        if "choices" in batch:
            last = jnp.take_along_axis(body, batch["at"][:, :1, None], axis=1)[:, 0]
            table = jax.nn.log_softmax(logits(params, last).astype(jnp.float32))
            return table[:, batch["choices"]]
        scored = jnp.take_along_axis(body, batch["at"][..., None], axis=1)
        table = jax.nn.log_softmax(logits(params, scored).astype(jnp.float32))
        chosen = jnp.take_along_axis(table, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(chosen * batch["weights"], axis=-1)

    return scores


def choice_logprobs(
    scores: Callable[[Batch], Any], batches: Iterable[tuple[np.ndarray, Batch]], choices: int
) -> np.ndarray:
    """Score every choice after every prompt: [prompts, choices] log-probabilities.

    `scores(batch)` is a compiled `answer_logprobs` with its parameters, `batches` come from
    `lora_jax.data.choice_batches`: the numbers of their rows, and the rows.
    """
    numbers, found = [], []
    for rows, batch in batches:
        numbers.append(rows)
        found.append(np.asarray(scores(batch))[: len(rows)])
    ordered = np.concatenate(found)[np.argsort(np.concatenate(numbers))]
    return ordered.reshape(-1, choices)


def find_choices(answers: Sequence[str], *, most: int = 8) -> tuple[str, ...]:
    """Return the distinct answers in sorted order, or () when there are more than `most`.

    >>> find_choices([" yes", " no", " yes"])
    (' no', ' yes')
    """
    distinct = sorted(set(answers))
    return tuple(distinct) if 2 <= len(distinct) <= most else ()


def answer_numbers(answers: Sequence[str], choices: Sequence[str]) -> np.ndarray:
    """Return the index of each answer among the choices, or an InputError naming the stranger."""
    places = {choice: number for number, choice in enumerate(choices)}
    strange = next((answer for answer in answers if answer not in places), None)
    if strange is not None:
        raise InputError(f"the answer {strange!r} is none of the choices {tuple(choices)!r}")
    return np.array([places[answer] for answer in answers])
