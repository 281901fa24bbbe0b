"""A small stacked model, its loss and batches, for tests of what happens between steps."""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax.train import adapter_loss, init_state, make_step

LAYERS, WIDTH, OUT = 3, 6, 5


def model(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "layers": 0.4 * jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)),
        "out": 0.4 * jax.random.normal(keys[1], (WIDTH, OUT)),
    }
    return params, lj.find_sites(apply, params, jnp.ones((4, WIDTH)))


def apply(params, x):
    body = lambda h, w: (h + jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(body, x, params["layers"])[0] @ params["out"]


def loss(params, batch):
    off = apply(params, batch["x"]) - batch["y"]
    return jnp.sum(off**2), jnp.asarray(len(batch["x"]), jnp.float32)


def batches(index):
    keys = jax.random.split(jax.random.key(100 + index), 2)
    return {
        "x": jax.random.normal(keys[0], (8, WIDTH)),
        "y": jax.random.normal(keys[1], (8, OUT)),
    }


def run(rules, dynamics, steps, optimizer=None, accumulate=1, spoil=None):
    """The frozen tree as given, and every state; batch `spoil` is not finite."""
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)
    optimizer = optimizer or optax.adamw(0.02, weight_decay=0.1)
    step = make_step(adapter_loss(loss), optimizer, accumulate=accumulate, dynamics=dynamics)
    state = init_state(trained, optimizer, frozen=frozen, dynamics=dynamics)
    states = [jax.device_get(state)]
    for index in range(steps):
        batch = batches(index)
        if index == spoil:
            batch["x"] = batch["x"] * jnp.nan
        state, _ = step(state, frozen, batch)
        states.append(jax.device_get(state))
    assert step._cache_size() <= 1
    return frozen, states
