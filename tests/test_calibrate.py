"""Statistics of a model's sites are those that one would gather by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import calibrate

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def agree(found, rows, calls=1):
    """One matrix's statistics against the rows themselves."""
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(found.rows, len(rows))
    np.testing.assert_allclose(found.calls, calls)
    np.testing.assert_allclose(found.total, rows.sum(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.square, rows.T @ rows, rtol=1e-5, atol=1e-4)


def gathered(apply, params, batches, **options):
    sites = lj.find_sites(apply, params, batches[0])
    return calibrate.input_statistics(apply, params, batches, ".*", sites, **options)


SCANNED = {"up": normal(1, 3, 5, 7), "down": normal(2, 3, 7, 5), "head": normal(3, 5, 4)}


def scanned(params, x):
    def layer(x, p):
        return x + 0.1 * (jnp.tanh(x @ p[0]) @ p[1]), None

    body = jax.checkpoint(layer)
    return jax.lax.scan(body, x, (params["up"], params["down"]))[0] @ params["head"]


def hooked(params, x):
    """The inputs of every kernel of `scanned`, written by hand."""
    inputs = {"up": [], "down": []}
    for up, down in zip(params["up"], params["down"], strict=True):
        inputs["up"].append(x.reshape(-1, 5))
        inner = jnp.tanh(x @ up)
        inputs["down"].append(inner.reshape(-1, 7))
        x = x + 0.1 * (inner @ down)
    return {**inputs, "head": x.reshape(-1, 5)}


def test_scanned_layers_over_several_batches():
    batches = [normal(4, 2, 6, 5), normal(5, 3, 6, 5)]
    found = gathered(scanned, SCANNED, batches)
    hooks = [hooked(SCANNED, x) for x in batches]
    agree(found["head"], np.concatenate([h["head"] for h in hooks]), calls=2)
    for path in ("up", "down"):
        for i in range(3):
            own = jax.tree.map(lambda x: x[i], found[path])
            agree(own, np.concatenate([h[path][i] for h in hooks]), calls=2)


def test_padding_does_not_count():
    x = normal(6, 2, 6, 5)
    mask = jnp.arange(6) < jnp.array([[4], [6]])
    broken = jnp.where(mask[..., None], x, jnp.nan)  # rows by themselves: nothing may leak
    found = gathered(scanned, SCANNED, [broken], mask=lambda x: ~jnp.isnan(x[..., 0]))
    hooks = hooked(SCANNED, x)
    kept = np.asarray(mask).ravel()
    agree(found["head"], hooks["head"][kept])
    for path in ("up", "down"):
        for i in range(3):
            agree(jax.tree.map(lambda x: x[i], found[path]), hooks[path][i][kept])
    flat = gathered(lambda p, x: x.reshape(-1, 5) @ p["w"], {"w": normal(7, 5, 3)}, [x],
                    mask=lambda _: mask)  # fmt: skip
    agree(flat["w"], x.reshape(-1, 5)[kept])
    with pytest.raises(lj.InputError, match=r"mask has shape \[6\], but .* rows are \[2, 6\]"):
        gathered(scanned, SCANNED, [x], mask=lambda _: mask[0])


def test_attention():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    x = normal(8, 2, 4, 5)
    params = layer.init(KEY, x)["params"]
    apply = lambda params, x: layer.apply({"params": params}, x)  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    found = calibrate.input_statistics(apply, params, [x], lj.all_linear, sites)
    assert len(found) == 4
    agree(found["query/kernel"], x.reshape(-1, 5))
    agree(found["value/kernel"], x.reshape(-1, 5))
    identity = {**params, "out": {"kernel": jnp.eye(6).reshape(2, 3, 6), "bias": jnp.zeros(6)}}
    wide = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=6)
    agree(found["out/kernel"], wide.apply({"params": identity}, x).reshape(-1, 6))


def test_convolution_patches():
    x, kernel = normal(9, 2, 5, 4, 3), normal(10, 2, 2, 3, 6)

    def apply(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["k"], (1, 2), [(1, 0), (0, 0)], dimension_numbers=dims
        )

    found = gathered(apply, {"k": kernel}, [x])["k"]
    padded = np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
    patches = [
        padded[n, i : i + 2, j : j + 2].ravel() for n in range(2) for i in range(5) for j in (0, 2)
    ]
    agree(found, patches)


def test_experts_get_their_own_rows():
    x, w, sizes = normal(11, 9, 5), normal(12, 3, 5, 4), jnp.array([4, 2, 3])
    params = {"w": w, "out": normal(13, 3, 4, 6)}

    def apply(params, x):
        return jax.lax.ragged_dot(
            jnp.tanh(jax.lax.ragged_dot(x, params["w"], sizes)), params["out"], sizes
        )

    found = gathered(apply, params, [x, 2 * x])
    ends = np.cumsum(sizes)
    for i, rows in enumerate(np.split(np.asarray(x), ends[:-1])):
        agree(jax.tree.map(lambda x: x[i], found["w"]), np.concatenate([rows, 2 * rows]), calls=2)
        inner = [np.tanh(part @ w[i]) for part in (rows, 2 * rows)]
        agree(jax.tree.map(lambda x: x[i], found["out"]), np.concatenate(inner), calls=2)
    with pytest.raises(lj.InputError, match="rows sorted by expert"):
        gathered(apply, params, [x], mask=lambda x: jnp.ones(9))


def test_batched_matrices_and_shared_kernels():
    x = normal(14, 3, 8, 5)

    def apply(params, x):
        y = jnp.einsum("etd,edf->etf", x, params["w"])
        return jnp.tanh(y @ params["same"]) @ params["same"]

    params = {"w": normal(15, 3, 5, 4), "same": normal(16, 4, 4)}
    found = gathered(apply, params, [x])
    for i in range(3):
        agree(jax.tree.map(lambda x: x[i], found["w"]), x[i])
    first = jnp.einsum("etd,edf->etf", x, params["w"]).reshape(-1, 4)
    second = jnp.tanh(first @ params["same"])
    agree(found["same"], np.concatenate([first, second]), calls=2)


def test_bfloat16_inputs_are_summed_in_float32():
    x = (1 + 0.01 * normal(17, 300, 5)).astype(jnp.bfloat16)
    params = {"w": normal(18, 5, 4).astype(jnp.bfloat16)}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    agree(gathered(apply, params, [x])["w"], np.float32(x))
    scatter = calibrate.input_scatters(apply, params, [x], "w", lj.find_sites(apply, params, x))
    centred = np.float64(x) - np.float64(x).mean(0)
    np.testing.assert_allclose(scatter["w"], centred.T @ centred, atol=4e-4)  # sums are 300


def test_scatters_and_moments():
    batches = [normal(19, 6, 5) + 1, normal(20, 4, 5) - 2]
    apply, params = lambda p, x: x @ p["w"], {"w": normal(21, 5, 3)}
    sites = lj.find_sites(apply, params, batches[0])
    scatter = calibrate.input_scatters(apply, params, batches, "w", sites)["w"]
    rows = np.concatenate(batches)
    np.testing.assert_allclose(
        scatter, (rows - rows.mean(0)).T @ (rows - rows.mean(0)), rtol=1e-4, atol=1e-4
    )
    moment = calibrate.input_moments(apply, params, batches, "w", sites)["w"]
    scaled = [np.asarray(x) / abs(np.max(x)) for x in batches]
    np.testing.assert_allclose(moment, sum(x.T @ x for x in scaled) / 2, rtol=1e-5)


def test_gradients_by_kernel():
    batches = [normal(22, 2, 6, 5), normal(23, 3, 6, 5)]
    sites = lj.find_sites(scanned, SCANNED, batches[0])

    def loss(params, x):
        return jnp.sum(jnp.sin(scanned(params, x))), jnp.float32(x[..., 0].size)

    found = calibrate.kernel_gradients(loss, SCANNED, batches, {"up": True, "head": True}, sites)
    assert set(found) == {"up", "head"}
    total = jax.grad(lambda p: sum(loss(p, x)[0] for x in batches))(SCANNED)
    for path, gradient in found.items():
        np.testing.assert_allclose(gradient, total[path] / 30, rtol=1e-4, atol=1e-5)
    mean = lambda p, x: jnp.mean(scanned(p, x))  # noqa: E731
    found = calibrate.kernel_gradients(mean, SCANNED, batches, ["up"], sites)["up"]
    grads = [jax.grad(mean)(SCANNED, x)["up"] for x in batches]
    np.testing.assert_allclose(found, sum(grads) / 2, rtol=1e-4, atol=1e-6)


def test_gradients_of_attention_and_of_parts():
    x = normal(24, 2, 4)
    params = {"qkv": normal(25, 4, 4, 3)}

    def apply(params, x):
        y = jnp.tensordot(x, params["qkv"], 1).reshape(2, 12)
        return jnp.split(y, 2, axis=-1)[0] * 2 + jnp.split(y, 2, axis=-1)[1]

    sites = lj.find_sites(apply, params, x).split("qkv", ["q", "k"], axis=1)
    loss = lambda p, x: jnp.sum(apply(p, x) ** 2)  # noqa: E731
    found = calibrate.kernel_gradients(loss, params, [x], ".*/q", sites)
    whole = jax.grad(loss)(params, x)["qkv"]
    np.testing.assert_allclose(found["qkv/q"], whole[:, :2].reshape(4, 6), rtol=1e-5)
    inputs = calibrate.input_statistics(apply, params, [x], ".*", sites)
    agree(inputs["qkv/k"], x)


def test_what_is_refused():
    x, ids = normal(26, 3, 4), jnp.array([0, 2])
    table = {"w": normal(27, 5, 4)}
    with pytest.raises(lj.InputError, match="'w' is used as lookup"):
        gathered(lambda p, ids: p["w"][ids], table, [ids])
    with pytest.raises(lj.InputError, match="no input that counts"):
        gathered(
            lambda p, x: jnp.argmax(x @ p["w"], -1) * 1.0 + jnp.sum(x), {"w": table["w"].T}, [x]
        )
    sites = lj.find_sites(scanned, SCANNED, normal(28, 2, 5))
    with pytest.raises(lj.InputError, match="there are no batches"):
        calibrate.input_statistics(scanned, SCANNED, [], "up", sites)
    with pytest.raises(lj.InputError, match="matches no parameter"):
        calibrate.input_statistics(scanned, SCANNED, [x], "upp", sites)
