"""Convolution and batch normalisation against their sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.conv import BatchNorm, Conv2d


def written_out(x, kernel, stride, groups, pads):
    """The convolution as loops over places and taps, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    size, _, c_in, c_out = kernel.shape
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, c_out))
    for h, w in np.ndindex(rows, columns):
        window = x[:, h * stride : h * stride + size, w * stride : w * stride + size]
        for out in range(c_out):
            group = out // (c_out // groups)
            seen = window[..., group * c_in : (group + 1) * c_in]
            y[:, h, w, out] = np.sum(seen * kernel[..., out], axis=(1, 2, 3))
    return y


@pytest.mark.parametrize(
    ("size", "stride", "groups", "padding", "pads"),
    [
        (3, 1, 1, "SAME", [(1, 1), (1, 1)]),
        (3, 2, 1, "SAME", [(1, 1), (0, 1)]),  # TensorFlow puts the odd zero last
        (5, 2, 6, "SAME", [(2, 2), (1, 2)]),
        (3, 1, 2, "VALID", [(0, 0), (0, 0)]),
        (3, 2, 3, 1, [(1, 1), (1, 1)]),
        (3, 1, 1, [(0, 2), (1, 0)], [(0, 2), (1, 0)]),
    ],
)
def test_convolution(size, stride, groups, padding, pads):
    conv = Conv2d(
        6, 12, size, stride=stride, groups=groups, padding=padding, bias=True, rngs=nnx.Rngs(0)
    )
    conv.bias[...] = jnp.arange(12.0)
    x = np.random.default_rng(1).normal(size=(2, 7, 8, 6)).astype(np.float32)
    kernel = np.asarray(conv.kernel[...])
    assert kernel.shape == (size, size, 6 // groups, 12)
    wanted = written_out(x, kernel, stride, groups, pads) + np.arange(12)
    np.testing.assert_allclose(conv(jnp.asarray(x)), wanted, atol=1e-5)


def test_a_fresh_convolution_keeps_the_scale_of_gradients():
    conv = Conv2d(16, 32, 3, rngs=nnx.Rngs(0))
    assert np.std(conv.kernel[...]) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)


def test_convolution_computes_in_the_dtype_of_its_input():
    conv = Conv2d(2, 3, 1, bias=True, rngs=nnx.Rngs(0))
    assert conv(jnp.ones((1, 4, 5, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def random_norm(key):
    norm = BatchNorm(4, eps=0.1, rate=0.3)
    values = jax.random.uniform(key, (4, 4), minval=0.5)
    norm.scale[...], norm.bias[...], norm.mean[...], norm.var[...] = values
    return norm, values


def test_batch_normalisation_at_inference(key):
    norm, (scale, bias, mean, var) = random_norm(key)
    x = jax.random.normal(key, (3, 5, 2, 4))
    wanted = np.float64(x - mean[None, None, None]) / np.sqrt(var + 0.1) * scale + bias
    np.testing.assert_allclose(norm(x), wanted, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], mean)


def test_batch_normalisation_in_training(key):
    norm, (scale, bias, mean, var) = random_norm(key)
    x = 2 + 3 * jax.random.normal(key, (3, 5, 2, 4))
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    seen = (flat.mean(0), flat.var(0))
    wanted = (flat - seen[0]) / np.sqrt(seen[1] + 0.1) * scale + bias
    np.testing.assert_allclose(norm(x, training=True), wanted.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.7 * mean + 0.3 * seen[0], rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.7 * var + 0.3 * flat.var(0, ddof=1), rtol=1e-5)


def test_batch_normalisation_of_one_number_and_of_half_precision():
    norm = BatchNorm(4)
    y = norm(jnp.ones((1, 4), jnp.bfloat16), training=True)
    assert y.dtype == jnp.bfloat16
    assert norm.mean.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)
