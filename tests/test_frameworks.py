"""Every framework's module becomes `apply, params` in one line."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj

X = jax.random.normal(jax.random.key(0), (4, 5))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.List([nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(7, rngs=rngs)

    def __call__(self, x):
        return self.inner[1](self.norm(self.inner[0](x)))

    def features(self, x):
        return self.inner[0](x)


class LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(7)(x)))


def adapted_equals_merged(apply, params, *inputs):
    sites = lj.find_sites(apply, params, *inputs)
    frozen, trained = lj.attach(jax.random.key(1), params, {lj.all_linear: lj.dora(2)}, sites)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    ours = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), *inputs)
    theirs = jax.jit(apply)(lj.merge(frozen, trained), *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, theirs)
    return sites


def test_nnx():
    module = Normed(nnx.Rngs(0))
    module.eval()
    apply, params = lj.from_nnx(module)
    np.testing.assert_array_equal(apply(params, X), module(X))
    assert list(adapted_equals_merged(apply, params, X)) == ["inner/0/kernel", "inner/1/kernel"]
    features, params = lj.from_nnx(module, method="features")
    assert features(params, X).shape == (4, 7)


def test_nnx_with_state_gives_back_what_the_call_left():
    module = Normed(nnx.Rngs(0))
    apply, params, state = lj.from_nnx_stateful(module)
    adapted_equals_merged(apply, params, state, X)
    out, after = jax.jit(apply)(params, state, X)
    np.testing.assert_allclose(out, module(X), rtol=1e-5, atol=1e-6)  # which updates the module
    np.testing.assert_allclose(
        after["norm"]["mean"][...], module.norm.mean[...], rtol=1e-5, atol=1e-6
    )


def test_linen_with_and_without_state():
    module = LinenNormed()
    variables = module.init(jax.random.key(0), X)
    apply, params = lj.from_linen(module, variables)
    np.testing.assert_array_equal(apply(params, X), module.apply(variables, X))
    assert list(adapted_equals_merged(apply, params, X)) == ["Dense_0/kernel", "Dense_1/kernel"]
    apply, params, state = lj.from_linen_stateful(module, variables)
    _, after = apply(params, state, X, train=True)
    assert set(after) == {"batch_stats"}
    with pytest.raises(lj.InputError, match="no 'params'"):
        lj.from_linen(module, params)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 3, 7, 2, key=jax.random.key(0))
    apply, params = lj.from_equinox(model)
    np.testing.assert_array_equal(apply(params, X[0]), model(X[0]))
    adapted_equals_merged(jax.vmap(apply, in_axes=(None, 0)), params, X)


def test_haiku():
    hk = pytest.importorskip("haiku")
    transformed = hk.transform(lambda x: hk.nets.MLP([7, 3])(x))
    params = transformed.init(jax.random.key(0), X)
    apply, params = lj.from_haiku(transformed, params)
    np.testing.assert_array_equal(apply(params, X), transformed.apply(params, None, X))
    assert list(adapted_equals_merged(apply, params, X)) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]


def test_what_is_no_module_is_refused():
    with pytest.raises(lj.InputError, match=r"takes a flax.nnx.Module; this is a dict"):
        lj.from_nnx({"w": X})
    with pytest.raises(lj.InputError, match="callable pytree; this is a dict"):
        lj.from_equinox({"w": X})
