"""Means and root mean squares of held-out examples, with how sure they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.errors import InputError

_Z = 1.959964


class Estimate(NamedTuple):
    """A quantity averaged over `total` examples with its 95 % interval (normal approximation).

    >>> print(Estimate.mean("reciprocal rank", [0.2, 0.4, 0.6, 0.8]))
    reciprocal rank 0.500 (95 % interval 0.247 to 0.753, n = 4)
    """

    name: str
    value: float
    low: float
    high: float
    total: int

    @classmethod
    def mean(cls, name: str, values: Sequence[float] | np.ndarray) -> "Estimate":
        """The mean of one value an example, and 1.96 standard errors each way."""
        values = _checked(name, values)
        mean, margin = float(values.mean()), _margin(values)
        return cls(name, mean, mean - margin, mean + margin, len(values))

    @classmethod
    def root_mean_square(cls, name: str, errors: Sequence[float] | np.ndarray) -> "Estimate":
        """The root of the mean square of one error an example; the interval is that of the mean.

        >>> print(Estimate.root_mean_square("error", [1.0, -1.0, 1.0, -1.0]))
        error 1.000 (95 % interval 1.000 to 1.000, n = 4)
        """
        squares = np.square(_checked(name, errors))
        mean, margin = float(squares.mean()), _margin(squares)
        low = math.sqrt(max(mean - margin, 0.0))
        return cls(name, math.sqrt(mean), low, math.sqrt(mean + margin), len(squares))

    def record(self) -> dict[str, float]:
        """The estimate as numbers for a file."""
        key = self.name.replace(" ", "_")
        return {key: self.value, "low": self.low, "high": self.high, "examples": self.total}

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, "
            f"n = {self.total})"
        )


def _checked(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise InputError(
            f"{name} of values of shape {array.shape}; give one value for each of two examples "
            "or more"
        )
    return array


def _margin(values: np.ndarray) -> float:
    return _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
