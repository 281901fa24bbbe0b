"""How few trained numbers reach most of full fine-tuning's metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from lora_jax.errors import InputError


class Trial(NamedTuple):
    """One dimension: the best metric over the rates for every seed, their median, and the verdict.

    `rates` are the learning rates that gave `best`.
    """

    dimension: int
    best: tuple[float, ...]
    rates: tuple[float, ...]
    median: float
    passed: bool


class D90(NamedTuple):
    """The smallest dimension that passed (None if none did), the bar, and every trial by size."""

    dimension: int | None
    target: float
    table: tuple[Trial, ...]


def d90(
    evaluate: Callable[[int, float, int], float],
    full: float | Sequence[float],
    *,
    rates: Sequence[float],
    largest: int,
    smallest: int = 1,
    seeds: Sequence[int] = (0, 1, 2),
    fraction: float = 0.9,
    baseline: float = 0.0,
    ratio: float = 1.1,
) -> D90:
    """The least `d` whose metric reaches `target = baseline + fraction (full - baseline)`.

    `evaluate(dimension, rate, seed)` trains (with `lora_jax.intrinsic(dimension)`, say) and gives a
    metric of which more is better. A dimension's value is the median over `seeds` of the best over
    `rates`. First `smallest, 2 smallest, 4 smallest, ...` up to `largest` until one passes; then,
    between it (`hi`) and the one before (`lo`), `round(sqrt(hi lo))` in turn while `hi / lo >
    ratio`. `full` is full fine-tuning's metric, or one for each seed, of which the median counts.
    With `baseline` the metric of guessing (or of the untrained model), 90 % is of what was learned.

    The metric need not rise with `d`: the first dimension of the grid that passes counts, and the
    table shows all. InputError for an empty list, sizes out of order, and a target out of reach.

    Source: Li et al. 2018, arXiv:1804.08838, section 2 (d90).

    >>> d90(lambda d, rate, seed: 1 - 1 / d, 1.0, rates=[1e-3], largest=100).dimension
    10
    """
    full = full if isinstance(full, int | float) else median(full)
    _check(rates, seeds, smallest, largest, ratio)
    target = baseline + fraction * (full - baseline)
    trials: dict[int, Trial] = {}

    def passes(dimension: int) -> bool:
        trials[dimension] = _trial(evaluate, dimension, rates, seeds, target)
        return trials[dimension].passed

    low, high = None, smallest
    while not passes(high):
        low, high = high, min(2 * high, largest)
        if low == largest:
            return D90(None, target, _table(trials))
    while low is not None and high > ratio * low:
        middle = round(math.sqrt(high * low))
        if middle in (low, high):
            break
        low, high = (low, middle) if passes(middle) else (middle, high)
    return D90(high, target, _table(trials))


def _trial(
    evaluate: Callable[[int, float, int], float],
    dimension: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    target: float,
) -> Trial:
    """Every rate for every seed; a metric that is no number (a run that diverged) loses."""

    def result(rate: float, seed: int) -> tuple[float, float]:
        metric = float(evaluate(dimension, rate, seed))
        return (-math.inf if math.isnan(metric) else metric), rate

    best = [max(result(rate, seed) for rate in rates) for seed in seeds]
    values, chosen = zip(*best, strict=True)
    middle = median(values)
    return Trial(dimension, values, chosen, middle, middle >= target)


def _table(trials: dict[int, Trial]) -> tuple[Trial, ...]:
    return tuple(trials[dimension] for dimension in sorted(trials))


def _check(
    rates: Sequence[float], seeds: Sequence[int], smallest: int, largest: int, ratio: float
) -> None:
    if not rates or not seeds:
        raise InputError("d90(rates, seeds): nothing to try; give one rate and one seed at least")
    if not 1 <= smallest <= largest:
        raise InputError(
            f"d90(smallest={smallest}, largest={largest}): the grid rises from smallest, which is "
            "at least 1, to largest"
        )
    if not ratio >= 1:
        raise InputError(f"d90(ratio={ratio}): how close hi and lo must come; give 1 or more")
