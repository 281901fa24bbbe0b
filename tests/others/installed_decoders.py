"""Decoders in Flax: google-tunix in NNX, gemma in Linen."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.case import DENSE, LOOKUP, RAGGED, Draw
from installed import installed, repeated, shapes_of

import lora_jax as lj

TIED = ("lookup", "dense, transposed")
SIZES = {
    "num_layers": 2,
    "embed_dim": 12,
    "hidden_dim": 20,
    "num_heads": 4,
    "head_dim": 6,
    "num_kv_heads": 2,
}


def bare(site):
    """No router, and no kernel that the model also scales (gemma4: `w * w_scale`)."""
    return lj.kernels(site) and not site.others


def tunix(family, **sizes):
    """A model of tunix.models by its family's name, and the inputs of a forward pass."""

    def build(key):
        nnx = pytest.importorskip("flax.nnx")
        module = pytest.importorskip(f"tunix.models.{family.lower()}.model")
        config = module.ModelConfig(**SIZES, **sizes)
        model = nnx.eval_shape(lambda: getattr(module, family)(config, rngs=nnx.Rngs(0)))
        apply, params = lj.from_nnx(model)
        draw, length = Draw(key), 5
        positions = np.tile(np.arange(length), (2, 1))
        causal = np.tril(np.ones((2, length, length), bool))
        inputs = draw.ids(37, 2, length), positions, None, causal
        return apply, draw.fill(shapes_of(params)), inputs

    return build


@contextlib.contextmanager
def tensorflow_spared():
    """A stand-in for TensorFlow where it is absent: gemma's imports only name its Tensor type."""
    absent = importlib.util.find_spec("tensorflow") is None
    if absent:
        fake = types.ModuleType("tensorflow")
        fake.Tensor = type("Tensor", (), {})
        fake.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
        sys.modules["tensorflow"] = fake
    yield
    if absent:
        del sys.modules["tensorflow"]


def gemma(key):
    pytest.importorskip("kauldron")
    with tensorflow_spared():
        pytest.importorskip("gemma")
        from gemma import gm
        from gemma.gm.nn import _config, _modules

        transformer, kinds = gm.nn.Transformer, _modules.AttentionType

    sizes = {name: size for name, size in SIZES.items() if name != "num_layers"}
    config = _config.TransformerConfig(
        num_embed=37,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=3,
        transpose_gating_einsum=True,
        **sizes,
    )
    model, draw = transformer(config=config, dtype=jnp.float32), Draw(key)
    ids = draw.ids(36, 2, 5) + 1  # 0 is padding
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    return *lj.from_linen(model, draw.fill(variables)), (ids,)


ATTENTION = {
    "attn/k_proj/w": (12, 12, (), DENSE),
    "attn/o_proj/w": (24, 12, (), DENSE),
    "attn/q_proj/w": (12, 24, (), DENSE),
    "attn/v_proj/w": (12, 12, (), DENSE),
}
EINSUMS = {
    "attn/attn_vec_einsum/w": (24, 12, (), DENSE),
    "attn/kv_einsum/w": (12, 24, (), DENSE),
    "attn/q_einsum/w": (12, 24, (), DENSE),
}
MLP = {
    "mlp/down_proj/kernel": (20, 12, (), DENSE),
    "mlp/gate_proj/kernel": (12, 20, (), DENSE),
    "mlp/up_proj/kernel": (12, 20, (), DENSE),
}
EXPERTS = {
    "mlp/down_proj": (20, 12, (3,), DENSE),
    "mlp/gate_proj": (12, 20, (3,), DENSE),
    "mlp/up_proj": (12, 20, (3,), DENSE),
}
GATED = {
    "mlp/gating_einsum": (12, 40, (), DENSE),
    "mlp/linear": (20, 12, (), DENSE),
}
RAGGED_EXPERTS = {
    "moe/gating_einsum": (12, 14, (3,), RAGGED),
    "moe/linear": (7, 12, (3,), RAGGED),
}
PER_LAYER = {
    "moe/router_logits": (12, 3, (), DENSE),
    "per_layer_input_gate/w": (12, 5, (), DENSE),
    "per_layer_projection/w": (5, 12, (), DENSE),
}

DECODERS = [
    installed(
        "tunix_llama3",
        tunix("Llama3", vocab_size=37, rope_theta=10_000, norm_eps=1e-5),
        repeated("layers/{}", 2, ATTENTION),
        repeated("layers/{}", 2, MLP),
        {
            "embedder/input_embedding": (37, 12, (), LOOKUP),
            "lm_head/w": (12, 37, (), DENSE),
        },
        targets=lj.all_linear,
    ),
    installed(
        "tunix_qwen3_experts",
        tunix(
            "Qwen3",
            vocab_size=37,
            rope_theta=10_000,
            norm_eps=1e-5,
            num_experts=3,
            num_experts_per_tok=2,
            use_tied_embedding=True,
        ),
        repeated("layers/{}", 2, ATTENTION),
        repeated("layers/{}", 2, EXPERTS),
        {
            "embedder/input_embedding": (37, 12, (), TIED),
            **repeated("layers/{}", 2, {"mlp/router/kernel": (12, 3, (), DENSE)}),
        },
        routers=frozenset(f"layers/{i}/mlp/router/kernel" for i in range(2)),
        exact=False,  # XLA fuses the experts in another order; equal when nothing fuses
    ),
    installed(
        "tunix_gemma3",
        tunix("Gemma3", num_embed=37, sliding_window_size=3),
        repeated("layers/{}", 2, EINSUMS),
        repeated("layers/{}", 2, MLP),
        {"embedder/input_embedding": (37, 12, (), TIED)},
    ),
    installed(
        "tunix_gemma4_experts",
        tunix(
            "Gemma4",
            num_embed=37,
            sliding_window_size=3,
            global_key_size=6,
            global_rope_proportion=1.0,
            per_layer_input_dim=5,
            enable_moe=True,
            num_experts=3,
            num_experts_per_tok=2,
            expert_dim=7,
            moe_dense_hidden_dim=9,
        ),
        repeated("layers/{}", 2, EINSUMS),
        repeated("layers/{}", 2, {**MLP, **RAGGED_EXPERTS}),
        {
            "embedder/input_embedding": (37, 12, (), TIED),
            "embedder/per_layer_input_embedding": (37, 10, (), LOOKUP),
            "embedder/per_layer_model_projection/w": (12, 10, (), DENSE),
            **repeated("layers/{}", 2, PER_LAYER),
        },
        routers=frozenset(f"layers/{i}/moe/router_logits" for i in range(2)),
        targets=bare,
    ),
    installed(
        "gemma",
        gemma,
        repeated("layer_{}", 2, EINSUMS),
        repeated("layer_{}", 2, GATED),
        {"embedder/input_embedding": (37, 12, (), TIED)},
    ),
]
