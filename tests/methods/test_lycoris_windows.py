"""LoHa and LoKr on convolutions, and in stacks whose layers have unequal ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import slow_but

import lora_jax as lj
from lora_jax.io.native import load_adapter, save_adapter
from lora_jax.methods import loha, lokr

LAYOUTS = {  # of the kernel [h, w, c_in, c_out], and where its axes went
    "HWIO": (0, 1, 2, 3),
    "OIHW": (3, 2, 0, 1),
    "IHOW": (2, 0, 3, 1),
}
SIZES = {"H": 3, "W": 2, "I": 6, "O": 20}


def convolution(layout, groups=1):
    w = np.random.default_rng(0).standard_normal([SIZES[n] for n in "HWIO"])
    params = {"w": jnp.asarray(w.transpose(LAYOUTS[layout]), jnp.float32)}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 4, 6 * groups)), jnp.float32)

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 2),
            "SAME",
            dimension_numbers=("NHWC", layout, "NHWC"),
            feature_group_count=groups,
        )

    return apply, params, x, lj.find_sites(apply, params, x)


def moved(trained, seed=2):
    rng = np.random.default_rng(seed)
    change = lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(change, trained)


def loha_by_hand(t, scale):
    one, two = (np.einsum("pqhw,po,iq->hwio", t[f"t{i}"], t[f"b{i}"], t[f"a{i}"]) for i in "12")
    return scale * one * two


def lokr_by_hand(t, scale):
    w1 = t["w1"] if "w1" in t else t["a1"] @ t["b1"]
    if "t2" in t:
        w2 = np.einsum("pqhw,pb,dq->dhwb", t["t2"], t["b2"], t["a2"])
    else:
        w2 = (t["w2"] if "w2" in t else t["a2"] @ t["b2"]).reshape(3, 3, 2, -1)
    c, a = w1.shape
    return scale * np.einsum("ca,dhwb->hwcdab", w1, w2).reshape(3, 2, 6, 20)


METHODS = {
    "loha, thin": (loha(2, 3, effective_conv=True), loha_by_hand),
    "loha, formed": (loha(3, 3, effective_conv=True), loha_by_hand),
    "lokr": (lokr(1, 3, effective_conv=True), lokr_by_hand),
    "lokr, flat": (lokr(2, 3), lokr_by_hand),
    "lokr, whole": (lokr(4, 3, effective_conv=True), lokr_by_hand),
    "lokr, both": (lokr(1, 3, decompose_both=True, effective_conv=True, zero="w2"), lokr_by_hand),
}


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, ("OIHW",)))
@pytest.mark.parametrize("name", METHODS)
def test_a_convolution_under_its_definition(name, layout):
    (method, by_hand), (apply, params, x, sites) = METHODS[name], convolution(layout)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    np.testing.assert_allclose(lj.merge(frozen, trained)["w"], params["w"])
    trained = moved(trained)
    merged = lj.merge(frozen, trained)
    update = by_hand(trained["w"], 3 / method.hyper["rank"]).transpose(LAYOUTS[layout])
    np.testing.assert_allclose(merged["w"] - params["w"], update, atol=1e-4)
    loss = lambda form, t: jnp.sum(jnp.sin(form(apply)(lj.bind(frozen, t), x)))  # noqa: E731
    found, wanted = (
        jax.value_and_grad(lambda t, form=form: loss(form, t))(trained)
        for form in (lj.factored, lj.materialised)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, wanted)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (loha(2), 2 * 2 * (6 * 6 + 20)),
        (loha(2, effective_conv=True), 2 * 2 * (6 + 20) + 2 * 2**2 * 6),
        (lokr(1), 2 * 4 + (3 * 6 + 5)),  # c_in = 2 x 3, c_out = 4 x 5
        (lokr(1, effective_conv=True), 2 * 4 + (3 + 5) + 6),
        (lokr(3, effective_conv=True), 2 * 4 + 3 * 6 * 5),
    ],
    ids=repr,
)
def test_counts_on_a_convolution(method, count):
    _, params, _, sites = convolution("HWIO")
    _, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    assert lj.tree.count(trained) == count


@pytest.mark.parametrize("method", [loha(2, effective_conv=True), lokr(1, effective_conv=True)])
def test_groups_are_a_stack(method, tmp_path):
    apply, params, x, sites = convolution("OIHW", groups=2)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    trained = moved(trained)
    ours = lj.factored(apply)(lj.bind(frozen, trained), x)
    np.testing.assert_allclose(ours, apply(lj.merge(frozen, trained), x), atol=1e-3)
    save_adapter(tmp_path / "a", frozen, trained)
    again = load_adapter(tmp_path / "a", params, sites)
    assert jax.tree.structure(again) == jax.tree.structure((frozen, trained))
    np.testing.assert_array_equal(lj.merge(*again)["w"], lj.merge(frozen, trained)["w"])


def test_a_window_of_one_place_and_a_linear_kernel_have_no_core():
    params = {"w": jnp.ones((1, 1, 6, 8)), "v": jnp.ones((6, 8))}

    def apply(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + x @ params["v"]

    sites = lj.find_sites(apply, params, jnp.ones((1, 2, 2, 6)))
    assert sites["v"].window is None and sites["w"].window.shape == (1, 1)
    rules = {".*": loha(2, effective_conv=True)}
    _, trained = lj.attach(jax.random.key(0), params, rules, sites)
    assert set(trained["w"]) == set(trained["v"]) == {"a1", "b1", "a2", "b2"}


def test_a_part_of_a_kernel_has_the_window_of_the_whole():
    apply, params, _, sites = convolution("HWIO")
    parts = sites.split("w", {"one": 2, "two": 4}, axis=2)
    assert [parts[f"w/{n}"].window.c_in for n in ("one", "two")] == [2, 4]
    frozen, trained = lj.attach(
        jax.random.key(0), params, {"w/.*": loha(2, effective_conv=True)}, parts
    )
    assert trained["w/two"]["t1"].shape == (2, 2, 3, 2)
    trained = moved(trained)
    x = jnp.ones((1, 5, 4, 6))
    ours = lj.materialised(apply)(lj.bind(frozen, trained), x)
    np.testing.assert_allclose(ours, apply(lj.merge(frozen, trained), x), atol=1e-3)


def scanned(shape):
    """Three layers of a kernel in one scan, by a matrix or by a convolution."""
    w = np.random.default_rng(0).standard_normal((3, *shape)) / 10
    params = {"w": jnp.asarray(w, jnp.float32)}

    def product(x, w):
        if w.ndim == 2:
            return x @ w
        letters = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=letters)

    def apply(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(product(h, w)), None), x, params["w"])[0]

    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, shape[-1])), jnp.float32)
    return apply, params, x, lj.find_sites(apply, params, x)


UNEQUAL = {
    "loha, thin": [loha(1), loha(2, 5), loha(2)],
    "loha, formed": [loha(3), None, loha(1, 4)],
    "loha, either": [loha(1), loha(3), loha(2)],
    "loha, cores": [loha(n, effective_conv=True) for n in (1, 3, 2)],
    "lokr": [lokr(1, factor=2), lokr(2, factor=2), lokr(3, factor=2)],
    "lokr, both": [lokr(n, decompose_both=True, factor=6) for n in (1, 2, 1)],
    "lokr, cores": [lokr(n, factor=2, effective_conv=True) for n in (2, 1, 3)],
}


@pytest.mark.parametrize("name", slow_but(UNEQUAL, ("lokr, cores",)))
def test_layers_of_unequal_rank_share_a_stack(name):
    layers = UNEQUAL[name]
    shape = (20, 20) if "cores" not in name else (3, 20, 20)
    shape = (36, 36) if name == "lokr, both" else shape
    apply, params, x, sites = scanned(shape)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": layers}, sites)
    trained = moved(trained)
    alone = {"w": params["w"][0]}
    plain = (lambda p, x: x @ p["w"]) if len(shape) == 2 else None
    merged = lj.merge(frozen, trained)["w"]
    for i, method in enumerate(layers):
        if method is None:
            np.testing.assert_allclose(merged[i], params["w"][i], atol=1e-6)
            continue
        if plain is None:  # the layer by itself, as a convolution of its own
            plain = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
                x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
            )
        one = lj.find_sites(plain, alone, x)
        kept, _ = lj.attach(jax.random.key(0), {"w": params["w"][i]}, {"w": method}, one)
        by_itself = lj.merge(kept, {"w": trained["w"][str(i)]})["w"]
        np.testing.assert_allclose(merged[i], by_itself, atol=1e-5)
    loss = lambda form, t: jnp.sum(jnp.sin(form(apply)(lj.bind(frozen, t), x)))  # noqa: E731
    found, wanted = (
        jax.value_and_grad(lambda t, form=form: loss(form, t))(trained)
        for form in (lj.factored, lj.materialised)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([lokr(1), lokr(9), lokr(1)], r"rank and alpha only \(these train a2, b2, w1 and w1, w2\)"),
        ([lokr(1, factor=2), lokr(1, factor=4), lokr(1, factor=2)], "rank and alpha only"),
        ([loha(1), loha(1, rank_dropout=0.1), loha(1)], "rank and alpha only"),
    ],
    ids=["structure", "factor", "dropout"],
)
def test_layers_of_other_structure_are_refused(layers, said):
    _, params, _, sites = scanned((20, 20))
    with pytest.raises(lj.InputError, match=said):
        lj.attach(jax.random.key(0), params, {"w": layers}, sites)
