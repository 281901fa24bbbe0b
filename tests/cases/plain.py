"""Plain functions over dicts, lists and dataclasses of arrays."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cases.case import DENSE, Case, Draw


def mlp(key):
    draw = Draw(key)
    params = {"up": draw.kernel(5, 7), "down": draw.kernel(7, 3), "bias": jnp.ones(7)}

    def apply(params, x):
        h = x @ params["up"] + params["bias"][None, None, :]
        return jax.nn.silu(h) @ params["down"]

    return apply, params, (draw.array(2, 4, 5),)


def transposed_kernel(key):
    draw = Draw(key)
    params = [draw.kernel(7, 5), draw.kernel(3, 7)]

    def apply(params, x):
        return jnp.einsum("od,btd->obt", params[1], jnp.tanh(x @ params[0].T))

    return apply, params, (draw.array(2, 4, 5),)


def heads(key):
    """3-D attention kernels, one kept 2-D and reshaped on its way."""
    draw = Draw(key)
    params = {
        "q": draw.kernel(6, 4, 3),
        "k": draw.kernel(6, 12),
        "v": draw.kernel(6, 4, 5),
        "out": draw.kernel(4, 5, 7),
    }

    def apply(params, x):
        q = jnp.einsum("btd,dhk->bhtk", x, params["q"])
        k = jnp.einsum("btd,dhk->bthk", x, params["k"].reshape(6, 4, 3))
        v = jnp.einsum("dhk,btd->bthk", params["v"], x)
        weights = jax.nn.softmax(jnp.einsum("bhtk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["out"])

    return apply, params, (draw.array(2, 8, 6),)


def tied(key, remat=False, cast=None):
    """Embedding, scanned layers, the embedding again as the output head."""
    draw = Draw(key)
    params = {
        "embed": {"embedding": draw.array(11, 6)},
        "layers": {"up": draw.kernel(3, 6, 8), "down": draw.kernel(3, 8, 6)},
    }

    def layer(h, p):
        if cast:
            p = jax.tree.map(lambda w: w.astype(cast), p)
        return h + jnp.tanh(h @ p["up"]) @ p["down"], None

    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable) if remat else layer

    @jax.jit
    def apply(params, ids):
        table = params["embed"]["embedding"]
        h = jnp.take(table, ids, axis=0)
        h, _ = jax.lax.scan(body, h if cast is None else h.astype(cast), params["layers"])
        return h @ table.T.astype(h.dtype)

    return apply, params, (draw.ids(11, 2, 5),)


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    weight: jax.Array
    bias: jax.Array


def dataclass_layers(key):
    """A list of dataclasses, kernels stored output first, and a readout in a tuple."""
    draw = Draw(key)
    sizes = ((5, 7), (7, 9))
    layers = [Layer(draw.kernel(o, i), draw.array(o)) for i, o in sizes]
    params = {"layers": layers, "head": (draw.kernel(9, 3), draw.array(3))}

    def apply(params, x):
        for layer in params["layers"]:
            x = jax.nn.relu(jnp.inner(x, layer.weight) + layer.bias[None])
        kernel, bias = params["head"]
        return jax.vmap(lambda row: row @ kernel + bias)(x)

    return apply, params, (draw.array(4, 5),)


LAYERS = {"layers/up": (6, 8, (3,), DENSE), "layers/down": (8, 6, (3,), DENSE)}
TIED = LAYERS | {"embed/embedding": (11, 6, (), ("lookup", "dense, transposed"))}

CASES = [
    Case("mlp", mlp, {"up": (5, 7, (), DENSE), "down": (7, 3, (), DENSE)}, thorough=True),
    Case("transposed_kernel", transposed_kernel, {"0": (5, 7, (), DENSE), "1": (7, 3, (), DENSE)}),
    Case(
        "heads",
        heads,
        {
            "q": (6, 12, (), DENSE),
            "k": (6, 12, (), DENSE),
            "v": (6, 20, (), DENSE),
            "out": (20, 7, (), DENSE),
        },
        thorough=True,
    ),
    Case("tied", tied, TIED, thorough=True),
    Case("tied_remat", lambda key: tied(key, remat=True), TIED),
    Case("tied_bfloat16", lambda key: tied(key, cast=jnp.bfloat16), TIED, narrow=True),
    Case(
        "dataclass_layers",
        dataclass_layers,
        {
            "layers/0/weight": (5, 7, (), DENSE),
            "layers/1/weight": (7, 9, (), DENSE),
            "head/0": (9, 3, (), DENSE),
        },
    ),
]
