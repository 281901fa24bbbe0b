"""The peak of the process, counted from its start or from a moment."""

import sys

import numpy as np
import pytest

from lora_jax.train.memory import process_peak, restart_peak


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_a_peak_is_forgotten_on_request():
    np.ones(40_000_000).sum()  # 320 MB, freed at once
    before = process_peak()
    restart_peak()
    assert process_peak() < before - 0.2
