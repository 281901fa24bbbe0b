"""(IA)^3, bottleneck adapters and BitFit: recorded numbers, what they share, counts, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import BIAS, GY, W, X, agree, closed_form, run

import lora_jax as lj
from lora_jax.io.native import load_adapter, save_adapter
from lora_jax.methods import houlsby, ia3, ia3_bias, ia3_rules
from lora_jax.select import biases

PARAMS = {"k": {"kernel": W, "bias": BIAS}}
L_OUT, L_IN = 1 + 0.3 * closed_form((8,), 20), 1 + 0.3 * closed_form((12,), 20)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def dense(params, x):
    return x @ params["k"]["kernel"] + params["k"]["bias"][None, :]


def stack(params, x):
    """Three layers under a scan."""

    def layer(h, p):
        h = jnp.tanh(h @ p["up"]["kernel"] + p["up"]["bias"][None, :])
        return h @ p["down"]["kernel"] + p["down"]["bias"][None, :], None

    return jax.lax.scan(layer, x, params)[0]


def stack_params():
    shapes = {"up": (3, 12, 8), "down": (3, 8, 12)}
    return {
        name: {"kernel": closed_form(s, i), "bias": closed_form((3, s[2]), i + 5)}
        for i, (name, s) in enumerate(shapes.items())
    }


def attached(apply, params, rules, x=X):
    params = jax.tree.map(jnp.asarray, params)
    sites = lj.find_sites(apply, params, jnp.asarray(x))
    rules = rules(sites, params) if callable(rules) else rules
    return params, sites, *lj.attach(jax.random.key(0), params, rules, sites)


def test_ia3_scales_the_output_with_its_bias():
    rules = lambda sites, params: ia3_rules(sites, params, ".*kernel")  # noqa: E731
    _, _, frozen, start = attached(dense, PARAMS, rules)
    assert lj.tree.count(start) == 8
    trained = start | {"k/kernel": {"l": jnp.asarray(L_OUT)}}
    forward = lambda t: lj.factored(dense)(lj.bind(frozen, t), jnp.asarray(X))  # noqa: E731
    y, pull = jax.vjp(forward, trained)
    agree(y, "ia3_out", "y")
    whole = (X @ W + BIAS) * GY
    np.testing.assert_allclose(pull(jnp.asarray(GY))[0]["k/kernel"]["l"], whole.sum(0))
    merged = lj.merge(frozen, trained)
    np.testing.assert_allclose(dense(merged, X), y, atol=1e-13)
    np.testing.assert_allclose(merged["k"]["bias"], BIAS * L_OUT)


def test_ia3_of_the_kernel_alone_leaves_the_bias():
    y, _, merged = run(ia3(), {"l": L_OUT})
    np.testing.assert_allclose(y, X @ W * L_OUT + BIAS, atol=1e-13)
    np.testing.assert_allclose(merged, W * L_OUT)


def test_ia3_on_the_input_side():
    y, grads, merged = run(ia3(feedforward=True), {"l": L_IN})
    agree(y, "ia3_in", "y")
    np.testing.assert_allclose(grads["l"], (X * (GY @ W.T)).sum(0))
    np.testing.assert_allclose(merged, W * L_IN[:, None])


@pytest.mark.parametrize("feedforward", [False, True])
def test_a_fresh_ia3_changes_no_bit(feedforward):
    y, _, merged = run(ia3(feedforward=feedforward), {"l": np.ones(12 if feedforward else 8)})
    np.testing.assert_array_equal(y, jnp.asarray(X) @ W + BIAS)
    np.testing.assert_array_equal(merged, W)


def moved(trained):
    return jax.tree.map(lambda x: x + 0.1 * closed_form(x.shape, 3), trained)


def both(sites, params):
    return ia3_rules(sites, params, ".*kernel", feedforward="down/kernel")


def test_ia3_of_scanned_layers_has_factors_for_each(tmp_path):
    params, sites, frozen, trained = attached(stack, stack_params(), both)
    shapes = jax.tree.map(jnp.shape, trained)
    assert shapes == {"up/kernel": {"l": (3, 8)}, "up/bias": {}, "down/kernel": {"l": (3, 8)}}
    np.testing.assert_allclose(
        lj.factored(stack)(lj.bind(frozen, trained), X), stack(params, X), atol=1e-13
    )
    trained = moved(trained)
    y = lj.factored(stack)(lj.bind(frozen, trained), X)
    h = jnp.asarray(X)
    for i in range(3):
        up, down = (jax.tree.map(lambda x: x[i], params[n]) for n in ("up", "down"))
        h = jnp.tanh((h @ up["kernel"] + up["bias"]) * trained["up/kernel"]["l"][i])
        h = (h * trained["down/kernel"]["l"][i]) @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(y, h, atol=1e-12)
    np.testing.assert_allclose(stack(lj.merge(frozen, trained), X), y, atol=1e-12)
    folder = save_adapter(tmp_path / "saved", frozen, trained)
    again = load_adapter(folder, params, sites)
    np.testing.assert_array_equal(lj.factored(stack)(lj.bind(*again), X), y)


def test_ia3_rules_refuse():
    params = jax.tree.map(jnp.asarray, stack_params())
    sites = lj.find_sites(stack, params, jnp.asarray(X))
    with pytest.raises(lj.InputError, match="'down/kernel', which targets='up/kernel' does not"):
        ia3_rules(sites, params, "up/kernel", feedforward="down/.*")
    with pytest.raises(lj.InputError, match="matches no parameter"):
        ia3_rules(sites, params, "gate/kernel")
    for rules in (
        {"up/bias": ia3_bias("up/kernel")},
        {"up/kernel": [ia3(), None, ia3()], "up/bias": ia3_bias("up/kernel")},
    ):
        with pytest.raises(lj.InputError, match="'up/kernel' needs one method for all its layers"):
            lj.attach(jax.random.key(0), params, rules, sites)


def bottleneck(seed=0):
    return {
        "down": closed_form((8, 5), seed),
        "down_bias": closed_form((5,), seed + 1),
        "up": closed_form((5, 8), seed + 2),
        "up_bias": closed_form((8,), seed + 3),
    }


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "tanh"])
def test_a_bottleneck_on_the_output(name):
    _, _, frozen, start = attached(dense, PARAMS, {"k/kernel": houlsby(5, activation=name)})
    t = bottleneck()
    assert jax.tree.map(jnp.shape, start["k/kernel"]) == jax.tree.map(jnp.shape, t)
    f = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}[name]
    h = X @ W
    expected = h + f(h @ t["down"] + t["down_bias"]) @ t["up"] + t["up_bias"] + BIAS
    y = lj.factored(dense)(lj.bind(frozen, {"k/kernel": t}), X)
    np.testing.assert_allclose(y, expected, atol=1e-13)


def test_the_bottleneck_s_bias_takes_up_the_model_s():
    """The paper's adapter, which reads x w + c, with other biases."""
    _, _, frozen, _ = attached(dense, PARAMS, {"k/kernel": houlsby(5)})
    t = bottleneck()
    h = X @ W + BIAS
    papers = h + jax.nn.gelu(h @ t["down"] + t["down_bias"]) @ t["up"] + t["up_bias"]
    ours = t | {"down_bias": t["down_bias"] + BIAS @ t["down"]}
    y = lj.factored(dense)(lj.bind(frozen, {"k/kernel": ours}), X)
    np.testing.assert_allclose(y, papers, atol=1e-13)


def test_a_fresh_bottleneck():
    params, _, frozen, trained = attached(dense, PARAMS, {"k/kernel": houlsby(5)})
    fresh = lj.factored(dense)(lj.bind(frozen, trained), X)
    np.testing.assert_array_equal(fresh, dense(params, jnp.asarray(X)))
    method = houlsby(300, near_identity="normal")
    _, trained = method.init(jax.random.key(1), jnp.zeros((7, 400)))
    for name in ("down", "up"):
        assert abs(trained[name]).max() < 0.02
        np.testing.assert_allclose(trained[name].std(), 0.0088, rtol=0.02)  # cut at two deviations
    assert not trained["down_bias"].any() and not trained["up_bias"].any()


def test_a_bottleneck_has_no_matrix():
    _, _, frozen, trained = attached(dense, PARAMS, {"k/kernel": houlsby(5)})
    with pytest.raises(lj.InputError, match="cannot be formed or merged"):
        lj.merge(frozen, trained)


def test_experts_have_bottlenecks_of_their_own():
    def experts(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.array([2, 0, 1]))

    params = {"w": closed_form((3, 12, 8), 2)}
    _, _, frozen, trained = attached(experts, params, {"w": houlsby(5)})
    trained = moved(trained)
    y = lj.factored(experts)(lj.bind(frozen, trained), jnp.asarray(X))
    for row, e in enumerate([0, 0, 2]):
        t = jax.tree.map(lambda v: v[e], trained["w"])
        h = X[row] @ params["w"][e]
        wanted = h + jax.nn.gelu(h @ t["down"] + t["down_bias"]) @ t["up"] + t["up_bias"]
        np.testing.assert_allclose(y[row], wanted, atol=1e-12)


def test_bitfit_trains_biases_and_nothing_else():
    params, sites, frozen, trained = attached(stack, stack_params(), {biases(): lj.full()})
    assert sorted(trained) == ["down/bias", "up/bias"]
    merged = lj.merge(frozen, moved(trained))
    for name in params:
        np.testing.assert_array_equal(merged[name]["kernel"], params[name]["kernel"])
        assert (merged[name]["bias"] != params[name]["bias"]).all()
    _, _, _, trained = attached(stack, stack_params(), {biases("q_proj", "down"): lj.full()})
    assert list(trained) == ["down/bias"]


def test_trainable_counts_of_a_worked_stack():
    """k, v and down; two bottlenecks; all biases of 12 blocks of width 768 (two norms each)."""

    def count(method, d_in, d_out):
        w = jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)
        return lj.tree.count(jax.eval_shape(method.init, jax.random.key(0), w)[1])

    down = count(ia3(feedforward=True), 3072, 768)
    assert 12 * (2 * count(ia3(), 768, 768) + down) == 55_296
    assert 12 * (count(houlsby(64), 768, 768) + count(houlsby(64), 3072, 768)) == 2_379_264
    shapes = {f"{name}/bias": 768 for name in ("q", "k", "v", "o", "down", "norm", "mlp_norm")}
    chosen = lj.tree.first_match({biases(): 1}, shapes | {"up/bias": 3072, "q/kernel": 768**2})
    assert 12 * sum((shapes | {"up/bias": 3072})[path] for path in chosen) == 101_376


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: houlsby(0), "size=0"),
        (lambda: houlsby(activation="elu"), "'elu'.*'gelu'"),
        (lambda: houlsby(near_identity="one"), "'one'.*'zero' or 'normal'"),
    ],
)
def test_hyper_parameters_out_of_range(make, words):
    with pytest.raises(lj.InputError, match=words):
        make()
