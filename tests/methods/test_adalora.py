"""AdaLoRA's form: PEFT's numbers, its count, its divisor, its errors."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods import adalora

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return jnp.asarray(np.sin(0.37 * n**2 + k).reshape(shape))


def attached(method, w, x):
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    sites = lj.find_sites(apply, {"w": w}, x)
    return apply, *lj.attach(jax.random.key(0), {"w": w}, {"w": method}, sites)


def test_golden_values():
    with jax.enable_x64(True):
        x, w, bias = closed_form((3, 12), 1), closed_form((12, 8), 2) / 2, closed_form((8,), 3)
        apply, frozen, _ = attached(adalora(rank=2, alpha=6.0), w, x)
        parts = {"a": (12, 2), "e": (2,), "b": (2, 8)}
        trained = {n: closed_form(parts[n], k) for n, k in (("a", 4), ("e", 12), ("b", 5))}
        y = lj.factored(apply)(lj.bind(frozen, {"w": trained}), x) + bias[None, :]
        flat = np.ravel(y)
        found = [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]
        np.testing.assert_allclose(found, GOLDEN["adalora"]["y"], rtol=1e-9)
        a, b = lj.adapted(frozen)["w"].method.factors(lj.adapted(frozen)["w"].frozen, trained)
        np.testing.assert_allclose(w + a @ b, lj.merge(frozen, {"w": trained})["w"], rtol=1e-12)


def test_a_fresh_adapter_changes_nothing_and_is_small_noise():
    x, w = jnp.ones((3, 300)), jnp.ones((300, 200))
    apply, frozen, trained = attached(adalora(rank=24), w, x)
    np.testing.assert_array_equal(lj.factored(apply)(lj.bind(frozen, trained), x), x @ w)
    for name in "ab":
        assert np.std(trained["w"][name]) == pytest.approx(0.02, rel=0.05)
    assert lj.tree.count(trained) == 24 * (300 + 200 + 1)


def test_count_of_a_worked_stack():
    """q and v of 12 blocks of width 768."""
    params = {name: jax.ShapeDtypeStruct((12, 768, 768), jnp.float32) for name in "qv"}

    def apply(params, x):
        return jax.lax.scan(lambda h, p: (h @ p["q"] @ p["v"], None), x, params)[0]

    sites = lj.find_sites(apply, params, jax.ShapeDtypeStruct((2, 768), jnp.float32))
    start = lambda p: lj.attach(jax.random.key(0), p, {".*": adalora(rank=12)}, sites)  # noqa: E731
    assert lj.tree.count(jax.eval_shape(start, params)[1]) == 442_656


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        ({"rank": 4, "alpha": 8}, 8 / 4.00001),
        ({"rank": 4, "alpha": 0}, 4 / 4.00001),
        ({"rank": 2, "alpha": 8, "initial_rank": 4}, 8 / 4.00001),
        ({"rank": 2, "alpha": -1, "initial_rank": 4}, 4 / 4.00001),
    ],
)
def test_the_divisor_is_the_rank_at_the_start(arguments, scale):
    _, frozen, _ = attached(adalora(**arguments), jnp.ones((5, 3)), jnp.ones((2, 5)))
    assert lj.adapted(frozen)["w"].frozen["scale"] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "the rank is a positive integer"),
        ({"dropout": 1.0}, "lies in [0, 1)"),
        ({"alpha": float("nan")}, "give alpha > 0"),
        ({"rank": 4, "initial_rank": 3}, "ranks only shrink"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(lj.InputError, match=re.escape(message)):
        adalora(**arguments)
