"""ReLoRA: a restart changes nothing but one rounding; moments are trimmed; nothing retraces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import apply, batches, loss, model

import lora_jax as lj
from lora_jax import dynamics
from lora_jax.train import adamw, adapter_loss, fit, init_state, make_step

RULES = {
    "alike": {".*": lj.lora(rank=2)},
    "layers": {"layers": [lj.lora(rank=1), None, lj.lora(rank=3)], "out": lj.dora(rank=2)},
    "full": {"layers": lj.lora(rank=2), "out": lj.full()},
}


def moved(rules, dtype=jnp.float32):
    params, sites = model()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    sites = lj.find_sites(apply, params, jnp.ones((2, 6), dtype))
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)
    return frozen, jax.tree.map(lambda x: x + 0.1, trained)


@pytest.mark.parametrize("name", RULES)
def test_a_restart_keeps_the_function(name):
    frozen, trained = moved(RULES[name])
    kept = jax.tree.map(np.array, (frozen, trained))
    anew, fresh = dynamics.restart(jax.random.key(2), frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, (frozen, trained), kept)
    assert jax.tree.structure((anew, fresh)) == jax.tree.structure((frozen, trained))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    jax.tree.map(close, lj.merge(anew, fresh), lj.merge(frozen, trained))
    if name == "alike":
        assert np.abs(fresh["out"]["b"]).max() == 0 < np.abs(fresh["out"]["a"]).min()
        assert np.abs(fresh["layers"]["a"][0] - fresh["layers"]["a"][1]).min() > 0


def test_a_narrow_kernel_is_rounded_once():
    frozen, trained = moved(RULES["alike"], jnp.bfloat16)
    anew, _ = dynamics.restart(jax.random.key(2), frozen, trained)
    for path, node in lj.adapted(frozen).items():
        part = trained[path]
        whole = np.float32(node.frozen["w"]) + np.float32(4.0) * (part["a"] @ part["b"])
        found = lj.adapted(anew)[path].frozen["w"]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, jnp.asarray(whole).astype(jnp.bfloat16))


def train(between, optimizer, steps=9, **options):
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, {".*": lj.lora(rank=1)}, sites)
    step = make_step(adapter_loss(loss), optimizer.transform)
    state = init_state(trained, optimizer.transform)
    outcome = fit(
        step,
        state,
        frozen,
        batches,
        steps=steps,
        schedule=optimizer.schedule,
        between=between,
        **options,
    )
    return step, params, outcome


def test_a_run_of_restarts_makes_an_update_of_higher_rank_without_retracing():
    optimizer = dynamics.rewarmed(adamw(steps=9, learning_rate=0.05), every=3, warmup=1)
    hook = dynamics.relora(jax.random.key(3), optimizer.transform, every=3)
    step, params, outcome = train(hook, optimizer)
    assert max(step._cache_size(), hook.again._cache_size()) <= 1
    merged = lj.merge(outcome.frozen, outcome.trained)
    rank = np.linalg.matrix_rank(merged["out"] - params["out"], tol=1e-4)
    assert rank == 3
    _, _, plain = train(None, optimizer)
    change = lj.merge(plain.frozen, plain.trained)["out"] - params["out"]
    assert np.linalg.matrix_rank(change, tol=1e-4) == 1


def test_the_last_good_values_come_with_their_own_frozen_tree():
    """A run that is lost after a restart goes back to values from before it."""
    from lora_jax.train import Watch

    optimizer = adamw(steps=30, learning_rate=0.01)
    hook = dynamics.relora(jax.random.key(3), optimizer.transform, every=4)
    base = model()[0]

    def spoilt(state, frozen):
        state, frozen = hook(state, frozen)
        if int(state.step) == 6:
            state = state._replace(trained=jax.tree.map(lambda x: x + 30.0, state.trained))
        return state, frozen

    watch = Watch(patience=2, keep_every=3)
    _, _, outcome = train(spoilt, optimizer, steps=30, watch=watch)
    assert (outcome.step, "times its start" in outcome.stopped) == (3, True)
    assert lj.adapted(outcome.frozen)["out"].frozen["w"] is not None
    np.testing.assert_array_equal(lj.adapted(outcome.frozen)["out"].frozen["w"], base["out"])


@pytest.mark.parametrize(("share", "left"), [(0.99, 1), (0.5, 50), (1.0, 0), (0.0, 100)])
def test_trimmed_moments(share, left):
    adam = optax.chain(optax.clip(10.0), optax.adam(0.1))
    params = {"a": jnp.ones((10, 10))}
    state = adam.init(params)
    grads = {"a": jax.random.normal(jax.random.key(0), (10, 10))}
    _, state = adam.update(grads, state, params)
    cut = dynamics.trimmed(adam, state, share)
    counts = [np.count_nonzero(x) for x in jax.tree.leaves(cut) if x.ndim]
    assert counts == [left, left]
    assert [int(x) for x in jax.tree.leaves(cut) if not x.ndim] == [1]
    assert jax.tree.structure(cut) == jax.tree.structure(state)


def test_the_rate_rises_anew():
    optimizer = dynamics.rewarmed(adamw(steps=12, learning_rate=1.0, final=1.0), every=4, warmup=3)
    rates = [float(optimizer.schedule(step)) for step in range(9)]
    assert rates == [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25]
    state = optimizer.transform.init(jnp.ones(()))
    for rate in rates:
        update, state = optimizer.transform.update(jnp.ones(()), state, jnp.zeros(()))
        assert float(update) == pytest.approx(-rate, rel=1e-4)


def test_what_is_refused():
    adam = optax.adam(0.1)
    with pytest.raises(lj.InputError, match="give 1 or more"):
        dynamics.relora(jax.random.key(0), adam, every=0)
    with pytest.raises(lj.InputError, match=r"lies in \[0, 1\]"):
        dynamics.relora(jax.random.key(0), adam, every=2, prune=99)
    with pytest.raises(lj.InputError, match="warm up in fewer steps"):
        dynamics.rewarmed(None, every=3, warmup=3)
    from lora_jax.methods import tied

    params, sites = model()
    given = lj.attach(jax.random.key(1), params, {"layers": tied(lj.lora(rank=2))}, sites)
    with pytest.raises(lj.InputError, match="'layers' shares arrays"):
        dynamics.restart(jax.random.key(0), *given)
