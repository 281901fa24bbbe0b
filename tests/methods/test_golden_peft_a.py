"""VeRA, LoHa, LoKr, VB-LoRA, RandLoRA, MiSS, FourierFT reproduce PEFT's numbers (golden.json)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import methods

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return np.sin(0.37 * n**2 + k).reshape(shape)


F = closed_form
X, W, BIAS = F((3, 12), 1), F((12, 8), 2) / 2, F((8,), 3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def agree(array, name, quantity, rtol=1e-9):
    flat = np.asarray(array, np.float64).ravel()
    found = [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]
    np.testing.assert_allclose(found, GOLDEN[name][quantity], rtol=rtol, atol=rtol)


def run(method, trained, common=None, frozen_common=None):
    """The factored output and the update of the kernel, from given arrays."""
    apply = lambda p, x: x @ p["w"] + jnp.asarray(BIAS)[None]  # noqa: E731
    params = {"w": jnp.asarray(W)}
    sites = lj.find_sites(apply, params, jnp.asarray(X))
    frozen, start = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    trained = {"w": jax.tree.map(jnp.asarray, trained)}
    if common:
        trained[f"shared/{method.name}"] = jax.tree.map(jnp.asarray, common)
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, start)
    if frozen_common:
        frozen["w"].common.update(jax.tree.map(jnp.asarray, frozen_common))
    bound = lj.bind(frozen, trained)
    y = lj.factored(apply)(bound, jnp.asarray(X))
    merged = lj.merge(frozen, trained)["w"]
    np.testing.assert_allclose(y, X @ np.asarray(merged) + BIAS, rtol=1e-9, atol=1e-9)
    return y, merged - W


def test_vera():
    held = {"shared_a": F((16, 3), 8), "shared_b": F((3, 10), 9)}
    trained = {"d": F((3,), 10), "b": F((8,), 11)}
    y, update = run(methods.vera(rank=3), trained, frozen_common=held)
    agree(y, "vera", "y")
    agree(update, "vera", "delta")


def test_loha():
    trained = {
        "b1": F((8, 2), 13).T,
        "a1": F((2, 12), 14).T,
        "b2": F((8, 2), 15).T,
        "a2": F((2, 12), 16).T,
    }
    agree(run(methods.loha(rank=2, alpha=6), trained)[0], "loha", "y")


def test_lokr():
    trained = {"w1": F((2, 3), 17).T, "b2": F((4, 1), 18).T, "a2": F((1, 4), 19).T}
    agree(run(methods.lokr(rank=1, alpha=6), trained)[0], "lokr", "y")


def test_vblora():
    trained = {"logits_a": F((2, 3, 5), 21), "logits_b": F((2, 2, 5), 22)}
    method = methods.vblora(rank=2, vectors=5, length=4)
    agree(run(method, trained, common={"bank": F((5, 4), 23)})[0], "vblora", "y")


def test_miss():
    agree(run(methods.miss(rank=4), {"m": F((4, 8), 24)})[0], "miss", "y")


def test_miss_mini():
    agree(run(methods.miss(rank=4, mini_rank=2), {"m": F((4, 2), 24)})[0], "miss_mini", "y")


def test_miss_bat():
    m = F((2, 4, 4), 24).swapaxes(1, 2)
    agree(run(methods.miss(rank=4, bat=True), {"m": m})[0], "miss_bat", "y")


def test_fourierft():
    y, update = run(methods.fourierft(n=6), {"c": F((6,), 25)})
    agree(y, "fourierft", "y", 1e-5)
    agree(update.T, "fourierft", "delta", 1e-5)  # theirs is the transpose


def test_randlora():
    held = {"bases_a": F((3, 1, 8), 30)[:, 0], "bases_b": F((12, 3, 3), 31)}
    trained = {"lambda": F((3, 3), 32), "gamma": F((3, 8), 33)}
    method = methods.randlora(rank=3, alpha=6)
    agree(run(method, trained, frozen_common=held)[0], "randlora", "y")
