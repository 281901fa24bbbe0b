"""Intervals, multiple choice, and the loss on held-out answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data import Encoded, choice_batches, held_out_batches
from lora_jax.errors import InputError
from lora_jax.evaluate import (
    Accuracy,
    answer_logprobs,
    answer_numbers,
    choice_logprobs,
    find_choices,
    mean_loss,
    wilson,
)
from lora_jax.train import answer_loss

D, V = 5, 13
PARAMS = {
    "embed": jax.random.normal(jax.random.key(0), (V, D)),
    "head": jax.random.normal(jax.random.key(1), (D, V)),
}


def hidden(params, ids, mask):
    return jnp.cumsum(params["embed"][ids] * mask[..., None], axis=1)


def logits(params, body):
    return body @ params["head"]


def wanted(prompt, choice):
    """Log-probability of a choice after a prompt, one sequence at a time."""
    ids = jnp.array([[*prompt, *choice]])
    table = jax.nn.log_softmax(logits(PARAMS, hidden(PARAMS, ids, jnp.ones(ids.shape, bool))))[0]
    return sum(table[len(prompt) - 1 + n, token] for n, token in enumerate(choice))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Values of Newcombe, Statistics in Medicine 17 (1998), table I.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(correct, total, low, high):
    np.testing.assert_allclose(wilson(correct, total), (low, high), atol=6e-5)


def test_accuracy_says_its_interval():
    accuracy = Accuracy.of(20, 20)
    assert accuracy.share == accuracy.high == 1.0
    assert accuracy.low < 0.9
    with pytest.raises(ValueError, match="at least one"):
        Accuracy.of(0, 0)


@pytest.mark.parametrize("choices", [[(3,), (7,)], [(3, 4), (7,)], [(1, 2, 3), (4, 5), (6,)]])
def test_choices_are_scored_as_one_by_one(choices):
    prompts = [(1, 2), (5,), (9, 8, 7), (2, 2), (11, 12)]
    scores = jax.jit(answer_logprobs(hidden, logits))
    batches = choice_batches(prompts, choices, length=6, size=2)
    found = choice_logprobs(lambda batch: scores(PARAMS, batch), batches, len(choices))
    expected = [[wanted(prompt, choice) for choice in choices] for prompt in prompts]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mean_loss_weighs_answer_tokens():
    rows = [Encoded((1, 2, 3), 1), Encoded((4, 5), 1), Encoded((6, 7, 8, 9), 3)]
    loss = answer_loss(hidden, logits)
    batches = held_out_batches(rows, length=6, size=2)
    found = mean_loss(lambda batch: loss(PARAMS, batch), batches)
    total = -sum(wanted(ids[:start], ids[start:]) for ids, start in rows)
    assert found.tokens == 4
    np.testing.assert_allclose(found.loss, total / 4, rtol=1e-5)


def test_choices_are_found_when_they_are_few():
    assert find_choices([" b", " a", " b"]) == (" a", " b")
    assert find_choices([str(n) for n in range(9)]) == ()
    assert find_choices([" a"]) == ()


def test_an_answer_that_is_no_choice_is_named():
    assert answer_numbers([" b", " a"], [" a", " b"]).tolist() == [1, 0]
    with pytest.raises(InputError, match="' c' is none of"):
        answer_numbers([" a", " c"], [" a", " b"])
