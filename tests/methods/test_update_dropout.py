"""Dropout of LoHa's and LoKr's updates: whole columns, and the whole update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods import loha, lokr

D_IN, D_OUT = 24, 20
FORMS = {  # each with the way that it multiplies
    "loha, thin": (loha, {"rank": 2}),
    "loha, formed": (loha, {"rank": 4}),
    "lokr": (lokr, {"rank": 1}),
    "lokr, formed": (lokr, {"rank": 3}),
}


def adapted(method, shape=(D_IN, D_OUT)):
    """A function of a key and a zero kernel's update alone: outputs, formed update, rows."""
    params = {"w": jnp.zeros(shape)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, shape[-2])), jnp.float32)
    stacked = len(shape) == 3

    def apply(params, x):
        if stacked:
            return jax.lax.scan(lambda _, w: (0.0, x @ w), 0.0, params["w"])[1]
        return x @ params["w"]

    sites = lj.find_sites(apply, params, x)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape), trained)
    trained = jax.tree.map(lambda a: a.astype(jnp.float32), trained)
    run = jax.jit(lambda key: lj.factored(apply)(lj.bind(frozen, trained, key), x))
    plain = lj.factored(apply)(lj.bind(frozen, trained), x)
    return run, np.asarray(plain)


def factors_of(dropped, plain):
    """By what each column was multiplied, the same in all rows."""
    ratios = np.asarray(dropped) / plain
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[..., :1, :], ratios.shape), atol=1e-3)
    return ratios[..., 0, :]


def keys(count):
    return jax.random.split(jax.random.key(5), count)


@pytest.mark.parametrize("name", FORMS)
def test_columns_fall_whole_and_the_others_make_up_for_them(name):
    make, hyper = FORMS[name]
    rescaled = {"rank_dropout_scale": True} if make is lokr else {}
    run, plain = adapted(make(**hyper, rank_dropout=0.5, **rescaled))
    shares = []
    for key in keys(20):
        factors = factors_of(run(key), plain)
        fallen = factors == 0
        assert fallen.any() and not fallen.all()
        np.testing.assert_allclose(factors[~fallen], D_OUT / (~fallen).sum(), rtol=1e-3)
        shares.append(fallen.mean())
    assert abs(np.mean(shares) - 0.5) < 4 * 0.5 / np.sqrt(20 * D_OUT)
    np.testing.assert_array_equal(run(keys(2)[0]), run(keys(2)[0]))


def test_lokr_scales_only_where_it_is_told_to():
    run, plain = adapted(lokr(rank=1, rank_dropout=0.3))
    assert {*np.round(factors_of(run(keys(1)[0]), plain), 3)} == {0.0, 1.0}


@pytest.mark.parametrize("name", FORMS)
def test_the_expected_update_under_rank_dropout_is_the_update(name):
    make, hyper = FORMS[name]
    run, plain = adapted(make(**hyper, rank_dropout=0.2))
    mean = np.mean(jax.vmap(run)(keys(400)), axis=0)
    share = 1.0 if make is loha else 0.8  # LoKr leaves the others as they are
    np.testing.assert_allclose(factors_of(mean, plain), share, atol=0.15)


@pytest.mark.parametrize("name", FORMS)
def test_a_module_falls_whole_and_nothing_makes_up_for_it(name):
    make, hyper = FORMS[name]
    run, plain = adapted(make(**hyper, module_dropout=0.3))
    factors = np.round(factors_of(jax.vmap(run)(keys(400)), plain[None]), 3)
    assert {*np.unique(factors)} == {0.0, 1.0}
    assert (factors == factors[:, :1]).all()
    assert abs(factors[:, 0].mean() - 0.7) < 4 * np.sqrt(0.21 / 400)


def test_both_dropouts_are_drawn_apart():
    run, plain = adapted(loha(rank=2, rank_dropout=0.5, module_dropout=0.5))
    factors = factors_of(jax.vmap(run)(keys(200)), plain[None])
    skipped = (factors == 0).all(axis=1)
    assert 60 < skipped.sum() < 140
    assert abs((factors[~skipped] == 0).mean() - 0.5) < 0.1


@pytest.mark.parametrize("method", [loha(2, rank_dropout=0.5), lokr(1, rank_dropout=0.5)], ids=repr)
def test_every_layer_of_a_stack_has_its_own_draw(method):
    run, plain = adapted(method, (3, D_IN, D_OUT))
    first, second, third = factors_of(run(keys(1)[0]), plain) == 0
    assert (first != second).any() and (second != third).any()


def test_every_expert_has_its_own_draw():
    sizes = jnp.asarray([4, 0, 5])
    params, x = {"w": jnp.zeros((3, D_IN, D_OUT))}, jnp.ones((9, D_IN))
    apply = lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes)  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    for make in (loha, lokr):
        rules = {"w": make(1, rank_dropout=0.5)}
        frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
        trained = jax.tree.map(lambda a: a + 1.0, trained)
        y = np.asarray(lj.factored(apply)(lj.bind(frozen, trained, jax.random.key(3)), x)) == 0
        assert (y[:4] == y[0]).all() and (y[4:] == y[4]).all() and (y[0] != y[4]).any()
        assert y.any() and not y.all()


def test_where_every_column_falls_the_update_is_zero():
    run, _ = adapted(loha(rank=1, rank_dropout=0.99), (8, 4))
    outputs = jax.vmap(run)(keys(50))
    assert np.isfinite(outputs).all() and (np.asarray(outputs) == 0).all(axis=(1, 2)).any()


def test_gradients_of_what_fell_are_zero():
    params, x = {"w": jnp.zeros((D_IN, D_OUT))}, jnp.ones((3, D_IN))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    rules = {"w": loha(2, rank_dropout=0.5)}
    frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
    trained = jax.tree.map(lambda a: a + 0.5, trained)
    key = jax.random.key(1)
    y = lj.factored(apply)(lj.bind(frozen, trained, key), x)[0]
    total = lambda t: jnp.sum(lj.factored(apply)(lj.bind(frozen, t, key), x) ** 2)  # noqa: E731
    grads = jax.grad(total)(trained)["w"]
    fallen = np.asarray(y) == 0
    for name in ("b1", "b2"):
        np.testing.assert_array_equal((np.asarray(grads[name]) == 0).all(axis=0), fallen)


@pytest.mark.parametrize("rate", ["rank_dropout", "module_dropout"])
@pytest.mark.parametrize("make", [loha, lokr])
def test_rates_outside_their_range_are_refused(make, rate):
    with pytest.raises(lj.InputError, match=rf"{make.__name__}\({rate}=1\.0\)"):
        make(2, **{rate: 1.0})


def test_formed_kernels_and_evaluation_drop_nothing():
    params, x = {"w": jnp.ones((D_IN, D_OUT))}, jnp.ones((3, D_IN))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    for method in (loha(2, rank_dropout=0.9, module_dropout=0.9), lokr(1, rank_dropout=0.9)):
        frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
        trained = jax.tree.map(lambda a: a + 0.5, trained)
        ours = lj.factored(apply)(lj.bind(frozen, trained), x)
        np.testing.assert_allclose(ours, apply(lj.merge(frozen, trained), x), rtol=1e-5)
