"""Generation against the plain forward pass; sampling against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.generate import Sampling, complete, generate
from lora_jax.generate.sample import choose

MODEL = tiny_llama.model(seed=3)
PROMPTS = [[3, 8, 1, 12, 20], [7, 4], [5]]
write = functools.partial(generate, MODEL.decode, MODEL.params, init_cache=MODEL.init_cache)


def step_by_step(prompt, steps):
    """Greedy generation by whole forward passes."""
    apply, ids = jax.jit(MODEL.apply), np.zeros((1, 20), np.int32)
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + steps):
        ids[0, place] = int(apply(MODEL.params, jnp.asarray(ids))[0, place - 1].argmax())
    return ids[0, len(prompt) : len(prompt) + steps].tolist()


WANTED = [step_by_step(prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("width", [None, 8])
def test_greedy_generation_of_prompts_of_different_lengths(width):
    assert write(PROMPTS, max_new_tokens=6, width=width) == WANTED


def test_each_row_stops_at_its_own_end_token():
    ends = [row[2] for row in WANTED[:1]] + [WANTED[1][4]]
    for got, wanted in zip(write(PROMPTS, max_new_tokens=6, eos=ends), WANTED, strict=True):
        first = min([wanted.index(end) for end in ends if end in wanted], default=6)
        assert got == wanted[:first]
    assert write(PROMPTS, max_new_tokens=1) == [row[:1] for row in WANTED]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    draw = functools.partial(write, max_new_tokens=5, sampling=Sampling(1.5, top_k=9, top_p=0.9))
    together = draw(PROMPTS, key=jax.random.key(1), width=5)
    assert together == draw(PROMPTS, key=jax.random.key(1), width=5)
    assert draw(PROMPTS[:1], key=jax.random.key(1), width=5) == together[:1]
    assert draw(PROMPTS, key=jax.random.key(2), width=5) != together


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jnp.broadcast_to(logits, (4000, 4))

    def shares(sampling):
        return np.bincount(choose(sampling, keys, many), minlength=4) / 4000

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=2)), [5 / 8, 3 / 8, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.6)), [5 / 8, 3 / 8, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.4)), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(Sampling(1e-3)), [1, 0, 0, 0])
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(Sampling(2.0)), hot / hot.sum(), atol=0.03)


def test_text_to_text():
    import dataclasses

    model = dataclasses.replace(MODEL, tokenizer=tiny_llama.tokenizer())
    ids = model.tokenizer.encode("ab 12")
    texts = complete(model, ["ab 12", "c"], max_new_tokens=4)
    new = generate(model.decode, model.params, [ids], model.init_cache, max_new_tokens=4, eos=[2])
    assert texts[0] == model.tokenizer.decode(new[0])
    assert complete(model, []) == []
    with pytest.raises(InputError, match="has no tokenizer"):
        complete(MODEL, ["a"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": Sampling(1.0)}, "give key="),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"width": 3}, "prompt 0 is longer than width 3"),
        ({"max_new_tokens": 40}, "45 tokens are longer than the model's context of 40"),
    ],
)
def test_bad_requests(changes, words):
    with pytest.raises(InputError, match=words):
        write(**{"prompts": PROMPTS, "max_new_tokens": 2, **changes})


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_bad_sampling(values):
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)


def test_an_adapted_model_writes_what_the_merged_one_writes():
    sites = lj.find_sites(MODEL.apply, MODEL.params, jnp.zeros((1, 3), jnp.int32))
    rules = {lj.all_linear: lj.lora(rank=2, alpha=4.0)}
    frozen, trained = lj.attach(jax.random.key(0), MODEL.params, rules, sites)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), trained
    )
    request = {"prompts": PROMPTS, "init_cache": MODEL.init_cache, "max_new_tokens": 6}
    adapted = generate(lj.factored(MODEL.decode), lj.bind(frozen, moved), **request)
    merged = generate(MODEL.decode, lj.merge(frozen, moved), **request)
    assert adapted == merged != WANTED
