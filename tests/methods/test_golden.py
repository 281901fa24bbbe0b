"""Every method reproduces PEFT's numbers on closed-form inputs (golden.json, in float64)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return np.sin(0.37 * n**2 + k).reshape(shape)


def checksum(array):
    flat = np.asarray(array, np.float64).ravel()
    return [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]


def agree(array, name, quantity):
    np.testing.assert_allclose(checksum(array), GOLDEN[name][quantity], rtol=1e-9)


X, W, BIAS = closed_form((3, 12), 1), closed_form((12, 8), 2) / 2, closed_form((8,), 3)
A, B, GY = closed_form((12, 2), 4), closed_form((2, 8), 5), closed_form((3, 8), 6)
MAGNITUDE = np.linalg.norm(W, axis=0) * (1 + 0.2 * closed_form((8,), 7))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(method, trained, params=None, x=X, apply=None, path="w"):
    """The output, its pull-back of GY to the trained arrays, and the merged kernel."""
    apply = apply or (lambda p, x: x @ p["w"] + jnp.asarray(BIAS)[None, :])
    params = params or {"w": jnp.asarray(W)}
    sites = lj.find_sites(apply, params, jnp.asarray(x))
    frozen, start = lj.attach(jax.random.key(0), params, {path: method}, sites)
    trained = {path: {k: jnp.asarray(v) for k, v in trained.items()}}
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, start)
    forward = lambda t: lj.factored(apply)(lj.bind(frozen, t), jnp.asarray(x))  # noqa: E731
    y, pull = jax.vjp(forward, trained)
    grads = pull(jnp.asarray(GY))[0][path] if y.shape == GY.shape else None
    return y, grads, lj.merge(frozen, trained)[path]


def test_base():
    agree(X @ W + BIAS, "base", "y")


def test_lora():
    y, grads, merged = run(lj.lora(rank=2, alpha=6.0), {"a": A, "b": B})
    agree(y, "lora", "y")
    agree(grads["a"], "lora", "gA")
    agree(grads["b"], "lora", "gB")
    agree(merged, "lora", "merged")


def test_rslora():
    y, _, _ = run(lj.lora(rank=2, alpha=6.0, rslora=True), {"a": A, "b": B})
    agree(y, "rslora", "y")


def test_rslora_is_lora_of_another_alpha():
    ours, _, _ = run(lj.lora(rank=2, alpha=6.0, rslora=True), {"a": A, "b": B})
    theirs, _, _ = run(lj.lora(rank=2, alpha=6.0 * np.sqrt(2)), {"a": A, "b": B})
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)


def test_dora():
    agree(MAGNITUDE, "dora", "m")
    trained = {"a": A, "b": B, "magnitude": MAGNITUDE}
    y, grads, merged = run(lj.dora(rank=2, alpha=6.0), trained)
    agree(y, "dora", "y")
    agree(grads["a"], "dora", "gA")
    agree(grads["b"], "dora", "gB")
    agree(grads["magnitude"], "dora", "gm")
    agree(merged, "dora", "merged")
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), MAGNITUDE, rtol=1e-12)


def test_dora_of_a_zero_column_stays_finite():
    w = W.copy()
    w[:, 3] = 0
    trained = {"a": A, "b": B * (np.arange(8) != 3), "magnitude": MAGNITUDE}
    y, grads, _ = run(lj.dora(rank=2), trained, params={"w": jnp.asarray(w)})
    assert np.isfinite(y).all() and all(np.isfinite(g).all() for g in grads.values())


def test_embedding():
    table, ids = closed_form((10, 6), 34), np.array([[0, 3, 9], [7, 7, 1]])
    trained = {"a": closed_form((10, 2), 35), "b": closed_form((2, 6), 36)}
    y, _, _ = run(
        lj.lora(rank=2, alpha=6.0),
        trained,
        {"w": jnp.asarray(table)},
        ids,
        lambda p, ids: p["w"][ids],
    )
    agree(y, "embedding", "y")


def test_one_step_from_a_fresh_adapter():
    """SGD from b = 0 moves the kernel by -eta s^2 a a^T g, and a not at all (B = 0)."""
    y, grads, _ = run(lj.lora(rank=2, alpha=6.0), {"a": A, "b": 0 * B})
    g = X.T @ GY
    np.testing.assert_array_equal(grads["a"], 0)
    np.testing.assert_allclose(3 * A @ grads["b"], 9 * A @ A.T @ g, rtol=1e-10)


COUNTS = {
    "lora": (lj.lora(rank=8), 294_912),
    "lora_fa": (lj.lora(rank=8, freeze_a=True), 147_456),
    "dora": (lj.dora(rank=8), 313_344),
}


@pytest.mark.parametrize("name", COUNTS)
def test_trainable_counts_of_a_worked_stack(name):
    """q and v of 12 blocks of width 768."""
    method, expected = COUNTS[name]
    shape = jax.ShapeDtypeStruct((12, 768, 768), jnp.float32)
    params = {"q": shape, "v": shape}

    def apply(params, x):
        return jax.lax.scan(lambda h, p: (h @ p["q"] @ p["v"], None), x, params)[0]

    x = jax.ShapeDtypeStruct((2, 768), jnp.float32)
    sites = lj.find_sites(apply, params, x)
    key = jax.random.key(0)
    _, trained = jax.eval_shape(lambda p: lj.attach(key, p, {".*": method}, sites), params)
    assert lj.tree.count(trained) == expected
