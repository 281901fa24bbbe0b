"""Kernels sharded over devices: shard_map and sharding constraints."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cases.case import DENSE, Case, Draw


def mesh_of(count, name):
    return Mesh(np.array(jax.devices()[:count]), (name,))


def shard_map(key):
    """A column-parallel kernel, a row-parallel one, and the sum over devices."""
    draw = Draw(key)
    params = {"up": draw.kernel(5, 8), "down": draw.kernel(8, 3), "bias": draw.array(3)}

    def body(params, x):
        partial = jnp.tanh(x @ params["up"]) @ params["down"]
        return jax.lax.psum(partial, "model") + params["bias"]

    specs = {"up": P(None, "model"), "down": P("model", None), "bias": P()}
    mapped = jax.shard_map(body, mesh=mesh_of(2, "model"), in_specs=(specs, P()), out_specs=P())
    return mapped, params, (draw.array(4, 5),)


def shard_map_gathered(key):
    """Rows of the batch over devices, a whole kernel on each, a stack of layers inside."""
    draw = Draw(key)
    params = {"layers": draw.kernel(3, 5, 5), "out": draw.kernel(5, 7)}

    def body(params, x):
        x = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["layers"])[0]
        return x @ params["out"]

    mapped = jax.shard_map(
        body, mesh=mesh_of(4, "data"), in_specs=(P(), P("data")), out_specs=P("data")
    )
    return mapped, params, (draw.array(8, 5),)


def constrained(key):
    """Sharding constraints on kernels and on what flows between them."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 8), "v": draw.kernel(8, 3)}
    mesh = mesh_of(2, "model")

    def apply(params, x):
        put = lambda x, *spec: jax.lax.with_sharding_constraint(  # noqa: E731
            x, NamedSharding(mesh, P(*spec))
        )
        h = put(jnp.tanh(x @ put(params["w"], None, "model")), None, "model")
        return put(h @ put(params["v"], "model", None), None, None)

    return apply, params, (draw.array(4, 5),)


CASES = [
    Case("shard_map", shard_map, {"up": (5, 8, (), DENSE), "down": (8, 3, (), DENSE)}),
    Case(
        "shard_map_gathered",
        shard_map_gathered,
        {"layers": (5, 5, (3,), DENSE), "out": (5, 7, (), DENSE)},
    ),
    Case("constrained", constrained, {"w": (5, 8, (), DENSE), "v": (8, 3, (), DENSE)}),
]
