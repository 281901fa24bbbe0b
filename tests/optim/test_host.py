"""Moments in host memory change where numbers rest, and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.optim import host_bytes, in_host_memory, lora_plus, roles
from lora_jax.train.step import init_state, make_step


def apply(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (6, 7)), "v": jax.random.normal(keys[1], (7, 5))}
    x = jax.random.normal(keys[2], (4, 6))
    sites = lj.find_sites(apply, params, x)
    return *lj.attach(jax.random.key(1), params, {".*": lj.lora(rank=2)}, sites), x


def run(optimizer, count=4):
    frozen, trained, x = start()

    def loss(trained, frozen, batch, key):
        y = lj.factored(apply)(lj.bind(frozen, trained), batch["x"])
        return jnp.sum(jnp.square(y - 1)), jnp.float32(4)

    step, state = make_step(loss, optimizer), init_state(trained, optimizer)
    for _ in range(count):
        state, _ = step(state, frozen, {"x": x})
    return state


def clipped():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))


def by_role():
    labels = roles(*start()[:2])
    return lora_plus(optax.linear_schedule(1e-2, 0.0, 9), labels, weight_decay=0.1)


@pytest.mark.parametrize("make", [clipped, by_role])
def test_the_trajectory_is_the_same_bit_for_bit(make):
    optimizer = make()
    plain, held = run(optimizer), run(in_host_memory(optimizer, smallest=11))
    jax.tree.map(np.testing.assert_array_equal, held.trained, plain.trained)
    jax.tree.map(np.testing.assert_array_equal, held.opt_state, plain.opt_state)
    assert host_bytes(plain.opt_state) == 0
    # both moments of a [6, 2], b [2, 7] and a [7, 2]; b [2, 5] is too small
    assert host_bytes(held.opt_state) == 2 * 4 * (12 + 14 + 14)


def test_trained_values_and_small_arrays_stay_on_the_device():
    state = run(in_host_memory(optax.adam(1e-2), smallest=100), count=1)
    assert host_bytes(state.opt_state) == 0 and host_bytes(state.trained) == 0
