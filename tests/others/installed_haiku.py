"""Haiku: tracr's transformers and Haiku's own residual network."""

import jax
import jax.numpy as jnp
import pytest
from cases.case import CONV, DENSE, LOOKUP, Draw
from installed import installed, repeated

import lora_jax as lj


def tracr(name, **keywords):
    """A transformer of tracr between embeddings, as a language model's trunk."""

    def build(key):
        hk = pytest.importorskip("haiku")
        plain = pytest.importorskip("tracr.transformer.model")
        compressed = pytest.importorskip("tracr.transformer.compressed_model")
        make = getattr(compressed, name, None) or getattr(plain, name)
        config = plain.TransformerConfig(
            num_heads=2, num_layers=2, key_size=5, mlp_hidden_size=16, dropout_rate=0.0, causal=True
        )

        def forward(ids):
            tokens, places = hk.Embed(11, 8, name="tokens"), hk.Embed(7, 8, name="places")
            x = tokens(ids) + places(jnp.arange(ids.shape[1]))
            return make(config)(x, jnp.ones_like(ids), **keywords).output

        draw = Draw(key)
        ids, pure = draw.ids(11, 2, 5), hk.transform(forward)
        shapes = jax.eval_shape(pure.init, jax.random.key(0), ids)
        return *lj.from_haiku(pure, draw.fill(shapes)), (ids,)

    return build


def resnet(key):
    """As it is evaluated: batch statistics beside the parameters."""
    hk = pytest.importorskip("haiku")

    def forward(x, training=False):
        net = hk.nets.ResNet(
            (1, 1, 1, 1), 5, bottleneck=False, resnet_v2=True, channels_per_group=(4, 6, 8, 9)
        )
        return net(x, is_training=training, test_local_stats=False)

    pure, draw = hk.without_apply_rng(hk.transform_with_state(forward)), Draw(key)
    images = draw.array(2, 16, 16, 3)
    params, state = jax.eval_shape(lambda x: pure.init(jax.random.key(0), x, True), images)
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
    return lambda params, x: pure.apply(params, state, x)[0], draw.fill(params), (images,)


ATTENTION = {
    "attn/key/w": (8, 10, (), DENSE),
    "attn/linear/w": (10, 8, (), DENSE),
    "attn/query/w": (8, 10, (), DENSE),
    "attn/value/w": (8, 10, (), DENSE),
}
MLP = {"mlp/linear_1/w": (8, 16, (), DENSE), "mlp/linear_2/w": (16, 8, (), DENSE)}
EMBEDDINGS = {
    "places/embeddings": (7, 8, (), LOOKUP),
    "tokens/embeddings": (11, 8, (), LOOKUP),
}


def group(number, c_in, c_out):
    path = f"res_net/~/block_group_{number}/~/block_0/~"
    return {
        f"{path}/conv_0/w": (9 * c_in, c_out, (), CONV),
        f"{path}/conv_1/w": (9 * c_out, c_out, (), CONV),
        f"{path}/shortcut_conv/w": (c_in, c_out, (), CONV),
    }


HAIKU = [
    installed(
        "tracr",
        tracr("Transformer"),
        repeated("transformer/layer_{}", 2, ATTENTION),
        repeated("transformer/layer_{}", 2, MLP),
        EMBEDDINGS,
    ),
    installed(
        "tracr_compressed",
        tracr("CompressedTransformer", embedding_size=6, unembed_at_every_layer=True),
        repeated("compressed_transformer/layer_{}", 2, ATTENTION),
        repeated("compressed_transformer/layer_{}", 2, MLP),
        {
            **EMBEDDINGS,
            "compressed_transformer/w_emb": (8, 6, (), ("dense", "dense, transposed")),
        },
    ),
    installed(
        "haiku_resnet",
        resnet,
        {},
        {},
        {
            "res_net/~/initial_conv/w": (147, 64, (), CONV),
            **group(0, 64, 4),
            **group(1, 4, 6),
            **group(2, 6, 8),
            **group(3, 8, 9),
            "res_net/~/logits/w": (9, 5, (), DENSE),
        },
    ),
]
