"""Predicates: what they choose in models with the usual names, and by the trace alone."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj
from lora_jax.select import _ATTENTION, _MLP

ATTENTION = """
layers/attn/q_proj/kernel
params/encoder/layer_0/SelfAttention_0/query/kernel
blocks/attend/out/kernel
bert/encoder/layer/3/attention/output/dense/kernel
transformer/h_1/attn/c_attn/w
layer_0/attn/qkv_einsum/w
visual/transformer/resblocks/0/mha/out/weight
decoder/block/cross_attention/k_proj/kernel
"""
MLP = """
layers/mlp/up_proj/kernel
bert/encoder/layer/3/intermediate/dense/kernel
layer_0/mlp/gating_einsum
h_1/feed_forward/w1/kernel
blocks/ffn/fc1/kernel
layers/moe/experts/down
encoder/wi_0/kernel
"""


@pytest.mark.parametrize("path", ATTENTION.split())
def test_names_of_attention(path):
    assert _ATTENTION.fullmatch(path.lower())


@pytest.mark.parametrize("path", MLP.split())
def test_names_of_feed_forward_blocks(path):
    assert _MLP.fullmatch(path.lower())
    assert not _ATTENTION.fullmatch(path.lower())


@pytest.mark.parametrize(
    "path", ["embed/embedding", "head/kernel", "conv/kernel", "pattern/kernel"]
)
def test_names_of_neither(path):
    assert not _ATTENTION.fullmatch(path)
    assert not _MLP.fullmatch(path)


X = jnp.ones((2, 4, 5))


def roles(apply, params):
    return {path: site.role for path, site in lj.find_sites(apply, params, X).items()}


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell], ids=str)
def test_recurrent_kernels_of_nnx_are_those_that_read_the_state(cell):
    apply, params = lj.from_nnx(nnx.RNN(cell(5, 7, rngs=nnx.Rngs(0))))
    for path, role in roles(apply, params).items():
        reads_state = re.match(r"h|dense_h", path.split("/")[-2]) is not None
        assert role == ("recurrent" if reads_state else "input"), path


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell], ids=str)
def test_recurrent_kernels_of_linen(cell):
    module = nn.Bidirectional(nn.RNN(cell(7)), nn.RNN(cell(7)))
    apply, params = lj.from_linen(module, module.init(jax.random.key(0), X))
    found = roles(apply, params)
    assert len(found) >= 12
    for path, role in found.items():
        reads_state = re.match(r"h|dense_h", path.split("/")[-2]) is not None
        assert role == ("recurrent" if reads_state else "input"), path


def test_layers_in_a_loop_are_no_recurrence():
    def apply(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    assert roles(apply, {"w": jnp.ones((3, 5, 5))}) == {"w": ""}


def test_single_gates_by_pattern_and_by_role():
    apply, params = lj.from_nnx(nnx.RNN(nnx.LSTMCell(5, 7, rngs=nnx.Rngs(0))))
    sites = lj.find_sites(apply, params, X)
    rules = {
        r"cell/(if_|hf)/kernel": lj.dora(1),
        lj.recurrent: lj.lora(2),
        lj.recurrent_input: None,
    }
    _, trained = lj.attach(jax.random.key(0), params, rules, sites)
    assert {path.split("/")[-2] for path in trained} == {"if_", "hf", "hi", "hg", "ho"}


def test_kinds_of_operations():
    params = {"table": jnp.ones((9, 5)), "conv": jnp.ones((3, 5, 4)), "w": jnp.ones((4, 6))}

    def apply(params, ids):
        x = params["table"][ids]
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=numbers)
        return y @ params["w"]

    sites = lj.find_sites(apply, params, jnp.zeros((2, 7), int))
    chosen = {
        name: [path for path, site in sites.items() if getattr(lj, name)(site)]
        for name in ("all_linear", "convolutions", "embeddings", "kernels", "recurrent")
    }
    assert chosen == {
        "all_linear": ["w"],
        "convolutions": ["conv"],
        "embeddings": ["table"],
        "kernels": ["conv", "table", "w"],
        "recurrent": [],
    }
