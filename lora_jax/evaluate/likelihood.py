"""How well a model predicts held-out tokens, for tasks without a list of choices."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

_Z = 1.959964


class Likelihood(NamedTuple):
    """Mean loss in nats for each of `tokens` scored tokens, and the 95 % interval of that mean.

    >>> print(Likelihood(math.log(4.0), 100))
    perplexity 4.00 (n = 100 tokens)
    >>> print(Likelihood(math.log(4.0), 100, margin=math.log(2.0)))
    perplexity 4.00 (95 % interval 2.00 to 8.00, n = 100 tokens)
    """

    loss: float
    tokens: int
    margin: float | None = None
    """Half the interval, in nats; None where there was only one batch to tell it from."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return _exp(self.loss)

    @property
    def name(self) -> str:
        """What is measured."""
        return "perplexity"

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.perplexity

    @property
    def low(self) -> float | None:
        """The interval's lower end, as a perplexity."""
        return None if self.margin is None else _exp(self.loss - self.margin)

    @property
    def high(self) -> float | None:
        """The interval's upper end, as a perplexity."""
        return None if self.margin is None else _exp(self.loss + self.margin)

    def record(self) -> dict[str, float]:
        """The perplexity as numbers for a file."""
        ends = {"low": self.low, "high": self.high}
        interval = {name: end for name, end in ends.items() if end is not None}
        return {"perplexity": self.perplexity, **interval, "tokens": self.tokens}

    def __str__(self) -> str:
        known = self.margin is not None
        interval = f"95 % interval {self.low:.2f} to {self.high:.2f}, " if known else ""
        return f"perplexity {self.perplexity:.2f} ({interval}n = {self.tokens} tokens)"


def mean_loss(
    loss: Callable[[Mapping[str, Any]], tuple[Any, Any]],
    batches: Iterable[tuple[Any, Mapping[str, Any]]],
) -> Likelihood:
    """Average `loss(batch) -> (sum, weight)` over batches, weighted by scored tokens.

    `batches` come from `lora_jax.data.held_out_batches`; their row numbers do not matter here. The
    interval takes the batches as independent: tokens of one text are not. It is the linearised one
    of a ratio of sums, 1.96 sqrt(n / (n - 1) sum_i (s_i - mean w_i)^2) / sum_i w_i.

    >>> str(mean_loss(lambda batch: batch["loss"], [(0, {"loss": (1.0, 2.0)})]))
    'perplexity 1.65 (n = 2 tokens)'
    """
    parts = [tuple(map(float, loss(batch))) for _, batch in batches]
    weight = sum(count for _, count in parts)
    mean = sum(part for part, _ in parts) / weight
    return Likelihood(mean, round(weight), _margin(parts, mean, weight))


def _margin(parts: list[tuple[float, ...]], mean: float, weight: float) -> float | None:
    if len(parts) < 2:
        return None
    squares = sum((part - mean * count) ** 2 for part, count in parts)
    return _Z * math.sqrt(len(parts) / (len(parts) - 1) * squares) / weight


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
