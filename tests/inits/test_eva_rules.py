"""Ranks go where inputs vary most, and their sum stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import calibrate, inits
from lora_jax.io.native import load_adapter, save_adapter

KEY = jax.random.key(0)
PARAMS = {
    "up": jax.random.normal(KEY, (3, 5, 7)),
    "down": jax.random.normal(jax.random.key(1), (3, 7, 5)),
    "head": jax.random.normal(jax.random.key(2), (5, 4)),
}


def apply(params, x):
    def layer(x, p):
        return x + 0.3 * jnp.tanh(x @ p["up"]) @ p["down"], None

    layers = {name: params[name] for name in ("up", "down")}
    return jax.lax.scan(layer, x, layers)[0] @ params["head"]


X = jax.random.normal(jax.random.key(3), (30, 5)) * jnp.array([3.0, 1, 0.3, 0.1, 0.01])
SITES = lj.find_sites(apply, PARAMS, X)
SCATTERS = calibrate.input_scatters(apply, PARAMS, [X], ".*", SITES)
METHOD = lj.lora(rank=2, alpha=6.0)


def ranks(rules):
    """The rank of every matrix, by path."""
    each = lambda choice: choice if isinstance(choice, list) else [choice]  # noqa: E731
    return {
        path: [m.hyper["rank"] if m else 0 for m in each(choice)] for path, choice in rules.items()
    }


def test_ranks_are_moved_and_none_is_lost():
    rules = inits.eva_rules(SCATTERS, METHOD)
    found = ranks(rules)
    assert sum(map(sum, found.values())) == 2 * 7
    assert max(map(max, found.values())) <= 4
    assert set(map(tuple, found.values())) != {(2, 2, 2), (2,)}
    values = {}
    for path, scatter in SCATTERS.items():
        own = np.linalg.eigvalsh(np.float64(scatter)).reshape(-1, scatter.shape[-1])[:, ::-1]
        for i, row in enumerate(own / own.sum(1, keepdims=True)):
            values |= {(path, i, k): share for k, share in enumerate(row[:4])}
    best = sorted(values, key=values.get, reverse=True)[:14]
    wanted = {
        path: [sum(b[:2] == (path, i) for b in best) for i in range(len(row))]
        for path, row in found.items()
    }
    assert found == wanted


def test_rules_attach_with_the_scale_kept(tmp_path):
    rules = inits.eva_rules(SCATTERS, METHOD)
    frozen, trained = lj.attach(KEY, PARAMS, rules, SITES)
    y = lj.factored(apply)(lj.bind(frozen, trained), X)
    np.testing.assert_allclose(y, apply(PARAMS, X), rtol=1e-5, atol=1e-5)
    for path, node in lj.adapted(frozen).items():
        rows = list(trained[path].values()) if isinstance(node.methods, tuple) else [trained[path]]
        for own in rows:
            square = own["a"].T @ own["a"]
            np.testing.assert_allclose(square, np.eye(len(square)), atol=1e-5)
        np.testing.assert_allclose(node.frozen["scale"], 3.0, rtol=1e-6)
    save_adapter(tmp_path / "a", frozen, trained)
    again = load_adapter(tmp_path / "a", PARAMS, SITES)
    jax.tree.map(np.testing.assert_array_equal, (frozen, trained), again)


def test_rho_one_moves_nothing_and_layers_may_lose_all():
    assert set(ranks(inits.eva_rules(SCATTERS, METHOD, rho=1)).values().__iter__().__next__()) == {
        2
    }
    flat, spiky = jnp.eye(6), jnp.diag(jnp.array([9.0, 9, 9, 0, 0, 0]))
    rules = inits.eva_rules({"q": flat, "k": spiky}, lj.lora(rank=1), rho=3)
    assert ranks(rules) == {"q": [0], "k": [2]} and rules["q"] is None
    method = lj.lora(rank=1, alpha=5.0)
    rules = inits.eva_rules({"q": jnp.stack([flat, spiky])}, method, rho=3)
    assert rules["q"] == [None, rules["q"][1]] and rules["q"][1].hyper["alpha"] == 10


def test_what_is_refused():
    with pytest.raises(lj.InputError, match="give rho >= 1"):
        inits.eva_rules(SCATTERS, METHOD, rho=0.5)
    with pytest.raises(lj.InputError, match="has no rank, alpha and init"):
        inits.eva_rules(SCATTERS, lj.full())
    with pytest.raises(lj.InputError, match="a rank that depends on the site"):
        inits.eva_rules(SCATTERS, lj.lora(rank=8, active_experts=2))
    with pytest.raises(lj.InputError, match="the ranks add up to 63, but the inputs have 41"):
        inits.eva_rules(SCATTERS, lj.lora(rank=9))
    with pytest.raises(lj.InputError, match="its inputs have 5 components"):
        lj.attach(KEY, PARAMS, {"up": lj.lora(rank=6, init=inits.eva(SCATTERS))}, SITES)


@pytest.mark.parametrize("make", [lj.lora, lj.dora])
def test_names_get_their_data_from_batches(make):
    loss = lambda params, x: jnp.mean(jnp.square(apply(params, x)))  # noqa: E731
    rules = {
        "up": make(rank=2, init="eva"),
        "down": make(rank=2, init="corda_kpm"),
        "head": make(rank=2, init="lora_ga"),
    }
    data = calibrate.with_data(rules, PARAMS, SITES, [X, 2 * X], apply=apply, loss=loss)
    assert ranks({"up": data["up"]}) == ranks(inits.eva_rules({"up": SCATTERS["up"]}, METHOD))
    assert data["head"].hyper == rules["head"].hyper
    frozen, trained = lj.attach(KEY, PARAMS, data, SITES)
    y = lj.factored(apply)(lj.bind(frozen, trained), X)
    np.testing.assert_allclose(y, apply(PARAMS, X), rtol=1e-4, atol=1e-4)
    with pytest.raises(lj.InputError, match="give with_data the function loss="):
        calibrate.with_data(rules, PARAMS, SITES, [X], apply=apply)
    plain = {"up": make(rank=2), "head": None}
    assert calibrate.with_data(plain, PARAMS, SITES, [X]) == plain
