"""Equinox: modules as parameter trees, kernels stored output first, vmap over examples."""

import equinox as eqx
import jax
import jax.numpy as jnp

import lora_jax as lj
from cases.case import CONV, DENSE, Case, Draw


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 6, qk_size=4, vo_size=5, key=keys[0])
        self.norm = eqx.nn.LayerNorm(6)
        self.mlp = eqx.nn.MLP(6, 6, 9, 1, key=keys[1])

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(x)


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: Block  # a stack of two
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(11, 6, key=keys[0])
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[1], 2))
        self.head = eqx.nn.Linear(6, 7, key=keys[2])

    def __call__(self, ids):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def layer(x, block):
            return eqx.combine(block, static)(x), None

        x, _ = jax.lax.scan(layer, jax.vmap(self.embed)(ids), arrays)
        return jax.vmap(self.head)(x)


class Vision(eqx.Module):
    layers: eqx.nn.Sequential

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, key=keys[0]),
                eqx.nn.Lambda(jax.nn.silu),
                eqx.nn.ConvTranspose2d(6, 5, (2, 3), key=keys[1]),
                eqx.nn.MaxPool2d(2, 2),
            ]
        )

    def __call__(self, x):
        return self.layers(x)


class Recurrent(eqx.Module):
    lstm: eqx.nn.LSTMCell
    gru: eqx.nn.GRUCell

    def __init__(self, key):
        keys = jax.random.split(key)
        self.lstm = eqx.nn.LSTMCell(3, 5, key=keys[0])
        self.gru = eqx.nn.GRUCell(5, 4, key=keys[1])

    def __call__(self, xs):
        def step(carry, x):
            lstm, h = self.lstm(x, carry[0]), carry[1]
            h = self.gru(lstm[0], h)
            return (lstm, h), h

        start = (jnp.zeros(5, xs.dtype), jnp.zeros(5, xs.dtype)), jnp.zeros(4, xs.dtype)
        return jax.lax.scan(step, start, xs)[1]


def module(make, draw):
    """`apply(params, batch)` of a module for one example, and its filled arrays."""
    single, params = lj.from_equinox(draw.fill(eqx.filter_eval_shape(make, jax.random.key(0))))
    return jax.vmap(single, (None, 0)), params


def transformer(key):
    """By partition and combine."""
    draw = Draw(key)
    model = draw.fill(eqx.filter_eval_shape(Model, jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    return apply, params, (draw.ids(11, 2, 3),)


def vision(key):
    draw = Draw(key)
    return *module(Vision, draw), (draw.array(2, 4, 7, 6),)


def recurrent(key):
    draw = Draw(key)
    return *module(Recurrent, draw), (draw.array(2, 6, 3),)


BLOCK = {
    "attention/query_proj/weight": (6, 8),
    "attention/key_proj/weight": (6, 8),
    "attention/value_proj/weight": (6, 10),
    "attention/output_proj/weight": (10, 6),
    "mlp/layers/0/weight": (6, 9),
    "mlp/layers/1/weight": (9, 6),
}

CASES = [
    Case(
        "equinox_transformer",
        transformer,
        {f"blocks/{path}": (*size, (2,), DENSE) for path, size in BLOCK.items()}
        | {"embed/weight": (11, 6, (), ("lookup",)), "head/weight": (6, 7, (), DENSE)},
    ),
    Case(
        "equinox_vision",
        vision,
        {
            "layers/layers/0/weight": (12, 3, (2,), CONV),
            "layers/layers/2/weight": (36, 5, (), CONV),
        },
    ),
    Case(
        "equinox_recurrent",
        recurrent,
        {
            "lstm/weight_ih": (3, 20, (), DENSE),
            "lstm/weight_hh": (5, 20, (), DENSE),
            "gru/weight_ih": (5, 12, (), DENSE),
            "gru/weight_hh": (4, 12, (), DENSE),
        },
        exact=False,  # kernel on the left: jax 0.12's CPU backend swaps the product's sides
    ),
]
