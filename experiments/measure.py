"""What a run says of its model: a score on held-out examples, and some of their answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from experiments.task import Task
from lora_jax.data import choice_batches, held_out_batches
from lora_jax.evaluate import (
    Accuracy,
    Likelihood,
    answer_logprobs,
    answer_numbers,
    choice_logprobs,
    mean_loss,
)
from lora_jax.models.model import Model
from lora_jax.train import answer_loss

Measure = Callable[[Any, Any], "Measured"]


class Measured(NamedTuple):
    """A score, and for multiple choice the log-probability of every choice [examples, choices]."""

    score: Accuracy | Likelihood
    logprobs: np.ndarray | None

    def record(self) -> dict[str, float]:
        """Give the score as numbers for a file."""
        score = self.score
        if isinstance(score, Accuracy):
            names = ("accuracy", "low", "high", "examples")
            return dict(zip(names, (score.share, score.low, score.high, score.total), strict=True))
        return {"perplexity": score.perplexity, "answer_tokens": score.tokens}


def make_measure(model: Model, task: Task) -> Measure:
    """Make `measure(frozen, trained)` on the run's held-out split.

    Accuracy by comparing the log-probabilities of the possible answers, where these are few;
    otherwise the perplexity of the right answer.
    """
    options = {"size": task.settings.evaluate.batch, "length": task.context, "pad": task.pad}
    if not task.choices:
        rows = task.rows(task.held_out, task.context)
        loss = _compiled(answer_loss(model.hidden, model.logits))
        return lambda frozen, trained: Measured(
            mean_loss(
                lambda batch: loss(frozen, trained, batch), held_out_batches(rows, **options)
            ),
            None,
        )
    prompts = task.prompts(task.held_out)
    choices = [task.answer_ids(choice) for choice in task.choices]
    right = answer_numbers([example.completion for example in task.held_out], task.choices)
    scores = _compiled(answer_logprobs(model.hidden, model.logits))

    def measure(frozen: Any, trained: Any) -> Measured:
        found = choice_logprobs(
            lambda batch: scores(frozen, trained, batch),
            choice_batches(prompts, choices, **options),
            len(choices),
        )
        correct = int((found.argmax(axis=1) == right).sum())
        return Measured(Accuracy.of(correct, len(right)), found)

    return measure


def show_examples(task: Task, before: Measured, after: Measured | None, count: int) -> str:
    """Spell some held-out examples with the model's choices before and after training."""
    lines = []
    for number, example in enumerate(task.held_out[:count]):
        lines.append(f"  {example.prompt!r} -> {example.completion!r}")
        for name, measured in (("before", before), ("after", after)):
            if measured is not None and measured.logprobs is not None:
                lines.append(f"    {name:6s} {_choice(measured.logprobs[number], task.choices)}")
    return "\n".join(lines)


def merge_error(model: Model, frozen: Any, trained: Any, merged: Any, ids: Any) -> float:
    """Largest difference of the merged model's logits on ids [B, T], relative to the largest."""
    ours = _compiled(model.apply)(frozen, trained, ids)
    theirs = jax.jit(model.apply)(merged, ids)
    return float(abs(theirs - ours).max() / abs(ours).max())


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lift `function(params, batch)` to compiled `(frozen, trained, batch)`, adapters factored."""
    factored = lj.factored(function)

    @jax.jit
    def run(frozen: Any, trained: Any, batch: Mapping[str, Any]) -> Any:
        return factored(lj.bind(frozen, trained), batch)

    return run


def _choice(logprobs: np.ndarray, choices: Sequence[str]) -> str:
    """The chosen answer, with its share of the probability of all choices."""
    shares = np.exp(logprobs - logprobs.max())
    best = int(shares.argmax())
    return f"{choices[best]!r} ({100 * shares[best] / shares.sum():.0f} %)"
