"""Draws of torch's generator by numpy; tests/parity compares them with torch's own."""

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.torch_random import TorchGenerator, randperm


def test_positions_that_peft_takes_for_its_default_seed():
    places = np.array(randperm(12 * 8, 6, 777))
    assert (places // 12).tolist() == [5, 1, 6, 6, 4, 4]
    assert (places % 12).tolist() == [11, 3, 9, 5, 3, 9]


@pytest.mark.parametrize("size", [1, 2, 17])
def test_a_whole_shuffle_is_a_permutation(size):
    assert sorted(randperm(size, size, 3)) == list(range(size))


def test_fewer_positions_are_the_first_of_more():
    assert randperm(1000, 5, 1) == randperm(1000, 50, 1)[:5]


def test_draws_continue():
    whole, parts = TorchGenerator(4), TorchGenerator(4)
    both = [parts.uniform((2, 3), -1, 1), parts.uniform((4,), -1, 1)]
    joined = np.concatenate([part.ravel() for part in both])
    np.testing.assert_array_equal(whole.uniform((10,), -1, 1), joined)


@pytest.mark.parametrize(("size", "count"), [(3, 4), (2**28, 1)])
def test_what_cannot_be_drawn_is_refused(size, count):
    with pytest.raises(lj.InputError, match=f"size={size}"):
        randperm(size, count, 0)
