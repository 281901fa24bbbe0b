"""Virtual tokens beside the inputs of encoders: equal to real ones, to plain loops, trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_bert
import tiny_efficientnet
from jax.tree_util import keystr

import lora_jax as lj
from lora_jax.models import with_head
from lora_jax.models.bert import POOLINGS, initialise_bert
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.efficientnet import network as efficientnet_network
from lora_jax.models.efficientnet import shapes as efficientnet_shapes
from lora_jax.models.vit import ViTConfig, initialise_vit
from lora_jax.prompts import PromptedNetwork, p_tuning, prefix_tuning, prompt_tuning
from lora_jax.train import adapter_loss, init_state, make_step

KEY = jax.random.key(0)
HARD = jnp.array([5, 7, 11])
IDS, MASK = (jnp.asarray(x) for x in tiny_bert.batch("bert"))
VIT = ViTConfig(8, 4, 12, 2, 3, 20, layer_scale=True)
IMAGES = jnp.sin(jnp.arange(2 * 8 * 12 * 3.0)).reshape(2, 8, 12, 3)  # two by three patches


@functools.cache
def bert(kind="bert", pooling="mean"):
    network = initialise_bert(BertConfig.from_hf(tiny_bert.CONFIGS[kind]), KEY, pooling)
    return moved(network)


@functools.cache
def vit():
    return moved(initialise_vit(VIT, KEY))


def moved(network):
    """With no bias of zero and kernels large enough to have opinions."""
    wave = lambda x: x + 0.4 * jnp.sin(jnp.arange(x.size) + x.ndim).reshape(x.shape)  # noqa: E731
    return dataclasses.replace(network, params=jax.tree.map(wave, network.params))


BASES = {"bert": (bert, (IDS, MASK)), "vit": (vit, (IMAGES,))}
MAKERS = {
    "prompt": lambda network: prompt_tuning(network, 3, KEY),
    "p, lstm": lambda network: p_tuning(network, 3, KEY, hidden=5, encoder="lstm"),
    "prefix": lambda network: prefix_tuning(network, 3, KEY),
    "prefix, made": lambda network: prefix_tuning(network, 3, KEY, hidden=7),
    "deep": lambda network: prompt_tuning(network, 3, KEY, deep=True),
}
CASES = [("bert", "p, lstm"), ("bert", "prefix, made"), ("vit", "deep"), ("vit", "prefix, made")]
each_case = pytest.mark.parametrize(("base", "name"), CASES)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(np.asarray(y)).max())


@pytest.mark.parametrize(
    ("kind", "pooling", "mask"),
    [
        *(("bert", pooling, MASK) for pooling in POOLINGS),
        *((kind, "mean", None) for kind in tiny_bert.CONFIGS),
        ("roberta", "mean", MASK),
    ],
)
def test_a_prompt_of_real_tokens_is_that_text(kind, pooling, mask):
    network = bert(kind, pooling)
    prompted = prompt_tuning(network, 3, KEY, init=HARD)
    ids = jnp.asarray(tiny_bert.batch(kind)[0])
    text = jnp.concatenate([jnp.broadcast_to(HARD[None], (2, 3)), ids], axis=1)
    seen = None if mask is None else jnp.pad(mask, ((0, 0), (3, 0)), constant_values=True)
    types = jnp.zeros_like(ids).at[:, 4:].set(1) if kind == "bert" else jnp.zeros_like(ids)
    longer = jnp.pad(types, ((0, 0), (3, 0)))
    for ours, whole in ((prompted.apply, network.apply), (prompted.features, network.features)):
        wanted = whole(network.params, text, seen, longer)
        wanted = wanted[:, 3:] if whole is network.apply else wanted
        np.testing.assert_array_equal(ours(prompted.params, ids, mask, types), wanted)


def plain_vit(params, images, tokens=None, prefix=None):
    """A ViT's forward pass, layer by layer, virtual tokens and all; tokens [1 or L, n, D]."""
    params = jax.tree.map(np.asarray, params)
    size, batch = VIT.patch_size, len(images)
    kernel = params["patches"]["kernel"].reshape(-1, VIT.hidden_size)
    windows = np.asarray(images).reshape(batch, 2, size, 2, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = windows.reshape(batch, 4, -1) @ kernel + params["patches"]["bias"]
    rows = lambda y: np.broadcast_to(y, (batch, *y.shape))  # noqa: E731
    x = np.concatenate([rows(params["cls"][None]), x], axis=1) + params["positions"]
    start = 1
    for layer in range(VIT.num_hidden_layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        if tokens is not None and layer < len(tokens):
            x = np.concatenate([x[:, :1], rows(tokens[layer]), x[:, start:]], axis=1)
            start = 1 + tokens.shape[1]
        y = normed(x, own["attn_norm"])
        q, k, v = (dense(y, own["attn"][f"{name}_proj"]) for name in "qkv")
        if prefix is not None:
            k, v = (
                np.concatenate([rows(prefix[:, 2 * layer + i]), part], axis=1)
                for i, part in enumerate((k, v))
            )
        heads = []
        for at in np.split(np.arange(VIT.hidden_size), VIT.num_attention_heads):
            scores = np.exp(q[..., at] @ k[..., at].swapaxes(1, 2) / np.sqrt(len(at)))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., at])
        attended = dense(np.concatenate(heads, -1), own["attn"]["o_proj"])
        x = x + attended * own["attn_scale"]
        inner = jax.nn.gelu(dense(normed(x, own["mlp_norm"]), own["mlp"]["up_proj"]), False)
        x = x + dense(np.asarray(inner), own["mlp"]["down_proj"]) * own["mlp_scale"]
    x = normed(x, params["norm"])
    return np.concatenate([x[:, :1], x[:, start:]], axis=1)


def dense(x, own):
    return x @ own["kernel"] + own["bias"]


def normed(x, own):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * own["scale"] + own["bias"]


def test_a_vit_reads_them_after_the_class_token_without_positions():
    images = IMAGES[:, :, :8]
    base = {name: leaf for name, leaf in vit().params.items() if name != "prompt"}
    bare = plain_vit(base, images)
    close(vit().apply(base, images), bare)
    for name, shape in (("prompt", (1, 3, 12)), ("deep", (2, 3, 12))):
        prompted = MAKERS[name](vit())
        tokens = np.asarray(prompted.params["prompt"]["embedding"]).reshape(shape)
        wanted = plain_vit(base, images, tokens)
        close(prompted.apply(prompted.params, images), wanted)
        assert np.abs(wanted - bare).max() > 1e-2
        both = np.concatenate([wanted[:, 0], wanted[:, 1:].mean(axis=1)], axis=1)
        close(prompted.features(prompted.params, images), both)


def test_a_prefix_stands_before_the_keys_and_values_of_every_layer():
    prompted = MAKERS["prefix"](vit())
    prefix = np.asarray(prompted.params["prompt"]["embedding"]).reshape(3, 4, 12)
    wanted = plain_vit(vit().params, IMAGES[:, :, :8], prefix=prefix)
    close(prompted.apply(prompted.params, IMAGES[:, :, :8]), wanted)


@pytest.mark.parametrize("make", [prompt_tuning, p_tuning, prefix_tuning])
@pytest.mark.parametrize("base", BASES)
def test_no_virtual_tokens_change_nothing(base, make):
    network, inputs = BASES[base][0](), BASES[base][1]
    prompted = make(network, 0, KEY)
    for ours, plain in ((prompted.apply, network.apply), (prompted.features, network.features)):
        wanted = plain(network.params, *inputs)
        np.testing.assert_array_equal(ours(prompted.params, *inputs), wanted)


@each_case
def test_exported_is_the_same_without_its_network(base, name):
    network, inputs = BASES[base][0](), BASES[base][1]
    prompted = MAKERS[name](network)
    kept = prompted.exported(prompted.params)
    assert isinstance(kept, PromptedNetwork) and list(kept.params["prompt"]) == ["embedding"]
    close(kept.apply(kept.params, *inputs), prompted.apply(prompted.params, *inputs), 1e-6)


@each_case
def test_a_head_goes_on_before_or_after(base, name):
    network, inputs = BASES[base][0](), BASES[base][1]
    after = with_head(MAKERS[name](network), 4, KEY)
    before = MAKERS[name](with_head(network, 4, KEY))
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    assert isinstance(after, PromptedNetwork) and after.length == 3
    logits = after.apply(after.params, *inputs)
    np.testing.assert_array_equal(before.apply(before.params, *inputs), logits)
    bare = with_head(network, 4, KEY)
    assert logits.shape == (2, 4)
    assert np.abs(logits - bare.apply(bare.params, *inputs)).max() > 1e-4


@each_case
def test_they_train_beside_an_adapter_and_the_base_stays(base, name):
    network, inputs = BASES[base][0](), BASES[base][1]
    prompted = with_head(MAKERS[name](network), 4, KEY)
    sites = lj.find_sites(prompted.apply, prompted.params, *inputs)
    rules = {"(prompt|head)/.*": lj.full(), "layers/attn/q_proj/kernel": lj.lora(rank=2)}
    frozen, trained = lj.attach(KEY, prompted.params, rules, sites)

    def loss(params, batch):
        logits = prompted.apply(params, *inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(losses), jnp.float32(len(losses))

    optimizer = optax.adamw(1e-2)
    step = make_step(adapter_loss(loss), optimizer)
    state, losses = init_state(trained, optimizer), []
    for _ in range(3):
        state, info = step(state, frozen, {"labels": jnp.array([0, 3])})
        losses.append(float(info.loss))
    assert losses[2] < losses[0]
    merged = lj.merge(frozen, state.trained)
    same = jax.tree.map(np.array_equal, merged, prompted.params)
    for path, equal in jax.tree_util.tree_leaves_with_path(same):
        where = keystr(path, simple=True, separator="/")
        fresh = where.startswith(("prompt", "head"))
        assert equal != (fresh or where == "layers/attn/q_proj/kernel"), where


def test_trainable_counts():
    count = lambda network: lj.tree.count(network.params["prompt"])  # noqa: E731
    assert count(prompt_tuning(vit(), 5, KEY)) == 5 * 12
    assert count(prompt_tuning(vit(), 5, KEY, deep=True)) == 2 * 5 * 12
    assert count(prefix_tuning(bert(), 5, KEY)) == 2 * 5 * 2 * 12
    assert count(p_tuning(bert(), 5, KEY, hidden=7)) == 5 * 12 + (12 * 7 + 7) + 56 + (7 * 12 + 12)


def test_a_vit_s_tokens_start_by_the_patch_size():
    start = prompt_tuning(vit(), 500, KEY).params["prompt"]["embedding"]
    spread = (6 / (3 * 16 + 12)) ** 0.5
    assert 0.95 * spread < np.abs(start).max() <= spread


def efficientnet():
    config = tiny_efficientnet.CONFIG
    return efficientnet_network(config, *efficientnet_shapes(config))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: prompt_tuning(efficientnet(), 3, KEY),
            "Llama, a BERT or a ViT.*EfficientNetConfig",
        ),
        (lambda: prompt_tuning(bert(), 3, KEY, deep=True), "for images; prefix_tuning"),
        (lambda: prompt_tuning(vit(), 3, KEY, init="vocabulary"), "'vocabulary'.*give 'random' or"),
        (lambda: prompt_tuning(vit(), 3, KEY, init=HARD), r"\(3,\).*\(3, 12\)"),
        (lambda: prefix_tuning(bert(), 3, KEY, init=jnp.ones((2, 5))), r"\(2, 5\).*\(3, 48\)"),
        (lambda: p_tuning(prefix_tuning(bert(), 3, KEY), 3, KEY), "virtual tokens already"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(lj.InputError, match=words):
        make()


@pytest.mark.parametrize("make", [prompt_tuning, prefix_tuning])
@pytest.mark.parametrize(("kind", "room"), [("bert", 16), ("roberta", 14)])
def test_virtual_tokens_count_towards_the_context(kind, room, make):
    prompted = make(bert(kind), room - 9, KEY)
    prompted.apply(prompted.params, IDS)
    prompted = make(bert(kind), room - 8, KEY)
    with pytest.raises(lj.InputError, match=f"{room + 1} tokens are longer"):
        prompted.apply(prompted.params, IDS)
