"""Dynamics inside the step and the loop, whatever they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import batches, loss, model, run

import lora_jax as lj
from lora_jax import dynamics
from lora_jax.methods import adalora, delta_lora
from lora_jax.train import adapter_loss, fit, init_state, make_step

KINDS = {
    "adalora": ({".*": adalora(rank=3)}, dynamics.adalora(steps=7, target_rank=2, every=2)),
    "delta_lora": ({".*": delta_lora(rank=2)}, dynamics.delta_lora(start=2)),
}


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_are_one_step(name):
    _, whole = run(*KINDS[name], 7, optax.sgd(0.05))
    _, parts = run(*KINDS[name], 7, optax.sgd(0.05), accumulate=4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, whole, parts)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(name):
    _, states = run(*KINDS[name], 5, spoil=3)
    jax.tree.map(np.testing.assert_array_equal, states[4][1:], states[3][1:])
    assert states[4].step == 4


def parts(name, optimizer):
    rules, moving = KINDS[name]
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)
    step = make_step(adapter_loss(loss), optimizer, dynamics=moving)
    return step, init_state(trained, optimizer, frozen=frozen, dynamics=moving), frozen, moving


@pytest.mark.parametrize("name", KINDS)
def test_the_outcome_has_the_frozen_tree_of_its_values(name):
    step, state, frozen, moving = parts(name, optax.adam(0.05))
    options = {"steps": 7, "schedule": lambda index: 0.05, "dynamics": moving}
    outcome = fit(step, state, frozen, batches, **options)
    forward = lj.factored(loss)(lj.bind(outcome.frozen, outcome.trained), batches(0))
    merged = loss(lj.merge(outcome.frozen, outcome.trained), batches(0))
    np.testing.assert_allclose(forward, merged, rtol=1e-5)
    ratio = {p: node.frozen.get("ratio") for p, node in lj.adapted(outcome.frozen).items()}
    assert ratio["out"] == (0.5 if name == "delta_lora" else None)


def test_a_run_shorter_than_the_schedule_is_refused():
    step, state, frozen, moving = parts("adalora", optax.adam(0.05))
    options = {"steps": 6, "schedule": lambda index: 0.05, "dynamics": moving}
    with pytest.raises(lj.InputError, match="a schedule of 7 steps, but the run ends after 6"):
        fit(step, state, frozen, batches, **options)


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss():
    step, state, frozen, _ = parts("adalora", optax.sgd(1.0))
    before = jax.tree.map(np.array, state.trained)
    after, info = step(state, frozen, batches(0))
    total, weight = loss(lj.merge(frozen, before), batches(0))
    assert info.loss == pytest.approx(float(total / weight), rel=1e-5)
    assert np.abs(after.trained["out"]["a"] - before["out"]["a"]).max() > 0  # e = 0: penalty alone
    assert jnp.isfinite(info.grad_norm)
