import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mlp, tied

import lora_jax as lj


def stack(key, layers=4, d=48, f=80):
    """Scanned layers wide enough that products dominate the FLOPs."""
    keys = jax.random.split(key, 3)
    params = {
        "up": jax.random.normal(keys[0], (layers, d, f)) / d**0.5,
        "down": jax.random.normal(keys[1], (layers, f, d)) / f**0.5,
    }

    def apply(params, x):
        def layer(h, p):
            return h + jnp.maximum(h @ p["up"], 0) @ p["down"], None

        return jax.lax.scan(layer, x, params, unroll=layers)[0]  # XLA counts a loop's body once

    return apply, params, jax.random.normal(keys[2], (3, 64, d))


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("make", [lj.lora, lj.dora])
def test_no_flops_for_a_frozen_weights_gradient(make):
    apply, params, x = stack(jax.random.key(0))
    sites = lj.find_sites(apply, params, x)
    frozen, trained = lj.attach(jax.random.key(1), params, {lj.all_linear: make(rank=1)}, sites)

    def loss(transform, trained, frozen, x):
        return jnp.sum(transform(apply)(lj.bind(frozen, trained), x) ** 2)

    full = flops(jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2)), params, x)
    factored = flops(jax.grad(functools.partial(loss, lj.factored)), trained, frozen, x)
    materialised = flops(jax.grad(functools.partial(loss, lj.materialised)), trained, frozen, x)
    # 3 products a kernel (forward, input, weight); the first layer's input gradient is not needed
    # by full fine-tuning either, and rank 1 of width 48 x 80 adds 3 * (1/48 + 1/80) of a product.
    assert factored / full == pytest.approx(2 / 3, abs=0.09)
    assert factored < 0.8 * materialised


def test_equal_configurations_trace_once():
    apply, params, inputs = tied(jax.random.key(0))
    sites = lj.find_sites(apply, params, *inputs)
    traces = []

    def counted(params, ids):
        traces.append(1)
        return apply(params, ids)

    forward = jax.jit(lj.factored(counted))
    for seed in range(3):
        rules = {"layers/.*": lj.lora(rank=2, alpha=4), "embed/.*": lj.dora(rank=3)}
        bound = lj.bind(*lj.attach(jax.random.key(seed), params, rules, sites))
        forward(bound, *inputs)
    assert len(traces) == 1
    forward(
        lj.bind(*lj.attach(jax.random.key(0), params, {"layers/.*": lj.lora(3)}, sites)), *inputs
    )
    assert len(traces) == 2


def test_dropout_takes_its_key_at_bind_and_differs_by_layer():
    """With zero activations elsewhere the adapter path alone is seen."""
    params = {"w": jnp.zeros((3, 40, 30))}

    def apply(params, x):
        return jax.lax.scan(lambda _, w: (0.0, x @ w), 0.0, params["w"])[1]

    x = jnp.ones((1, 40))
    sites = lj.find_sites(apply, params, x)
    method = lj.lora(rank=40, alpha=40.0, dropout=0.5)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    eye = jnp.broadcast_to(jnp.eye(40), (3, 40, 40))
    trained = {"w": {"a": eye, "b": eye[:, :, :30]}}
    forward = jax.jit(lj.factored(apply))
    plain = forward(lj.bind(frozen, trained), x)
    np.testing.assert_array_equal(plain, np.ones((3, 1, 30)))
    masks = [forward(lj.bind(frozen, trained, jax.random.key(i)), x) for i in (0, 0, 1)]
    assert set(np.unique(masks[0])) == {0.0, 2.0}
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any() and (masks[0][0] != masks[0][1]).any()


def test_dropout_never_touches_the_base_term():
    apply, params, inputs = mlp(jax.random.key(0))
    sites = lj.find_sites(apply, params, *inputs)
    for make, rounding in ((lj.lora, 0), (lj.dora, 1e-5)):
        rules = {lj.all_linear: make(rank=2, dropout=0.9)}
        bound = lj.bind(*lj.attach(jax.random.key(0), params, rules, sites), jax.random.key(5))
        np.testing.assert_allclose(
            lj.factored(apply)(bound, *inputs), apply(params, *inputs), rtol=rounding, atol=rounding
        )


def test_dora_with_dropout_drops_all_but_the_base_term():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": jax.random.normal(jax.random.key(1), (6, 4))}, jnp.ones((3, 6))
    sites = lj.find_sites(apply, params, x)
    method = lj.dora(rank=2, alpha=4.0, dropout=0.5)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    t = jax.tree.map(lambda v: v + 0.3, trained)["w"]
    key = jax.random.key(7)
    y = lj.factored(apply)(lj.bind(frozen, {"w": t}, key), x)
    v = params["w"] + 2 * t["a"] @ t["b"]
    c = (t["magnitude"] / jnp.linalg.norm(v, axis=0))[None, :]
    # y is affine in the dropped input: recover the mask row by row, and it must be zeros and twos.
    basis = x @ params["w"]
    matrix = (c - 1) * params["w"] + 2 * c * (t["a"] @ t["b"])
    masks = np.array(list(itertools.product([0.0, 2.0], repeat=6)))
    for row in np.asarray(y - basis):
        errors = np.abs(masks @ np.asarray(matrix) - row).max(axis=1)
        assert errors.min() < 1e-5


def test_what_is_no_array_reaches_the_function_as_it_is():
    def apply(params, x, mode, *, scale=1.0, act=jnp.tanh):
        assert mode in ("double", "single") and isinstance(scale, float)
        y = act(x @ params["w"]) * scale
        return {"y": y * 2 if mode == "double" else y, "mode": mode and None}

    params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    sites = lj.find_sites(apply, params, x, "double")
    bound = lj.bind(*lj.attach(jax.random.key(0), params, {"w": lj.lora(rank=2)}, sites))
    out = lj.factored(apply)(bound, x, "double", scale=3.0)
    np.testing.assert_array_equal(out["y"], apply(params, x, "double", scale=3.0)["y"])


def test_an_operation_without_a_rule_names_itself_the_line_and_the_remedy():
    def apply(params, x):
        return x @ params["w"] + jnp.sum(params["w"] ** 2)

    params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    sites = lj.find_sites(apply, params, x)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": lj.lora(rank=2)}, sites)
    bound = lj.bind(frozen, jax.tree.map(lambda v: v + 0.1, trained))
    message = (
        r"'w' is adapted by lora\(.*uses it in '(square|integer_pow)' at .*test_transform.py:\d+"
    )
    with pytest.raises(lj.InputError, match=message) as caught:
        lj.factored(apply)(bound, x)
    assert "materialise='w'" in str(caught.value)
    formed = lj.factored(apply, materialise="w")(bound, x)
    np.testing.assert_allclose(formed, lj.materialised(apply)(bound, x), rtol=1e-6)
    with pytest.raises(
        lj.InputError, match=re.escape("pattern 'v' matches no parameter; nearest: 'w'")
    ):
        lj.factored(apply, materialise="v")(bound, x)


def test_the_kernel_of_a_product_is_never_formed():
    """No array of the kernel's size comes out of a product in the factored program."""
    apply, params, inputs = tied(jax.random.key(0))
    sites = lj.find_sites(apply, params, *inputs)
    bound = lj.bind(*lj.attach(jax.random.key(0), params, {".*": lj.dora(rank=2)}, sites))

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield from (tuple(v.aval.shape) for v in eqn.outvars)
            for inner in jax.tree.leaves(
                list(eqn.params.values()),
                is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from shapes(getattr(inner, "jaxpr", inner))

    made = set(shapes(jax.make_jaxpr(lj.factored(apply))(bound, *inputs).jaxpr))
    assert made and not made & {(11, 6), (6, 11), (6, 8), (8, 6)}


def test_many_adapters_over_one_base_are_a_vmap():
    apply, params, inputs = tied(jax.random.key(0))
    sites = lj.find_sites(apply, params, *inputs)
    rules = {".*": lj.lora(rank=2)}
    frozen, _ = lj.attach(jax.random.key(0), params, rules, sites)
    keys = jax.random.split(jax.random.key(1), 4)
    population = jax.vmap(lambda k: lj.attach(k, params, rules, sites)[1])(keys)
    population = jax.tree.map(lambda v: v + 0.1, population)

    def forward(trained):
        return lj.factored(apply)(lj.bind(frozen, trained), *inputs)

    together = jax.vmap(forward)(population)
    for i in range(4):
        alone = forward(jax.tree.map(lambda v, i=i: v[i], population))
        np.testing.assert_allclose(together[i], alone, rtol=2e-5, atol=2e-5)


def perturbed(apply, params, rules, *inputs):
    sites = lj.find_sites(apply, params, *inputs)
    frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
    return lj.bind(frozen, jax.tree.map(lambda v: v + 0.1, trained))


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: (x @ p["w"], p["w"]),
        lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: w * 2, p["w"]),
    ],
    ids=["function", "branch"],
)
def test_a_kernel_that_leaves_is_refused_and_never_the_base(apply):
    x = jnp.ones((2, 3))
    bound = perturbed(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, {"w": lj.lora(2)}, x)
    with pytest.raises(lj.InputError, match="materialise='w'"):
        lj.factored(apply)(bound, x)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        lj.factored(apply, materialise="w")(bound, x),
        lj.materialised(apply)(bound, x),
    )


def test_logits_of_a_tied_head_keep_the_type_they_accumulate_in():
    def apply(params, ids):
        table = params["table"].astype(jnp.bfloat16)
        return jnp.einsum("bd,vd->bv", table[ids], table, preferred_element_type=jnp.float32)

    params = {"table": jax.random.normal(jax.random.key(0), (64, 6))}
    ids = jnp.array([3, 1, 4])
    sites = lj.find_sites(apply, params, ids)
    bound = lj.bind(*lj.attach(jax.random.key(0), params, {"table": lj.lora(2)}, sites))
    fresh = jax.jit(lj.factored(apply))(bound, ids)
    # Not by way of bfloat16, which would be off by 1e-3; the order of the sum may differ.
    np.testing.assert_allclose(fresh, jax.jit(apply)(params, ids), atol=2e-6)


def test_whole_numbers_as_inputs_reach_the_adapter():
    def apply(params, x):
        dims = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, params["w"], dims, preferred_element_type=jnp.float32)

    x = jnp.arange(6).reshape(2, 3)
    bound = perturbed(apply, {"w": jnp.ones((3, 5))}, {"w": lj.lora(2)}, x)
    expected = lj.materialised(apply)(bound, x)
    np.testing.assert_allclose(lj.factored(apply)(bound, x), expected, rtol=1e-5)


def test_indices_out_of_range_give_what_the_base_gives():
    def apply(params, ids):
        return params["table"].at[ids].get(mode="fill", fill_value=2.0)

    ids = jnp.array([0, 7, 2])
    bound = perturbed(apply, {"table": jnp.ones((4, 6))}, {"table": lj.lora(2)}, ids)
    y = lj.factored(apply)(bound, ids)
    np.testing.assert_array_equal(y[1], np.full(6, 2.0))
    np.testing.assert_allclose(y, lj.materialised(apply)(bound, ids), rtol=1e-6)
