"""Virtual tokens: equal to real ones where they can be, layouts, counts, training, generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_bases
import pytest
import tiny_llama
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.generate import generate
from lora_jax.models import LlamaConfig, Model
from lora_jax.models.layers import attend
from lora_jax.models.model import param_shapes
from lora_jax.prompts import p_tuning, prefix_tuning, prompt_tuning
from lora_jax.train import adapter_loss, init_state, make_step
from lora_jax.train.loss import answer_loss

KEY = jax.random.key(0)
HARD = [5, 7, 11]
IDS = jnp.array([[3, 4, 9, 2, 8], [1, 6, 6, 20, 0]])
MASK = jnp.array([[True] * 5, [True, True, True, True, False]])


@functools.cache
def base():
    return tiny_llama.model()


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(np.asarray(y)).max())


MAKERS = {
    "prompt": lambda model: prompt_tuning(model, 3, KEY),
    "prompt, random": lambda model: prompt_tuning(model, 3, KEY, init="random"),
    "p, mlp": lambda model: p_tuning(model, 3, KEY, hidden=7),
    "p, lstm": lambda model: p_tuning(model, 3, KEY, hidden=5, encoder="lstm"),
    "prefix": lambda model: prefix_tuning(model, 3, KEY),
    "prefix, made": lambda model: prefix_tuning(model, 3, KEY, hidden=7),
}
every = pytest.mark.parametrize("name", MAKERS)
each_kind = pytest.mark.parametrize("name", ["prompt", "p, lstm", "prefix, made"])


@pytest.mark.parametrize("mask", [None, MASK])
def test_a_prompt_of_real_tokens_is_that_text(mask):
    model, prompted = base(), prompt_tuning(base(), 3, KEY, init=HARD)
    text = jnp.concatenate([jnp.broadcast_to(jnp.array(HARD)[None], (2, 3)), IDS], axis=1)
    seen = None if mask is None else jnp.pad(mask, ((0, 0), (3, 0)), constant_values=True)
    hard = model.apply(model.params, text, mask=seen)[:, 3:]
    np.testing.assert_array_equal(prompted.apply(prompted.params, IDS, mask=mask), hard)
    positions = jnp.broadcast_to(jnp.arange(5)[None], IDS.shape)
    close(prompted.apply(prompted.params, IDS, positions, mask), hard)


def test_a_text_is_repeated_or_cut_to_the_length():
    table = base().params["embed"]["embedding"]
    for length, ids in ((2, [5, 7]), (5, [5, 7, 11, 5, 7])):
        prompt = prompt_tuning(base(), length, KEY, init=HARD).params["prompt"]["embedding"]
        np.testing.assert_array_equal(prompt, table[jnp.array(ids)])


def test_a_prefix_of_the_model_s_own_keys_and_values_is_that_text():
    """What a cache holds after a text, in the flat layout, stands for the text."""
    model = base()
    cache = model.init_cache(1, 3)
    _, cache = model.decode(model.params, jnp.array([HARD]), cache)
    own = np.stack([cache.keys[:, 0], cache.values[:, 0]], axis=1)  # [L, 2, n, K, d]
    flat = own.transpose(2, 0, 1, 3, 4).reshape(3, -1)
    prompted = prefix_tuning(model, 3, KEY, init=flat)
    text = jnp.concatenate([jnp.broadcast_to(jnp.array(HARD)[None], (2, 3)), IDS], axis=1)
    close(prompted.apply(prompted.params, IDS), model.apply(model.params, text)[:, 3:])


def test_attention_with_a_prefix_is_that_over_the_longer_keys():
    from lora_jax.models.llama import attend_causally

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    q, k, v = draw(2, 130, 4, 6), draw(2, 133, 2, 6), draw(2, 133, 2, 6)
    mask = jnp.pad(jnp.tril(jnp.ones((130, 130), bool)), ((0, 0), (3, 0)), constant_values=True)
    close(attend_causally(q, k, v, mask[None]), attend(q, k, v, mask[None]))


@pytest.mark.parametrize("make", [prompt_tuning, prefix_tuning, p_tuning])
def test_no_virtual_tokens_change_nothing(make):
    model = base()
    prompted = make(model, 0, KEY)
    fresh = prompted.apply(prompted.params, IDS, mask=MASK)
    np.testing.assert_array_equal(fresh, model.apply(model.params, IDS, mask=MASK))
    _, cache = prompted.decode(prompted.params, IDS, prompted.init_cache(2, 6))
    assert int(cache.slot) == 5


@every
def test_exported_is_the_same_without_its_network(name):
    prompted = MAKERS[name](base())
    kept = prompted.exported(prompted.params)
    assert list(kept.params["prompt"]) == ["embedding"]
    np.testing.assert_array_equal(
        kept.apply(kept.params, IDS), prompted.apply(prompted.params, IDS)
    )


@pytest.mark.parametrize("name", ["prompt", "prefix, made"])
def test_generation_goes_on_where_the_text_stands(name):
    """Rows of unequal length, one token at a time, against one whole pass each."""
    prompted = MAKERS[name](base())
    rows = [[3, 4, 9], [1, 6, 6, 20]]
    out = generate(prompted.decode, prompted.params, rows, prompted.init_cache, max_new_tokens=3)
    for row, new in zip(rows, out, strict=True):
        padded = jnp.array([[*row, *new][:6] + [0] * max(0, 6 - len(row) - len(new))])
        best = prompted.apply(prompted.params, padded)[0].argmax(axis=-1)
        assert best[len(row) - 1 :][: len(new)].tolist() == new[: 7 - len(row)]


@each_kind
def test_it_trains_beside_an_adapter_and_the_base_stays(name):
    prompted = MAKERS[name](base())
    sites = lj.find_sites(prompted.apply, prompted.params, IDS)
    rules = {"prompt/.*": lj.full(), "layers/attn/q_proj/kernel": lj.lora(rank=2)}
    frozen, trained = lj.attach(KEY, prompted.params, rules, sites)
    assert all(p.startswith("prompt/") or "q_proj" in p for p in trained)
    loss = adapter_loss(answer_loss(prompted.hidden, prompted.logits))
    optimizer = optax.adamw(1e-2)
    step = make_step(loss, optimizer)
    batch = {"ids": IDS, "targets": jnp.roll(IDS, -1, 1), "weights": jnp.ones(IDS.shape)}
    state, losses = init_state(trained, optimizer), []
    for _ in range(3):
        state, info = step(state, frozen, batch)
        losses.append(float(info.loss))
    assert losses[2] < losses[0]
    merged = lj.merge(frozen, state.trained)
    loose = {**merged, "layers": base().params["layers"], "prompt": None}
    assert peft_bases.same(loose, {**base().params, "prompt": None})
    moved = jax.tree.map(
        lambda x, y: bool((x != y).any()), merged["prompt"], prompted.params["prompt"]
    )
    assert all(jax.tree.leaves(moved))


def abstract(layers, width):
    """A model of shapes alone, of the size that papers count."""
    config = LlamaConfig(30, width, 8, layers, 12, 12, width // 12, max_position_embeddings=512)
    return Model(config, param_shapes(config))


def count(make):
    return lj.tree.count(jax.eval_shape(lambda: make().params["prompt"]))


def test_trainable_counts():
    model = abstract(12, 768)
    assert count(lambda: prefix_tuning(model, 10, KEY)) == 184_320
    n, e, hidden, out = 10, 768, 512, 2 * 12 * 768
    made = n * e + (e * hidden + hidden) + (hidden * out + out)
    assert count(lambda: prefix_tuning(model, 10, KEY, hidden=512)) == made
    assert count(lambda: prompt_tuning(model, 100, KEY, init="random")) == 76_800
    mlp = 20 * 768 + 768 * 64 + 64 + 64 * 64 + 64 + 64 * 768 + 768
    assert count(lambda: p_tuning(model, 20, KEY, hidden=64)) == mlp


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: prompt_tuning(m, -1, KEY), "length=-1"),
        (lambda m: prompt_tuning(m, 3, KEY, init="text"), "'text'.*token ids"),
        (lambda m: prompt_tuning(m, 3, KEY, init=[]), "token ids, at least one"),
        (lambda m: prompt_tuning(m, 3, KEY, init=jnp.ones((3, 5))), r"\(3, 5\).*\(3, 16\)"),
        (lambda m: p_tuning(m, 3, KEY, encoder="gru"), "'gru'.*'mlp' or 'lstm'"),
        (lambda m: prefix_tuning(m, 3, KEY, init="ones"), "'ones'.*'zero'"),
        (lambda m: prefix_tuning(m, 3, KEY, hidden=0), "hidden=0"),
        (lambda m: prefix_tuning(m, 3, KEY, init=jnp.ones((2, 5))), r"\(2, 5\).*\(3, 72\)"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(lj.InputError, match=words):
        make(base())


def test_virtual_tokens_count_towards_the_context():
    for make in (prompt_tuning, prefix_tuning):
        prompted = make(base(), 36, KEY)
        with pytest.raises(lj.InputError, match="41 tokens are longer"):
            prompted.apply(prompted.params, IDS)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("prompt_tuning", prompt_tuning),
        ("p_tuning", prompt_tuning),
        ("prefix_tuning", prefix_tuning),
    ],
)
def test_recorded_logits_of_peft(name, make):
    model, _ = peft_bases.base()
    saved = load_file(peft_bases.ADAPTERS / name / "adapter_model.safetensors")
    prompted = make(model, 3, KEY, init=saved["prompt_embeddings"])
    ours = prompted.apply(prompted.params, peft_bases.IDS)
    assert peft_bases.distance(ours, peft_bases.RECORDED[f"logits/{name}"]) < 1e-5
