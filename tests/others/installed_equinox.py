"""Equinox: esm2quinox's protein language model, equimo's vision models."""

import importlib
import importlib.util

import jax
import numpy as np
import pytest
from cases.case import CONV, DENSE, LOOKUP, RAGGED, Draw
from installed import installed, repeated

import lora_jax as lj

SIDE = 8  # of an image


def esm2(key):
    eqx = pytest.importorskip("equinox")
    esm2quinox = pytest.importorskip("esm2quinox")
    make = lambda: esm2quinox.ESM2(3, 12, 2, True, jax.random.key(0))  # noqa: E731
    single, params = lj.from_equinox(Draw(key).fill(eqx.filter_eval_shape(make)))
    proteins = np.int32(esm2quinox.tokenise(["SP#DERM#N", "FOO"]))
    return jax.vmap(single, (None, 0)), params, (proteins,)


def zoo(key):
    """A decoder with one dense block and one of experts; JAX cannot vmap its `ragged_dot`."""
    eqx = pytest.importorskip("equinox")
    causal = pytest.importorskip("eqx_zoo.models.causal_lm.model")
    config = causal.Config(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm=True,
        rope_scaling=None,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=7,
        norm_topk_prob=True,
        moe_layers=(1,),
        pad_token_id=0,
    )
    draw = Draw(key)
    make = lambda: causal.CausalLM(config, key=jax.random.key(0))  # noqa: E731
    single, params = lj.from_equinox(draw.fill(eqx.filter_eval_shape(make)))

    def apply(params, ids):
        return jax.lax.map(lambda one: single(params, one)[0], ids)

    return apply, params, (draw.ids(37, 2, 5),)


def equimo(module, name, *arguments, **sizes):
    """A model of equimo as it is evaluated, on a batch of images."""

    def build(key):
        eqx = pytest.importorskip("equinox")
        pytest.importorskip("equimo")
        place = "vision.models" if importlib.util.find_spec("equimo.vision") else "models"  # 2 or 1
        make = getattr(importlib.import_module(f"equimo.{place}.{module}"), name)
        new = lambda: make(*arguments, **sizes, num_classes=5, key=jax.random.key(0))  # noqa: E731
        draw = Draw(key)
        single, params = lj.from_equinox(draw.fill(eqx.filter_eval_shape(new)))

        def apply(params, images):
            one = lambda x: single(params, x, key=jax.random.key(0), inference=True)  # noqa: E731
            return jax.vmap(one)(images)

        return apply, params, (draw.array(2, 3, SIDE, SIDE),)

    return build


ESM_ATTENTION = {
    "layers/attn/query_proj/weight": (12, 12, (3,), DENSE),
    "layers/attn/key_proj/weight": (12, 12, (3,), DENSE),
    "layers/attn/value_proj/weight": (12, 12, (3,), DENSE),
    "layers/attn/output_proj/weight": (12, 12, (3,), DENSE),
}
ESM_MLP = {
    "layers/linear1/weight": (12, 48, (3,), DENSE),
    "layers/linear2/weight": (48, 12, (3,), DENSE),
}
ZOO_ATTENTION = {
    "self_attn/k_proj/weight": (12, 12, (), DENSE),
    "self_attn/o_proj/weight": (24, 12, (), DENSE),
    "self_attn/q_proj/weight": (12, 24, (), DENSE),
    "self_attn/v_proj/weight": (12, 12, (), DENSE),
}
ZOO_MLP = {
    "model/layers/0/mlp/down_proj/weight": (20, 12, (), DENSE),
    "model/layers/0/mlp/gate_proj/weight": (12, 20, (), DENSE),
    "model/layers/0/mlp/up_proj/weight": (12, 20, (), DENSE),
    "model/layers/1/mlp/experts/down_proj/weight": (7, 12, (3,), RAGGED),
    "model/layers/1/mlp/experts/gate_proj/weight": (12, 7, (3,), RAGGED),
    "model/layers/1/mlp/experts/up_proj/weight": (12, 7, (3,), RAGGED),
}
VIT_ATTENTION = {"attn/qkv/weight": (12, 36, (), DENSE), "attn/proj/weight": (12, 12, (), DENSE)}
VIT_MLP = {"mlp/fc1/weight": (12, 48, (), DENSE), "mlp/fc2/weight": (48, 12, (), DENSE)}


def inverted(layer, c_in, c_mid, c_out, window, squeeze):
    """The sites of an inverted bottleneck, with squeeze and excitation or without."""
    sites = {
        "inverted_conv/conv/weight": (c_in, c_mid, (), CONV),
        "depth_conv/conv/weight": (window, 1, (c_mid,), CONV),
        "point_conv/conv/weight": (c_mid, c_out, (), CONV),
    }
    if squeeze:
        sites["se_conv/fc1/weight"] = sites["se_conv/fc2/weight"] = (c_mid, c_mid, (), CONV)
    return {f"layers/{layer}/{path}": seen for path, seen in sites.items()}


EQUINOX = [
    installed(
        "esm2quinox",
        esm2,
        ESM_ATTENTION,
        ESM_MLP,
        {
            "logit_head/linear1/weight": (12, 12, (), DENSE),
            "logit_head/linear2/weight": (33, 12, (), ("lookup", "dense, transposed")),
        },
        exact=False,  # jax 0.10, one unit in the last place: the tied head multiplies W x, not x W
    ),
    installed(
        "eqx_zoo_experts",
        zoo,
        repeated("model/layers/{}", 2, ZOO_ATTENTION),
        ZOO_MLP,
        {
            "model/embed_tokens/weight": (37, 12, (), LOOKUP),
            "model/layers/1/mlp/gate/weight": (12, 3, (), DENSE),
            "lm_head/weight": (12, 37, (), DENSE),
        },
        routers=frozenset({"model/layers/1/mlp/gate/weight"}),
        exact=False,  # XLA multiplies by the gate and up kernels in another order
    ),
    installed(
        "equimo_vit",
        equimo(
            "vit",
            "VisionTransformer",
            img_size=SIDE,
            in_channels=3,
            dim=12,
            patch_size=4,
            num_heads=[2],
            depths=[2],
        ),
        repeated("blocks/0/blocks/{}", 2, VIT_ATTENTION),
        repeated("blocks/0/blocks/{}", 2, VIT_MLP),
        {"patch_embed/proj/weight": (48, 12, (), CONV), "head/weight": (12, 5, (), DENSE)},
    ),
    installed(
        "equimo_mobilenet",
        equimo(
            "mobilenet",
            "MobileNetv3",
            3,
            [(8, 12, 3, 2, True, "relu"), (10, 20, 5, 1, False, "hard_swish")],
            last_channels=24,
        ),
        {},
        {},
        {
            "conv1/conv/weight": (27, 8, (), CONV),
            **inverted(0, 8, 12, 10, 9, True),
            **inverted(1, 10, 20, 24, 25, False),
            "classifier/weight": (24, 5, (), DENSE),
        },
        exact=False,  # XLA fuses in another order; equal when nothing fuses
    ),
]
