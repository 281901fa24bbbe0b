"""One update: accumulation, skipped updates, keys, determinism, donated buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.dynamics import Dynamics
from lora_jax.errors import InputError
from lora_jax.train import init_state, make_step

B, D, K = 6, 5, 3


def loss(trained, frozen, batch, key):
    """Weighted squares with a number of scored tokens that differs from row to row."""
    found = batch["x"] @ (frozen["w"] + trained["a"])
    weight = batch["weights"]
    return jnp.sum(weight * jnp.sum((found - batch["y"]) ** 2, -1)), jnp.sum(weight)


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    frozen = {"w": jax.random.normal(keys[0], (D, K))}
    trained = {"a": 0.1 * jax.random.normal(keys[1], (D, K))}
    batch = {
        "x": jax.random.normal(keys[2], (B, D)),
        "y": jax.random.normal(keys[3], (B, K)),
        "weights": jnp.array([1.0, 3.0, 0.0, 2.0, 5.0, 1.0]),
    }
    return trained, frozen, batch


def run(case, accumulate, steps=3, loss=loss, seed=0):
    trained, frozen, batch = case
    optimizer = optax.adam(1e-2)
    step = make_step(loss, optimizer, accumulate=accumulate, seed=seed)
    state, losses = init_state(trained, optimizer), []
    for _ in range(steps):
        state, info = step(state, frozen, batch)
        losses.append(info.loss.item())
    return state, losses


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_micro_batches_make_the_same_update(case, accumulate):
    whole, losses = run(case, 1)
    parts, part_losses = run(case, accumulate)
    np.testing.assert_allclose(losses, part_losses, rtol=1e-5)
    np.testing.assert_allclose(whole.trained["a"], parts.trained["a"], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_tokens_and_falls(case):
    trained, frozen, batch = case
    total, weight = loss(trained, frozen, batch, None)
    _, losses = run(case, 1, steps=20)
    np.testing.assert_allclose(losses[0], total / weight, rtol=1e-5)
    assert losses[-1] < losses[0]


def test_the_same_run_gives_the_same_bits(case):
    one, two = (run(case, 2)[0].trained["a"] for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_the_given_values_survive_the_first_step(case):
    before = np.array(case[0]["a"])
    run(case, 1)
    np.testing.assert_array_equal(case[0]["a"], before)


@pytest.mark.parametrize("clip", [None, 0.0, 0.5, 1e6])
def test_the_optimizer_and_the_dynamics_get_the_clipped_gradient(case, clip):
    trained, frozen, batch = case
    watching = Dynamics(
        "watching",
        lambda frozen, trained: jax.tree.map(jnp.zeros_like, trained),
        lambda kept, step, grads, before, after: (grads, after),
    )
    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, clip=clip, dynamics=watching)
    state = init_state(trained, optimizer, frozen=frozen, dynamics=watching)
    state, info = step(state, frozen, batch)
    seen = state.dynamics["a"]
    np.testing.assert_allclose(trained["a"] - state.trained["a"], seen, rtol=1e-4, atol=1e-6)
    whole = float(info.grad_norm)
    assert whole > 1
    bound = min(whole, clip) if clip else whole
    np.testing.assert_allclose(np.linalg.norm(seen), bound, rtol=1e-5)


def test_a_bound_below_zero_is_refused():
    with pytest.raises(InputError, match="clip=-1"):
        make_step(loss, optax.sgd(1.0), clip=-1.0)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(case):
    trained, frozen, batch = case
    optimizer = optax.adam(1e-2)
    step = make_step(loss, optimizer)
    state, _ = step(init_state(trained, optimizer), frozen, batch)
    kept = jax.tree.map(np.array, state)
    bad = {**batch, "x": batch["x"].at[0, 0].set(jnp.nan)}
    after, info = step(state, frozen, bad)
    assert not info.applied
    assert after.step == kept.step + 1
    jax.tree.map(np.testing.assert_array_equal, after[1:], kept[1:])


def test_keys_differ_by_step_micro_batch_and_seed(case):
    def noisy(trained, frozen, batch, key):
        total, weight = loss(trained, frozen, batch, key)
        return jax.random.uniform(key) + 0.0 * total, weight

    def first(seed):
        return run(case, 1, loss=noisy, seed=seed)[1]

    assert len(set(first(0))) == 3
    assert first(0) == first(0)
    assert not set(first(0)) & set(first(1))
    assert run(case, 2, loss=noisy, steps=1)[1][0] != 2 * first(0)[0]


def test_the_frozen_side_is_not_given_away(case):
    trained, frozen, batch = case
    run((trained, frozen, batch), 1)
    assert not frozen["w"].is_deleted()


@pytest.mark.parametrize("accumulate", [0, 4])
def test_a_batch_that_does_not_split_is_refused(case, accumulate):
    with pytest.raises(InputError, match=f"accumulate={accumulate}"):
        run(case, accumulate)
