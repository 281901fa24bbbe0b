"""Kernels adapted in parts: one matrix for q, k and v, for gate and up, for a cell's four gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

PARTS = {"q": 6, "k": 4, "v": 2}
X = jax.random.normal(jax.random.key(1), (3, 5))


def fused(params, x):
    q, k, v = jnp.split(x @ params["qkv"], [6, 10], axis=-1)
    return jnp.tanh(q)[:, :2] * k[:, :2] + v


def params():
    return {"qkv": jax.random.normal(jax.random.key(0), (5, 12))}


def moved(trained):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), trained)


@pytest.mark.parametrize("method", [lj.lora(2), lj.dora(2)], ids=str)
def test_each_part_of_a_fused_kernel_is_a_site_of_its_own(method):
    sites = lj.find_sites(fused, params(), X).split("qkv", PARTS)
    assert {p: (s.d_in, s.d_out) for p, s in sites.items()} == {
        "qkv/q": (5, 6),
        "qkv/k": (5, 4),
        "qkv/v": (5, 2),
    }
    frozen, trained = lj.attach(jax.random.key(2), params(), {"qkv/(q|v)": method}, sites)
    assert sorted(trained) == ["qkv/q", "qkv/v"]
    bound = lj.bind(frozen, moved(trained))
    merged = lj.merge(frozen, moved(trained))
    assert merged["qkv"].shape == (5, 12)
    np.testing.assert_array_equal(merged["qkv"][:, 6:10], params()["qkv"][:, 6:10])
    np.testing.assert_allclose(lj.factored(fused)(bound, X), fused(merged, X), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(lj.materialised(fused)(bound, X), fused(merged, X), rtol=1e-6)


def test_parts_equal_separate_kernels():
    """The acceptance of a fused kernel: all parts adapted is as if each had been a parameter."""

    def separate(params, x):
        return jnp.tanh(x @ params["q"])[:, :2] * (x @ params["k"])[:, :2] + x @ params["v"]

    whole = params()["qkv"]
    single = {"q": whole[:, :6], "k": whole[:, 6:10], "v": whole[:, 10:]}
    _, trained = lj.attach(
        jax.random.key(2), single, {".": lj.lora(2)}, lj.find_sites(separate, single, X)
    )
    trained = moved(trained)
    sites = lj.find_sites(fused, params(), X).split("qkv", PARTS)
    frozen, _ = lj.attach(jax.random.key(2), params(), {"qkv/.": lj.lora(2)}, sites)
    bound = lj.bind(frozen, {f"qkv/{name}": value for name, value in trained.items()})
    plain, _ = lj.attach(
        jax.random.key(2), single, {".": lj.lora(2)}, lj.find_sites(separate, single, X)
    )
    expected = lj.factored(separate)(lj.bind(plain, trained), X)
    np.testing.assert_allclose(lj.factored(fused)(bound, X), expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_fused_on_both_sides():
    """A cell whose one kernel reads [input, state] and writes four gates."""

    def cell(params, x, h):
        i, g, f, o = jnp.split(jnp.concatenate([x, h], -1) @ params["w"], 4, axis=-1)
        return jax.nn.sigmoid(f) * h + jax.nn.sigmoid(i) * jnp.tanh(g) * jax.nn.sigmoid(o)

    weights = {"w": jax.random.normal(jax.random.key(0), (5 + 3, 12))}
    h = jnp.ones((3, 3))
    sites = lj.find_sites(cell, weights, X, h)
    sites = sites.split("w", {"input": 5, "state": 3}, axis=0)
    sites = sites.split("w/state", ("i", "g", "f", "o"))
    assert sites["w/state/f"].d_in == 3
    assert sites["w/state/f"].d_out == 3
    rules = {"w/input": lj.lora(2), "w/state/(i|o)": lj.dora(1)}
    frozen, trained = lj.attach(jax.random.key(2), weights, rules, sites)
    bound = lj.bind(frozen, moved(trained))
    merged = lj.merge(frozen, moved(trained))
    factored = lj.factored(cell)(bound, X, h)
    np.testing.assert_allclose(factored, cell(merged, X, h), rtol=2e-5, atol=1e-6)


def test_a_kernel_that_the_model_takes_apart_is_found_in_parts():
    def apply(params, x):
        gate, up = jnp.split(params["wi"], 2, axis=1)
        return jax.nn.silu(x @ gate) * (x @ up)

    sites = lj.find_sites(apply, {"wi": jnp.ones((5, 8))}, X)
    assert list(sites) == ["wi/0:4", "wi/4:8"]


@pytest.mark.parametrize(
    "parts, axis, message",
    [
        ({"q": 6, "k": 4}, None, "do not add up to the 12"),
        (("a", "b", "c", "d", "e"), None, "do not add up"),
        (PARTS, 3, "there is no axis 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, axis, message):
    with pytest.raises(lj.InputError, match=message):
        lj.find_sites(fused, params(), X).split("qkv", parts, axis)
