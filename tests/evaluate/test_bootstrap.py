"""Intervals over groups: against the normal approximation, and paired differences."""

import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.evaluate.bootstrap import bootstrap, group_sums


def mean(totals):
    return totals[..., 0] / totals[..., 1]


def test_for_single_examples_it_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, low, high = bootstrap(mean, np.stack([values, np.ones(400)], axis=1))
    margin = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(value - margin, abs=0.02)
    assert high == pytest.approx(value + margin, abs=0.02)


def test_what_a_group_has_in_common_is_no_evidence():
    groups = np.repeat(np.arange(40), 25)
    values = np.random.default_rng(1).normal(0, 1, 40)[groups]
    _, low, high = bootstrap(mean, group_sums(groups, values, np.ones(1000)))
    alone = np.stack([values, np.ones(1000)], axis=1)
    _, near, far = bootstrap(mean, alone)
    assert (high - low) / (far - near) == pytest.approx(5, rel=0.1)


def test_a_paired_difference_has_no_share_in_the_groups_spread():
    base = np.random.default_rng(2).normal(0, 10, 30)
    sums = np.stack([base + 1, base, np.ones(30)], axis=1)
    found = bootstrap(lambda totals: (totals[..., 0] - totals[..., 1]) / totals[..., 2], sums)
    np.testing.assert_allclose(found, 1.0, atol=1e-9)


def test_the_same_seed_gives_the_same_interval_and_one_group_none():
    sums = np.random.default_rng(0).uniform(1, 2, (30, 2))
    assert bootstrap(mean, sums) == bootstrap(mean, sums) != bootstrap(mean, sums, seed=1)
    with pytest.raises(InputError, match="1 group of"):
        bootstrap(mean, sums[:1])
