"""Laws that hold for every method on every model: one table of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import lora_jax as lj

METHODS = [
    lj.lora(rank=2, alpha=3.0),
    lj.lora(rank=3, rslora=True, init="gaussian"),
    lj.lora(rank=2, freeze_a=True),
    lj.dora(rank=2, alpha=3.0),
    lj.dora(rank=2, detach_norm=False),
]


@functools.cache
def built(case):
    apply, params, inputs = case.build(jax.random.key(1))
    return apply, params, inputs, lj.find_sites(apply, params, *inputs)


def attached(case, method, moved):
    apply, params, inputs, sites = built(case)
    frozen, trained = lj.attach(jax.random.key(2), params, {case.targets: method}, sites)
    if moved:
        leaves, structure = jax.tree.flatten(trained)
        keys = jax.random.split(jax.random.key(3), len(leaves))
        leaves = [
            x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
        ]
        trained = jax.tree.unflatten(structure, leaves)
    return apply, params, inputs, frozen, trained


def close(actual, expected, dtype_rounding=2e-6):
    loose = 3e-2 if jnp.result_type(expected) == jnp.bfloat16 else dtype_rounding
    actual, expected = np.float64(actual), np.float64(expected)
    np.testing.assert_allclose(actual, expected, atol=loose * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_fresh_adapter_changes_nothing(case, method):
    apply, params, inputs, frozen, trained = attached(case, method, moved=False)
    fresh = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), *inputs)
    plain = jax.jit(apply)(params, *inputs)
    assert fresh.dtype == plain.dtype
    if method.name == "lora":
        np.testing.assert_array_equal(np.float32(fresh), np.float32(plain))
    else:
        close(fresh, plain)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_factored_is_materialised_is_merged(case, method):
    apply, params, inputs, frozen, trained = attached(case, method, moved=True)
    bound = lj.bind(frozen, trained)
    factored = jax.jit(lj.factored(apply))(bound, *inputs)
    materialised = jax.jit(lj.materialised(apply))(bound, *inputs)
    merged = lj.merge(frozen, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    close(factored, materialised)
    close(jax.jit(apply)(merged, *inputs), materialised)
    assert np.abs(np.float32(factored) - np.float32(apply(params, *inputs))).max() > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", [METHODS[0], METHODS[-1]], ids=str)
def test_gradients_are_those_of_the_materialised_model(case, method):
    apply, _, inputs, frozen, trained = attached(case, method, moved=True)

    def loss(transform, trained):
        y = transform(apply)(lj.bind(frozen, trained), *inputs)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    ours = jax.jit(jax.grad(functools.partial(loss, lj.factored)))(trained)
    theirs = jax.jit(jax.grad(functools.partial(loss, lj.materialised)))(trained)
    rounding = 6e-2 if "bfloat16" in case.name else 1e-5
    jax.tree.map(functools.partial(close, dtype_rounding=rounding), ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jit_equals_eager_and_shapes_are_enough(case):
    apply, params, inputs, frozen, trained = attached(case, METHODS[0], moved=True)
    bound = lj.bind(frozen, trained)
    eager = lj.factored(apply)(bound, *inputs)
    close(jax.jit(lj.factored(apply))(bound, *inputs), eager)
    shape = jax.eval_shape(lj.factored(apply), bound, *inputs)
    assert (shape.shape, shape.dtype) == (eager.shape, eager.dtype)
