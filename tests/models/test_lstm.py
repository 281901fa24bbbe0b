import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.models.lstm import GATES, LSTM, RecurrentConfig, initialise_recurrent

B, T, D, H, V = 2, 5, 3, 4, 11


def pure(module, *states):
    """apply(params, *inputs) and plain params."""
    graph, state = nnx.split(module)
    return (lambda params, *inputs: nnx.merge(graph, params)(*inputs)), nnx.to_pure_dict(state)


def by_hand(params, x):
    """The equations, one row, step and gate at a time."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    w, u = np.asarray(params["input"]["kernel"]), np.asarray(params["recurrent"]["kernel"])
    bias = np.asarray(params["input"]["bias"])
    out = np.zeros((B, T, H))
    for row in range(B):
        h, c = np.zeros(H), np.zeros(H)
        for t in range(T):
            z = dict(zip(GATES, (x[row, t] @ w + h @ u + bias).reshape(4, H), strict=True))
            c = sigmoid(z["f"]) * c + sigmoid(z["i"]) * np.tanh(z["g"])
            h = sigmoid(z["o"]) * np.tanh(c)
            out[row, t] = h
    return out, h, c


def test_the_scan_is_the_equations(key):
    apply, params = pure(LSTM(D, H, rngs=nnx.Rngs(0)))
    params["input"]["bias"] = jnp.linspace(-1, 1, 4 * H)
    x = jax.random.normal(key, (B, T, D))
    hidden, memory = apply(params, x)
    wanted, h, c = by_hand(params, np.asarray(x))
    np.testing.assert_allclose(hidden, wanted, atol=1e-5)
    np.testing.assert_allclose(memory.hidden[-1], h, atol=1e-5)
    np.testing.assert_allclose(memory.cell[-1], c, atol=1e-5)


def test_a_fresh_cell_remembers():
    _, params = pure(LSTM(D, H, rngs=nnx.Rngs(0)))
    bias = params["input"]["bias"].reshape(len(GATES), H)
    np.testing.assert_array_equal(bias[:, 0], [0, 1, 0, 0])


def test_a_sequence_in_two_parts_is_the_whole(key):
    apply, params = pure(LSTM(D, H, rngs=nnx.Rngs(1)))
    x = jax.random.normal(key, (B, T, D))
    whole, end = apply(params, x)
    first, memory = apply(params, x[:, :2])
    second, last = apply(params, x[:, 2:], memory)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(last.cell, end.cell, atol=1e-6)


def test_each_kernel_is_a_site_that_a_pattern_names(key):
    network = initialise_recurrent(RecurrentConfig(V, D, H), key)
    apply, params = network.apply, network.params
    ids = jax.random.randint(key, (B, T), 0, V)
    sites = lj.find_sites(apply, params, ids)
    found = {path: (site.d_in, site.d_out) for path, site in sites.items()}
    assert found == {
        "embed/embedding": (V, D),
        "lstm/input/kernel": (D, 4 * H),
        "lstm/recurrent/kernel": (H, 4 * H),
        "head/kernel": (H, V),
    }
    plain = apply(params, ids)
    for target in (".*/input/kernel", ".*/recurrent/kernel"):
        frozen, trained = lj.attach(key, params, {target: lj.lora(rank=2)}, sites)
        fresh = lj.factored(apply)(lj.bind(frozen, trained), ids)
        np.testing.assert_array_equal(fresh, plain)
        trained = jax.tree.map(lambda leaf: leaf + 0.5, trained)
        moved = lj.factored(apply)(lj.bind(frozen, trained), ids)
        merged = apply(lj.merge(frozen, trained), ids)
        np.testing.assert_allclose(moved, merged, atol=1e-5)
        assert not np.allclose(moved, plain)


def test_a_single_gate_can_be_adapted(key):
    network = initialise_recurrent(RecurrentConfig(V, D, H), key)
    ids = jax.random.randint(key, (B, T), 0, V)
    sites = lj.find_sites(network.apply, network.params, ids).split(".*/recurrent/kernel", GATES)
    rules = {".*/recurrent/kernel/f": lj.lora(rank=2)}
    frozen, trained = lj.attach(key, network.params, rules, sites)
    assert jax.tree.map(jnp.shape, trained) == {
        "lstm/recurrent/kernel/f": {"a": (H, 2), "b": (2, H)}
    }
    trained = jax.tree.map(lambda leaf: leaf + 0.5, trained)
    merged = lj.merge(frozen, trained)
    moved = lj.factored(network.apply)(lj.bind(frozen, trained), ids)
    np.testing.assert_allclose(moved, network.apply(merged, ids), atol=1e-5)
    kernels = [each["lstm"]["recurrent"]["kernel"] for each in (network.params, merged)]
    changed = np.any(kernels[0] != kernels[1], axis=0).reshape(len(GATES), H)
    np.testing.assert_array_equal(changed.all(axis=1), [gate == "f" for gate in GATES])
    np.testing.assert_array_equal(changed.any(axis=1), [gate == "f" for gate in GATES])


def test_sizes_and_ids_that_are_none_are_refused(key):
    with pytest.raises(InputError, match="width=0"):
        RecurrentConfig(V, D, 0)
    network = initialise_recurrent(RecurrentConfig(V, D, H), key)
    for ids in (jnp.zeros((B, T)), jnp.zeros(T, int)):
        with pytest.raises(InputError, match=r"integers \[rows, symbols\]"):
            network.apply(network.params, ids)
