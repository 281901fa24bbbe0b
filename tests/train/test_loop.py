"""The loop's ends: full length, Ctrl-C, values that are not finite, divergence."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.train import StepInfo, TrainState, Watch, fit

STEPS = 12


def batches(index):
    return {"mask": np.ones((2, 3), bool)}


def make(losses, applied=lambda index: True):
    """A step whose trained value counts the updates and whose losses are given."""

    def step(state, frozen, batch):
        index = int(state.step)
        ok = applied(index)
        value = state.trained["a"] + ok
        info = StepInfo(jnp.float32(losses(index)), jnp.float32(1.0), jnp.asarray(ok))
        return TrainState(state.step + 1, {"a": value}, ()), info

    return step


def run(step, observers=(), **watch):
    state = TrainState(jnp.int32(0), {"a": jnp.float32(0.0)}, ())
    return fit(
        step,
        state,
        None,
        batches,
        steps=STEPS,
        schedule=lambda index: 0.5,
        observers=observers,
        watch=Watch(**watch),
    )


def test_a_run_of_full_length():
    seen = []
    outcome = run(make(lambda index: 1.0), observers=[seen.append])
    assert outcome.stopped is None
    assert outcome.step == outcome.trained["a"] == STEPS
    assert [progress.step for progress in seen] == list(range(1, STEPS + 1))
    assert seen[-1].seconds_left == 0.0
    assert seen[0].learning_rate == 0.5
    assert all(progress.per_second > 0 for progress in seen)


def test_a_loss_that_is_not_finite_stops_with_the_values_before_it():
    outcome = run(make(lambda i: float("nan") if i == 5 else 1.0, applied=lambda i: i != 5))
    assert "not finite at step 5" in outcome.stopped
    assert outcome.trained["a"] == 5


def test_divergence_stops_with_the_values_from_before_it():
    outcome = run(make(lambda i: 1.0 if i < 6 else 10.0), patience=3, keep_every=2)
    assert "3 times its start" in outcome.stopped
    assert "step 8" in outcome.stopped
    assert outcome.step == 4
    assert outcome.trained["a"] == 5


def test_a_single_bad_batch_is_no_divergence():
    assert run(make(lambda i: 10.0 if i % 3 == 2 else 1.0), patience=3).stopped is None


def test_ctrl_c_keeps_what_was_trained():
    before = signal.getsignal(signal.SIGINT)

    def press(progress):
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    outcome = run(make(lambda index: 1.0), observers=[press])
    assert outcome.interrupted
    assert "Ctrl-C after step 4 of 12" in outcome.stopped
    assert outcome.trained["a"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_ends_at_once():
    def press(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(make(lambda index: 1.0), observers=[press])
