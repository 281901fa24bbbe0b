"""Flax Linen: scan, remat, vmap, general products, attention, state, recurrent cells."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import lora_jax as lj
from cases.case import CONV, DENSE, Case, Draw, prefixed


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=8)(y, y)
        return x + nn.DenseGeneral(6)(nn.gelu(nn.Dense(9)(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6)(ids)
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack()(x, None)
        return nn.Einsum((6, 2, 5), "btd,dhk->bthk")(x)


class Vision(nn.Module):
    """Convolutions by group, batch statistics, a transposed convolution with its kernel turned."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), feature_group_count=3, strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        x = nn.ConvTranspose(5, (2, 3), strides=(2, 2), transpose_kernel=True)(x)
        return nn.Dense(7)(jnp.tanh(x).mean((1, 2)))


class Products(nn.Module):
    """An ensemble by vmap, a product over two axes, and one with a batch axis of the kernel."""

    @nn.compact
    def __call__(self, x):
        alone = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        x = jnp.tanh(alone(7)(x))  # [member, batch, features]
        each = nn.DenseGeneral(4, axis=-1, batch_dims=(0,), name="each")(x)
        joint = nn.DenseGeneral((2, 5), axis=(0, -1), name="joint")(x)
        return each, joint


class Recurrent(nn.Module):
    """The gates' kernels of the first layer are concatenated by the cell itself."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(5), name="first")(x)
        return nn.Bidirectional(
            nn.RNN(nn.LSTMCell(4, name="ahead")), nn.RNN(nn.GRUCell(7, name="back"))
        )(x)


def module(model, draw, *inputs):
    """`apply(params, *inputs)` of a module and its filled parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return lj.from_linen(model, draw.fill(shapes))


def stack(key):
    """By the module's own `apply`, the parameters all variables."""
    draw = Draw(key)
    ids, model = draw.ids(11, 2, 7), Stack()
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    return model.apply, draw.fill(shapes), (ids,)


def vision(key):
    """The statistics are an argument beside the parameters, and an output."""
    draw = Draw(key)
    x = draw.array(2, 4, 5, 3)
    model = Vision()
    variables = draw.fill(jax.eval_shape(model.init, jax.random.key(0), x))
    apply, params, stats = lj.from_linen_stateful(model, variables)
    return apply, params, (stats, x)


def products(key):
    draw = Draw(key)
    x = draw.array(6, 8)
    return *module(Products(), draw, x), (x,)


def recurrent(key):
    draw = Draw(key)
    x = draw.array(2, 3, 6)
    return *module(Recurrent(), draw, x), (x,)


def gates(path, names, d_in, d_out):
    """A cell's kernels, one a gate: those of the inputs, `i`, and the recurrent ones, `h`."""
    sizes = {"i": (d_in, d_out), "h": (d_out, d_out)}
    return {f"{path}/{name}/kernel": (*sizes[name[0]], (), DENSE) for name in names}


ATTENTION = "ScanCheckpointBlock_0/MultiHeadDotProductAttention_0"
LSTM = ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")

CASES = [
    Case(
        "linen_stack",
        stack,
        prefixed(
            "params",
            {
                "Embed_0/embedding": (11, 6, (), ("lookup",)),
                "Einsum_0/kernel": (6, 10, (), DENSE),
                "ScanCheckpointBlock_0/Dense_0/kernel": (6, 9, (3,), DENSE),
                "ScanCheckpointBlock_0/DenseGeneral_0/kernel": (9, 6, (3,), DENSE),
                f"{ATTENTION}/query/kernel": (6, 8, (3,), DENSE),
                f"{ATTENTION}/key/kernel": (6, 8, (3,), DENSE),
                f"{ATTENTION}/value/kernel": (6, 8, (3,), DENSE),
                f"{ATTENTION}/out/kernel": (8, 6, (3,), DENSE),
            },
        ),
        thorough=True,
    ),
    Case(
        "linen_vision",
        vision,
        {
            "Conv_0/kernel": (6, 2, (3,), CONV),
            "ConvTranspose_0/kernel": (36, 5, (), CONV),
            "Dense_0/kernel": (5, 7, (), DENSE),
        },
        exact=False,  # XLA fuses the normalisation with other neighbours: the last bit differs
    ),
    Case(
        "linen_products",
        products,
        {
            "VmapDense_0/kernel": (8, 21, (), DENSE),
            "each/kernel": (7, 4, (3,), DENSE),
            "joint/kernel": (21, 10, (), DENSE),
        },
    ),
    Case(
        "linen_recurrent",
        recurrent,
        gates("OptimizedLSTMCell_0", LSTM, 6, 5)
        | gates("ahead", LSTM, 5, 4)
        | gates("back", ("ir", "iz", "in", "hr", "hz", "hn"), 5, 7),
        r".*/h./kernel",
    ),
]
