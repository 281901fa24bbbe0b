import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, tied

import lora_jax as lj

METHOD = lj.lora(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def model():
    apply, params, inputs = tied(jax.random.key(0))
    return apply, params, inputs, lj.find_sites(apply, params, *inputs)


def test_the_base_is_shared_not_copied(model):
    _, params, _, sites = model
    frozen, _ = lj.attach(jax.random.key(0), params, {".*": METHOD}, sites)
    for path, node in lj.adapted(frozen).items():
        assert node.frozen["w"] is lj.tree.flatten(params)[path]


def test_adding_a_target_changes_no_other_and_no_two_start_equal(model):
    _, params, _, sites = model
    key = jax.random.key(0)
    _, few = lj.attach(key, params, {"layers/up": METHOD}, sites)
    _, many = lj.attach(key, params, {"layers/.*": METHOD}, sites)
    np.testing.assert_array_equal(few["layers/up"]["a"], many["layers/up"]["a"])
    a = many["layers/up"]["a"]
    assert np.abs(a[0] - a[1]).min() > 0
    square = {"p": jnp.ones((3, 3)), "q": jnp.ones((3, 3))}
    twins = lj.find_sites(lambda p, x: x @ p["p"] @ p["q"], square, jnp.ones((2, 3)))
    _, both = lj.attach(key, square, {".*": METHOD}, twins)
    assert np.abs(both["p"]["a"] - both["q"]["a"]).min() > 0


def test_old_style_keys_draw_the_same_factors(model):
    _, params, _, sites = model
    new = lj.attach(jax.random.key(3), params, {"layers/up": METHOD}, sites)[1]
    old = lj.attach(jax.random.PRNGKey(3), params, {"layers/up": METHOD}, sites)[1]
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_factors_of_a_stack_have_the_width_of_one_layer():
    """The bound 1/sqrt(d_in) belongs to one matrix; over the stack it would be sqrt(L) less."""
    params = {"w": jnp.ones((30, 64, 48))}
    sites = lj.find_sites(
        lambda p, x: jax.lax.scan(lambda h, w: (x @ w @ w.T, None), x, p["w"])[0],
        params,
        jnp.ones((2, 64)),
    )
    _, trained = lj.attach(jax.random.key(0), params, {"w": lj.lora(rank=4)}, sites)
    a = trained["w"]["a"]
    assert np.abs(a).max() <= 1 / 8
    assert a.std() == pytest.approx(1 / np.sqrt(3 * 64), rel=0.02)


def test_adapters_are_float32_over_a_bfloat16_base():
    params = {"w": jnp.ones((5, 7), jnp.bfloat16)}
    x = jnp.ones((3, 5), jnp.bfloat16)
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    for method in (METHOD, lj.dora(rank=2)):
        frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
        loss = lambda t, f=frozen: lj.factored(apply)(lj.bind(f, t), x).sum()  # noqa: E731
        grads = jax.grad(loss)(trained)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        assert lj.factored(apply)(lj.bind(frozen, trained), x).dtype == jnp.bfloat16
        assert lj.merge(frozen, trained)["w"].dtype == jnp.bfloat16


def test_frozen_means_frozen_and_has_no_optimizer_state(model):
    apply, params, inputs, sites = model
    frozen, trained = lj.attach(jax.random.key(0), params, {"layers/.*": METHOD}, sites)
    before = jax.tree.map(np.array, frozen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    state = optimizer.init(trained)
    assert lj.tree.count(state) <= 2 * lj.tree.count(trained) + 2
    for _ in range(3):
        grads = jax.grad(lambda t: lj.factored(apply)(lj.bind(frozen, t), *inputs).var())(trained)
        updates, state = optimizer.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


def test_full_trains_any_parameter_of_any_role(model):
    apply, _, inputs, _ = model
    params = {
        "embed": {"embedding": jnp.ones((11, 6))},
        "layers": {"up": jnp.ones((3, 6, 8)), "down": jnp.ones((3, 8, 6))},
    }
    sites = lj.find_sites(apply, params, *inputs)
    frozen, trained = lj.attach(jax.random.key(0), params, {"layers/up": lj.full()}, sites)
    assert jax.tree.map(jnp.shape, trained) == {"layers/up": {"w": (3, 6, 8)}}
    np.testing.assert_array_equal(
        lj.factored(apply)(lj.bind(frozen, trained), *inputs), apply(params, *inputs)
    )
    assert (
        lj.summary(frozen, trained)
        == "trainable params: 144 || all params: 354 || trainable%: 40.6780"
    )


def test_layers_of_one_stack_may_differ_in_rank_alpha_and_presence(model):
    apply, params, inputs, sites = model
    for make in (lj.lora, lj.dora):
        choices = [make(rank=2, alpha=4.0), None, make(rank=3, alpha=9.0, rslora=True)]
        frozen, trained = lj.attach(jax.random.key(0), params, {"layers/up": choices}, sites)
        assert set(trained["layers/up"]) == {"0", "2"}
        assert trained["layers/up"]["2"]["a"].shape == (6, 3)
        plain = jax.jit(apply)(params, *inputs)
        fresh = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), *inputs)
        np.testing.assert_allclose(fresh, plain, rtol=1e-5, atol=1e-6)
        moved = jax.tree.map(lambda x: x + 0.1, trained)
        merged = lj.merge(frozen, moved)["layers"]["up"]
        np.testing.assert_allclose(merged[1], params["layers"]["up"][1], rtol=1e-6)
        part = moved["layers/up"]["2"]
        v = params["layers"]["up"][2] + 9 / np.sqrt(3) * part["a"] @ part["b"]
        if make is lj.dora:
            v = v * part["magnitude"][None, :] / np.linalg.norm(v, axis=0, keepdims=True)
        np.testing.assert_allclose(merged[2], v, rtol=1e-5, atol=1e-6)
        factored = lj.factored(apply)(lj.bind(frozen, moved), *inputs)
        np.testing.assert_allclose(
            factored, apply(lj.merge(frozen, moved), *inputs), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layers/upp": METHOD}, "pattern 'layers/upp' matches no parameter; nearest: 'layers/up'"),
        ({"layers/up": lj.lora}, "is no method"),
        ({"layers/up": [METHOD]}, "lists 1 methods, but its stack has 3 layers"),
        ({"layers/up": [None] * 3}, "lists no method at all"),
        ({"layers/up": [METHOD, lj.dora(), None]}, "one kind of method"),
        ({"layers/up": [METHOD, lj.lora(freeze_a=True), None]}, "one kind of method"),
        ({"layers/up": [None, lj.full(), None]}, "give it to the whole stack"),
        ({"embed/embedding": [METHOD]}, "its stack has 0 layers"),
    ],
)
def test_bad_rules_say_what_is_wrong(model, rules, message):
    _, params, _, sites = model
    with pytest.raises(lj.InputError, match=re.escape(message)):
        lj.attach(jax.random.key(0), params, rules, sites)


def test_a_bias_can_take_full_and_nothing_else():
    apply, params, inputs = CASES[0].build(jax.random.key(0))
    sites = lj.find_sites(apply, params, *inputs)
    with pytest.raises(lj.InputError, match=r"'bias' is no kernel .* only full\(\) can train it"):
        lj.attach(jax.random.key(0), params, {"bias": METHOD}, sites)
    frozen, trained = lj.attach(jax.random.key(0), params, {"bias": lj.full()}, sites)
    grads = jax.grad(lambda t: lj.factored(apply)(lj.bind(frozen, t), *inputs).sum())(trained)
    assert np.abs(grads["bias"]["w"]).min() > 0


def test_a_foreign_trained_part_is_refused(model):
    _, params, _, sites = model
    frozen, _ = lj.attach(jax.random.key(0), params, {"layers/.*": METHOD}, sites)
    with pytest.raises(
        lj.InputError, match=r"missing \['layers/down', 'layers/up'\], surplus \['x'\]"
    ):
        lj.bind(frozen, {"x": {}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "the rank is a positive integer"),
        ({"rank": 2.0}, "the rank is a positive integer"),
        ({"rank": True}, "the rank is a positive integer"),
        ({"alpha": 0}, "give alpha > 0"),
        ({"alpha": float("nan")}, "give alpha > 0"),
        ({"dropout": 1.0}, "lies in [0, 1)"),
        ({"init": "zeros"}, "unknown init; give one of 'kaiming', 'gaussian'"),
    ],
)
@pytest.mark.parametrize("make", [lj.lora, lj.dora])
def test_hyper_parameters_out_of_range(make, arguments, message):
    with pytest.raises(lj.InputError, match=re.escape(message)):
        make(**arguments)


def test_methods_compare_by_what_they_do():
    assert lj.lora(rank=4) == lj.lora(rank=4) != lj.lora(rank=5)
    assert hash(lj.dora()) == hash(lj.dora())
    assert lj.lora(alpha=8) == lj.lora(alpha=8.0)

    def mine(factor):
        return lj.Method("mine", METHOD.init, lambda f, t: f["w"] * factor)

    assert mine(2.0) == mine(2.0) != mine(3.0)  # although `hyper` says nothing of the factor
