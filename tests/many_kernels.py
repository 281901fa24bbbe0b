"""A model with every kind of kernel, and adapters on it."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

L, V, D, F, C, OUT = 2, 11, 6, 7, 3, 5
IDS = np.array([[0, 3, 9, 9], [7, 2, 1, 10]])


def apply(params, ids):
    h = params["table"][ids]
    h = h + jax.lax.conv_general_dilated(
        h, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )

    def block(h, p):
        return h + jnp.tanh(h @ p["up"] + p["bias"][None, None]) @ p["down"], None

    h, _ = jax.lax.scan(block, h, params["blocks"])
    return h @ params["head"]


def params_of(seed=0):
    blocks = {"up": (L, D, F), "down": (L, F, D), "bias": (L, F)}
    shapes = {"table": (V, D), "conv": (C, D, D), "blocks": blocks, "head": (D, OUT)}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [jax.random.normal(k, s) / 3 for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


PARAMS = params_of()
SITES = lj.find_sites(apply, PARAMS, IDS)
KERNELS = ("table", "conv", "blocks/up", "blocks/down", "head")


def adapter(rules, seed=0, size=0.3):
    """An adapter with every trained number moved."""
    frozen, trained = lj.attach(jax.random.key(seed), PARAMS, rules, SITES)
    rng = np.random.default_rng(seed)
    drift = lambda x: x + size * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return frozen, jax.tree.map(drift, trained)


def change(frozen, trained):
    """What an adapter adds to every parameter."""
    return jax.tree.map(lambda x, w: np.asarray(x - w), lj.merge(frozen, trained), PARAMS)


def total(pairs, weights):
    """The weighted sum of what adapters add."""
    changes = [change(*pair) for pair in pairs]
    return jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *changes)


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), actual, expected
    )
