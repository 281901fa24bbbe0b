"""The search for d90 on metrics whose answer is known."""

import math

import pytest

import lora_jax as lj
from lora_jax.analysis import d90


def rising(needed):
    return lambda d, rate, seed: float(d >= needed)


@pytest.mark.parametrize("needed", [1, 2, 37, 100, 128, 999])
def test_it_finds_the_threshold_within_the_ratio(needed):
    found = d90(rising(needed), 1.0, rates=[1.0], largest=1000)
    assert found.dimension is not None
    assert needed <= found.dimension <= max(1.1 * needed, needed)
    assert [trial.dimension for trial in found.table] == sorted({t.dimension for t in found.table})
    assert all(trial.passed == (trial.dimension >= needed) for trial in found.table)


def test_none_passes():
    found = d90(rising(50), 1.0, rates=[1.0], largest=40)
    assert found.dimension is None
    assert [trial.dimension for trial in found.table] == [1, 2, 4, 8, 16, 32, 40]


def test_median_of_seeds_of_the_best_rate():
    def metric(d, rate, seed):
        return [0.2, 0.5, 1.0][seed] * (1.0 if rate == 3.0 else 0.5)

    found = d90(metric, [0.4, 0.5, 0.9], rates=[1.0, 3.0], largest=4, smallest=4)
    assert found.target == pytest.approx(0.45)
    assert found.table[0].best == (0.2, 0.5, 1.0) and found.table[0].rates == (3.0, 3.0, 3.0)
    assert found.table[0].median == 0.5 and found.dimension == 4


def test_a_baseline_raises_the_bar_and_a_failed_run_loses():
    metric = lambda d, rate, seed: math.nan if rate > 1 else 0.5 + 0.1 * (d >= 8)  # noqa: E731
    assert d90(metric, 0.6, rates=[1.0, 2.0], largest=64).dimension == 8
    easy = d90(metric, 0.55, rates=[1.0, 2.0], largest=64)
    assert easy.dimension == 1
    corrected = d90(metric, 0.55, rates=[1.0, 2.0], largest=64, baseline=0.5)
    assert corrected.target == pytest.approx(0.545) and corrected.dimension == 8


def test_a_metric_that_falls_again_shows_in_the_table():
    metric = lambda d, rate, seed: float(d == 4 or d >= 16)  # noqa: E731
    found = d90(metric, 1.0, rates=[1.0], largest=64)
    assert found.dimension == 4


def test_bad_arguments():
    with pytest.raises(lj.InputError, match="one rate and one seed"):
        d90(rising(1), 1.0, rates=[], largest=4)
    with pytest.raises(lj.InputError, match="smallest=8, largest=4"):
        d90(rising(1), 1.0, rates=[1.0], largest=4, smallest=8)
    with pytest.raises(lj.InputError, match="ratio=0"):
        d90(rising(1), 1.0, rates=[1.0], largest=4, ratio=0.5)
