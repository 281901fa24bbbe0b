"""LoRA+: a first step by hand, plain Adam at ratio one, and who decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.optim import lora_plus, roles

RATE = 1e-3


def apply(params, ids):
    return jnp.tanh(params["table"][ids] @ params["w"] + params["bias"][None])


def start(rules, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"table": (11, 6), "w": (6, 5), "bias": (5,)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    ids = jnp.arange(4)
    sites = lj.find_sites(apply, params, ids)
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)

    def loss(trained):
        return jnp.sum(jnp.square(lj.factored(apply)(lj.bind(frozen, trained), ids) - 1))

    return frozen, trained, jax.grad(loss)


def steps(optimizer, trained, gradient, count=1):
    state = optimizer.init(trained)
    for _ in range(count):
        updates, state = optimizer.update(gradient(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
    return trained


def test_the_first_step_moves_b_alone_by_the_faster_rate():
    with jax.enable_x64(True):
        frozen, trained, gradient = start({"w": lj.lora(rank=2)})
        grads = gradient(trained)["w"]["b"]
        optimizer = lora_plus(RATE, roles(frozen, trained), eps=1e-30)
        after = steps(optimizer, trained, gradient)["w"]
        np.testing.assert_array_equal(after["a"], trained["w"]["a"])
        assert np.abs(grads).min() > 1e-4
        np.testing.assert_allclose(np.abs(after["b"]), 16 * RATE, rtol=1e-6)


def test_ratio_one_is_adam():
    frozen, trained, gradient = start({"w": lj.dora(rank=2), "bias": lj.full()})
    ours = steps(lora_plus(RATE, roles(frozen, trained), ratio=1), trained, gradient, 5)
    plain = steps(optax.adam(RATE), trained, gradient, 5)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_rates_and_decay_of_each_role():
    rules = {"w": lj.dora(rank=2), "table": lj.lora(rank=2), "bias": lj.full()}
    frozen, trained, _ = start(rules)
    trained = jax.tree.map(jnp.ones_like, trained)
    optimizer = lora_plus(
        optax.constant_schedule(RATE), roles(frozen, trained), ratio=4, weight_decay=0.5
    )
    zero = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = optimizer.update(zero, optimizer.init(trained), trained)
    first = {p: {n: float(x.ravel()[0]) for n, x in own.items()} for p, own in updates.items()}
    assert first["w"] == pytest.approx({"a": -5e-4, "b": -2e-3, "magnitude": -2e-3})
    assert first["table"] == pytest.approx({"a": -5e-7, "b": -5e-7})
    assert first["bias"]["w"] == 0


def test_clipping_outside_sees_all_gradients_together():
    frozen, trained, gradient = start({"w": lj.lora(rank=2), "table": lj.lora(rank=2)})
    optimizer = lora_plus(RATE, roles(frozen, trained), eps=1.0)
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optimizer)
    norm = optax.tree.norm(gradient(trained))
    scaled = steps(
        optimizer, trained, lambda t: jax.tree.map(lambda g: 0.1 * g / norm, gradient(t))
    )
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7)  # noqa: E731
    jax.tree.map(close, steps(clipped, trained, gradient), scaled)


def test_bad_arguments():
    with pytest.raises(lj.InputError, match=r"ratio=0"):
        lora_plus(RATE, {}, ratio=0)
    with pytest.raises(lj.InputError, match="'c' is no role; known: a, b"):
        lora_plus(RATE, {"w": "c"})
