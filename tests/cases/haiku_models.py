"""Haiku: transformed functions, two-level dicts of parameters, state beside them."""

import haiku as hk
import jax
import jax.numpy as jnp

import lora_jax as lj
from cases.case import CONV, DENSE, Case, Draw


def transformer(ids):
    x = hk.Embed(11, 6, name="embed")(ids)
    y = hk.LayerNorm(-1, True, True, name="norm")(x)
    attend = hk.MultiHeadAttention(
        2, 4, model_size=6, w_init=hk.initializers.VarianceScaling(), name="attend"
    )
    x = x + attend(y, y, y)
    return x + hk.nets.MLP([9, 6], name="mlp")(x)


def vision(x):
    x = hk.Conv2D(6, (3, 2), stride=2, feature_group_count=2, name="conv")(x)
    x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training=True)
    x = hk.Conv2DTranspose(5, (2, 3), stride=2, name="wide")(jax.nn.relu(x))
    x = hk.DepthwiseConv2D(1, 3, name="each")(jnp.tanh(x))
    return hk.Linear(7, name="head")(x.mean((1, 2)))


def recurrent(x):
    """Time first. The LSTM multiplies inputs and hidden state, joined, by one kernel."""
    lstm = hk.LSTM(5, name="lstm")
    x, _ = hk.dynamic_unroll(lstm, x, lstm.initial_state(x.shape[1]))
    gru = hk.GRU(4, name="gru")
    return hk.dynamic_unroll(gru, x, gru.initial_state(x.shape[1]))[0]


def scanned(x):
    """Identical blocks by `layer_stack`, which stacks their parameters and scans."""

    def block(x):
        h = jnp.tanh(hk.Linear(7, name="up")(x))
        return x + hk.Linear(5, name="down")(h)

    return hk.experimental.layer_stack(3, name="blocks")(block)(x)


def module(function, draw, *inputs):
    """`apply(params, *inputs)` and filled parameters of a function without state."""
    pure = hk.transform(function)
    shapes = jax.eval_shape(pure.init, jax.random.key(0), *inputs)
    return lj.from_haiku(pure, draw.fill(shapes))


def with_module(function, *shape, ids=0):
    def build(key):
        draw = Draw(key)
        x = draw.ids(ids, *shape) if ids else draw.array(*shape)
        return *module(function, draw, x), (x,)

    return build


def with_state(key):
    draw = Draw(key)
    pure = hk.without_apply_rng(hk.transform_with_state(vision))
    x = draw.array(2, 5, 4, 4)
    params, state = jax.eval_shape(pure.init, jax.random.key(0), x)
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
    return pure.apply, draw.fill(params), (state, x)


CASES = [
    Case(
        "haiku_transformer",
        with_module(transformer, 2, 3, ids=11),
        {
            "embed/embeddings": (11, 6, (), ("lookup",)),
            "attend/query/w": (6, 8, (), DENSE),
            "attend/key/w": (6, 8, (), DENSE),
            "attend/value/w": (6, 8, (), DENSE),
            "attend/linear/w": (8, 6, (), DENSE),
            "mlp/~/linear_0/w": (6, 9, (), DENSE),
            "mlp/~/linear_1/w": (9, 6, (), DENSE),
        },
    ),
    Case(
        "haiku_vision",
        with_state,
        {
            "conv/w": (12, 3, (2,), CONV),
            "wide/w": (36, 5, (), CONV),
            "each/w": (9, 1, (5,), CONV),
            "head/w": (5, 7, (), DENSE),
        },
    ),
    Case(
        "haiku_recurrent",
        with_module(recurrent, 6, 2, 3),
        {
            "lstm/linear/w": (8, 20, (), DENSE),
            "gru/w_i": (5, 12, (), DENSE),
            "gru/w_h/0:8": (4, 8, (), DENSE),
            "gru/w_h/8:12": (4, 4, (), DENSE),
        },
    ),
    Case(
        "haiku_layer_stack",
        with_module(scanned, 2, 5),
        {
            "blocks/up/w": (5, 7, (3,), DENSE),
            "blocks/down/w": (7, 5, (3,), DENSE),
        },
    ),
]
