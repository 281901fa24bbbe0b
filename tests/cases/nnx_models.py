"""Flax NNX: split and merge, stacks by vmap under scan, remat, state, recurrent cells."""

import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax as lj
from cases.case import CONV, DENSE, Case, Draw


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(4, 6, qkv_features=8, decode=False, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.silu(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, rngs, remat):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.blocks = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(3))
        self.remat = remat

    def __call__(self, ids):
        run = nnx.remat(lambda block, x: block(x)) if self.remat else (lambda block, x: block(x))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return run(block, x)

        return self.embed.attend(forward(self.embed(ids), self.blocks))


class Vision(nnx.Module):
    """Convolution, batch statistics, a transposed convolution, a classifier."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 2), strides=2, feature_group_count=3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.wide = nnx.ConvTranspose(6, 5, (2, 3), strides=2, rngs=rngs)
        self.head = nnx.LinearGeneral((4, 5), (2, 7), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(jnp.tanh(self.wide(x)).mean(1))


class Contractions(nnx.Module):
    def __init__(self, rngs):
        self.split = nnx.Einsum("btd,dhk->bthk", (5, 3, 4), (3, 4), rngs=rngs)
        self.mix = nnx.Einsum("bthk,hkf->btf", (3, 4, 7), rngs=rngs)
        self.own = nnx.Param(rngs.params.normal((7, 2)))

    def __call__(self, x):
        return self.mix(jnp.tanh(self.split(x))) @ self.own[...]


class Recurrent(nnx.Module):
    """Two recurrent layers over time, the second one in both directions."""

    def __init__(self, rngs, cell):
        self.first = nnx.RNN(cell(3, 5, rngs=rngs))
        self.both = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(5, 4, rngs=rngs)), nnx.RNN(cell(5, 7, rngs=rngs))
        )

    def __call__(self, x):
        return self.both(self.first(x))


def taken_apart(make, draw):
    """A module's graph, filled parameters and other state, without running its initialisers."""
    graph, shapes, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return graph, draw.fill(shapes), jax.tree.map(_still, rest)


def _still(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.ones(leaf.shape, leaf.dtype)


def module(make, draw):
    return lj.from_nnx(nnx.merge(*taken_apart(make, draw)))


def stack(key, remat=False):
    """By split and merge, the parameters an nnx.State."""
    draw = Draw(key)
    graph, params, rest = taken_apart(lambda rngs: Stack(rngs, remat), draw)

    def apply(params, ids):
        return nnx.merge(graph, params, rest)(ids)

    return apply, params, (draw.ids(11, 2, 5),)


def block(key):
    draw = Draw(key)
    return *module(Block, draw), (draw.array(2, 5, 6),)


def vision(key):
    """The statistics are an argument beside the parameters, and an output."""
    draw = Draw(key)
    apply, params, stats = lj.from_nnx_stateful(nnx.merge(*taken_apart(Vision, draw)))
    return apply, params, (stats, draw.array(2, 4, 4, 3))


def contractions(key):
    draw = Draw(key)
    return *module(Contractions, draw), (draw.array(2, 6, 5),)


def recurrent(key, cell=nnx.LSTMCell):
    draw = Draw(key)
    return *module(lambda rngs: Recurrent(rngs, cell), draw), (draw.array(2, 3, 3),)


BLOCK = {
    "attend/query/kernel": (6, 8),
    "attend/key/kernel": (6, 8),
    "attend/value/kernel": (6, 8),
    "attend/out/kernel": (8, 6),
    "up/kernel": (6, 9),
    "down/kernel": (9, 6),
}
STACK = {f"blocks/{path}": (*size, (3,), DENSE) for path, size in BLOCK.items()}
STACK["embed/embedding"] = (11, 6, (), ("lookup", "dense, transposed"))


def gates(path, names, d_in, d_out):
    """A cell's kernels, one a gate: those of the inputs, `i`, and the recurrent ones, `h`."""
    sizes = {"i": (d_in, d_out), "h": (d_out, d_out)}
    return {f"{path}/{name}/kernel": (*sizes[name[0]], (), DENSE) for name in names}


def fused(path, sizes, d_in, d_out):
    """A cell's kernels, all gates in one matrix."""
    inputs, hidden = f"{path}/dense_i/kernel", f"{path}/dense_h/kernel"
    return {inputs: (d_in, sizes * d_out, (), DENSE), hidden: (d_out, sizes * d_out, (), DENSE)}


LSTM = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")
GRU = fused("both/forward_rnn/cell", 3, 5, 4)

CASES = [
    Case("nnx_stack", stack, STACK),
    Case("nnx_stack_remat", lambda key: stack(key, remat=True), STACK),
    Case("nnx_block", block, {path: (*size, (), DENSE) for path, size in BLOCK.items()}),
    Case(
        "nnx_vision",
        vision,
        {
            "conv/kernel": (6, 2, (3,), CONV),
            "wide/kernel": (36, 5, (), CONV),
            "head/kernel": (20, 14, (), DENSE),
        },
    ),
    Case(
        "nnx_contractions",
        contractions,
        {
            "split/kernel": (5, 12, (), DENSE),
            "mix/kernel": (12, 7, (), DENSE),
            "own": (7, 2, (), DENSE),
        },
    ),
    Case(
        "nnx_recurrent",
        recurrent,
        gates("first/cell", LSTM, 3, 5) | gates("both/backward_rnn/cell", LSTM, 5, 7) | GRU,
    ),
    Case(
        "nnx_recurrent_fused",
        lambda key: recurrent(key, nnx.OptimizedLSTMCell),
        fused("first/cell", 4, 3, 5) | fused("both/backward_rnn/cell", 4, 5, 7) | GRU,
        lj.recurrent,
    ),
]
