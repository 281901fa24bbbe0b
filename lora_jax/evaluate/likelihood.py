"""How well a model predicts held-out answers, for tasks without a list of choices."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Likelihood(NamedTuple):
    """Mean loss in nats for each of `tokens` answer tokens.

    >>> print(Likelihood(math.log(4.0), 100))
    perplexity 4.00 (n = 100 answer tokens)
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.2f} (n = {self.tokens} answer tokens)"


def mean_loss(
    loss: Callable[[Mapping[str, Any]], tuple[Any, Any]],
    batches: Iterable[tuple[Any, Mapping[str, Any]]],
) -> Likelihood:
    """Average `loss(batch) -> (sum, weight)` over batches, weighted by answer tokens.

    `batches` come from `lora_jax.data.held_out_batches`; their row numbers do not matter here.
    """
    total = weight = 0.0
    for _, batch in batches:
        part, count = loss(batch)
        total, weight = total + float(part), weight + float(count)
    return Likelihood(total / weight, round(weight))
