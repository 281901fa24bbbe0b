"""Pruning and election on single tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.compose import Recipe, combined, dropped, elected, trimmed


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.99])
def test_trimming_keeps_the_largest(density):
    tensor = jax.random.normal(jax.random.key(0), (5, 7))
    kept = np.asarray(trimmed(tensor, density))
    count = int(density * 35)
    assert np.count_nonzero(kept) == count
    np.testing.assert_array_equal(kept[kept != 0], np.asarray(tensor)[kept != 0])
    if count:
        assert np.abs(kept[kept != 0]).min() >= np.abs(np.asarray(tensor)[kept == 0]).max()


def test_among_equals_the_first_stay():
    np.testing.assert_array_equal(trimmed(jnp.array([1.0, -1.0, 1.0, 1.0]), 0.5), [1, -1, 0, 0])


def test_ties_of_one_task_is_its_trimmed_tensor():
    tensor = jax.random.normal(jax.random.key(1), (1, 12))
    recipe = Recipe("magnitude", "total", 0.5)
    expected = 0.7 * trimmed(tensor[0], 0.5)
    np.testing.assert_allclose(combined(tensor, jnp.array([0.7]), recipe), expected, rtol=1e-6)


def test_zeros_never_agree():
    tasks = jnp.array([[0.0, 2.0, 0.0], [4.0, 6.0, 0.0]])
    out = combined(tasks, jnp.ones(2), Recipe(vote="total"))
    np.testing.assert_array_equal(out, [4, 4, 0])


def test_votes():
    tasks = jnp.array([[-5.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 0.0, -1.0]])
    np.testing.assert_array_equal(elected(tasks, "total"), [-1, 1, -1])
    np.testing.assert_array_equal(elected(tasks, "frequency"), [1, 1, -1])
    np.testing.assert_array_equal(elected(tasks, "total", majority=True), [-1, -1, -1])


def test_dropping_keeps_the_mean():
    tensor = jnp.linspace(-1, 1, 9)
    draws = jax.vmap(lambda k: dropped(k, tensor, 0.25))(jax.random.split(jax.random.key(0), 20000))
    error = np.abs(draws.mean(0) - tensor)
    assert (error < 4 * np.std(draws, axis=0) / np.sqrt(20000) + 1e-6).all()
    np.testing.assert_array_equal(dropped(jax.random.key(0), tensor, 0.0), 0)
