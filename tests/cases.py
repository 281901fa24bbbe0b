"""Small models, written in every style, that the laws run over. All dimensions differ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import lora_jax as lj


@dataclass(frozen=True)
class Case:
    """`build(key) -> apply, params, inputs`, and the rules' targets."""

    name: str
    build: Callable[[jax.Array], tuple[Callable, Any, tuple]]
    targets: Any = lj.all_linear
    exact: bool = True  # a fresh LoRA leaves the output equal bit for bit

    def __str__(self) -> str:
        return self.name


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[-2] ** 0.5


def mlp(key):
    keys = jax.random.split(key, 3)
    params = {"up": normal(keys[0], 5, 7), "down": normal(keys[1], 7, 3), "bias": jnp.ones(7)}

    def apply(params, x):
        h = x @ params["up"] + params["bias"][None, None, :]
        return jax.nn.silu(h) @ params["down"]

    return apply, params, (jax.random.normal(keys[2], (2, 4, 5)),)


def transposed_kernel(key):
    keys = jax.random.split(key, 3)
    params = [normal(keys[0], 7, 5), normal(keys[1], 3, 7)]

    def apply(params, x):
        return jnp.einsum("od,btd->obt", params[1], jnp.tanh(x @ params[0].T))

    return apply, params, (jax.random.normal(keys[2], (2, 4, 5)),)


def heads(key):
    """3-D attention kernels, one kept 2-D and reshaped on its way."""
    keys = jax.random.split(key, 5)
    params = {
        "q": normal(keys[0], 6, 4, 3),
        "k": normal(keys[1], 6, 12),
        "v": normal(keys[2], 6, 4, 5),
        "out": normal(keys[3], 4, 5, 7),
    }

    def apply(params, x):
        q = jnp.einsum("btd,dhk->bhtk", x, params["q"])
        k = jnp.einsum("btd,dhk->bthk", x, params["k"].reshape(6, 4, 3))
        v = jnp.einsum("dhk,btd->bthk", params["v"], x)
        weights = jax.nn.softmax(jnp.einsum("bhtk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["out"])

    return apply, params, (jax.random.normal(keys[4], (2, 8, 6)),)


def tied(key, remat=False, cast=None):
    """Embedding, scanned layers, the embedding again as the output head."""
    keys = jax.random.split(key, 4)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (11, 6))},
        "layers": {"up": normal(keys[1], 3, 6, 8), "down": normal(keys[2], 3, 8, 6)},
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

    return apply, params, (jax.random.randint(keys[3], (2, 5), 0, 11),)


def experts(key):
    keys = jax.random.split(key, 3)
    params = {"up": normal(keys[0], 4, 5, 7), "down": normal(keys[1], 4, 7, 3)}

    def apply(params, x):
        h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", x, params["up"]))
        return jnp.einsum("ecf,efd->ecd", h, params["down"])

    return apply, params, (jax.random.normal(keys[2], (4, 6, 5)),)


def scanned_experts(key):
    keys = jax.random.split(key, 3)
    params = {"w": normal(keys[0], 3, 4, 5, 7), "v": normal(keys[1], 3, 4, 7, 5)}

    def apply(params, x):
        def body(h, p):
            return h + jnp.einsum(
                "ecf,efd->ecd", jnp.einsum("ecd,edf->ecf", h, p["w"]), p["v"]
            ), None

        return jax.lax.scan(body, x, params)[0]

    return apply, params, (jax.random.normal(keys[2], (4, 6, 5)),)


def loops(key):
    """A kernel constant in a while loop, one in a branch, one in a scan's carry."""
    keys = jax.random.split(key, 4)
    params = {"w": normal(keys[0], 5, 5), "c": normal(keys[1], 5, 7), "d": normal(keys[2], 7, 5)}

    def apply(params, x):
        def both(x):
            return jnp.tanh(x @ params["c"]) @ params["d"]

        x = jax.lax.cond(x.sum() > 0, both, lambda x: both(x) + x, x)

        def step(carry, _):
            h, w = carry
            return (jnp.tanh(h @ w), w), None

        (x, _), _ = jax.lax.scan(step, (x, params["w"]), None, length=2)
        last = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"]), x[:1])
        return x + last

    return apply, params, (jax.random.normal(keys[3], (3, 5)),)


def indexed_layers(key):
    """One stack, its layers taken by a Python index, by a traced index, and emitted by a scan."""
    keys = jax.random.split(key, 3)
    params = {"a": normal(keys[0], 3, 5, 7), "b": normal(keys[1], 3, 7, 5)}

    def apply(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["a"][i]) @ params["b"][i]

        def again(i, x):
            a = jax.lax.dynamic_index_in_dim(params["a"], i, keepdims=False)
            return x + jnp.tanh(x @ a) @ params["b"][2]

        x = jax.lax.fori_loop(0, 3, again, x)
        layer = lambda x, a: (jnp.tanh(x @ a)[:, :5], a.T)  # noqa: E731
        x, turned = jax.lax.scan(layer, x, params["a"])
        return jax.lax.scan(lambda x, t: (x + jnp.tanh(x @ t.T) @ t, None), x, turned)[0]

    return apply, params, (jax.random.normal(keys[2], (2, 5)),)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(4, 6, qkv_features=8, decode=False, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.silu(self.up(x)))


class NnxStack(nnx.Module):
    def __init__(self, rngs, remat):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(3))
        self.remat = remat

    def __call__(self, ids):
        run = nnx.remat(lambda block, x: block(x)) if self.remat else (lambda block, x: block(x))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return run(block, x)

        return self.embed.attend(forward(self.embed(ids), self.blocks))


def nnx_stack(key, remat=False):
    graph, params, rest = nnx.split(NnxStack(nnx.Rngs(params=key), remat), nnx.Param, ...)

    def apply(params, ids):
        return nnx.merge(graph, params, rest)(ids)

    return apply, params, (jax.random.randint(key, (2, 5), 0, 11),)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=8)(y, y)
        return x + nn.DenseGeneral(6)(nn.gelu(nn.Dense(9)(x))), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6)(ids)
        stack = nn.scan(
            nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack()(x, None)
        return nn.Einsum((6, 2, 5), "btd,dhk->bthk")(x)


def linen_stack(key):
    ids = jax.random.randint(key, (2, 7), 0, 11)
    model = LinenStack()
    return model.apply, model.init(key, ids), (ids,)


CASES = [
    Case("mlp", mlp),
    Case("transposed_kernel", transposed_kernel),
    Case("heads", heads),
    Case("tied", tied, targets=".*"),
    Case("tied_remat", lambda key: tied(key, remat=True), targets=".*"),
    Case("tied_bfloat16", lambda key: tied(key, cast=jnp.bfloat16), targets=".*"),
    Case("experts", experts),
    Case("scanned_experts", scanned_experts),
    Case("loops", loops),
    Case("indexed_layers", indexed_layers),
    Case("nnx_stack", nnx_stack, targets=r".*/(kernel|embedding)"),
    Case(
        "nnx_stack_remat", lambda key: nnx_stack(key, remat=True), targets=r".*/(kernel|embedding)"
    ),
    Case("linen_stack", linen_stack, targets=r".*/(kernel|embedding)"),
]
