"""The learning rate's path, and settings that make no sense."""

import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.train import adamw


def test_the_rate_rises_and_falls():
    schedule = adamw(steps=100, learning_rate=2.0, warmup=10, final=0.1).schedule
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] > 0
    assert max(rates) == rates[10] == 2.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    np.testing.assert_allclose(rates[100], 0.2, rtol=1e-5)


def test_without_warm_up_the_first_rate_is_the_peak():
    assert float(adamw(steps=10, learning_rate=2.0).schedule(0)) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup": 10}, "warmup=10"),
        ({"warmup": -1}, "warmup=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        adamw(**{"steps": 10, "learning_rate": 1e-3, **settings})
