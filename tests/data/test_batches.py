"""Token rows, training batches from (seed, step), evaluation batches in order of length."""

import numpy as np
import pytest

from lora_jax.data import Batches, Encoded, Example, collate, encode, held_out_batches
from lora_jax.errors import InputError

ROWS = [Encoded(tuple(range(10 * n, 10 * n + 2 + n % 4)), 1 + n % 2) for n in range(1, 12)]


def tokenize(text):
    return [ord(letter) for letter in text]


def test_the_prompt_is_a_prefix_and_the_answer_is_scored():
    (row,) = encode(
        [Example("abc", "de")], lambda text: [1, *tokenize(text)], tokenize, length=8, end=0
    )
    assert row == Encoded((1, 97, 98, 99, 100, 101, 0), 4)
    batch = collate([row], length=8, answers=3)
    assert batch["ids"].tolist() == [[1, 97, 98, 99, 100, 101, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 6 + [False] * 2]
    assert batch["at"].tolist() == [[3, 4, 5]]
    assert batch["targets"].tolist() == [[100, 101, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1]]


def test_a_row_of_exactly_the_length_fits():
    (row,) = encode([Example("abc", "de")], tokenize, length=4)
    assert len(row.ids) == 5


def test_a_longer_row_is_refused_with_its_numbers():
    examples = [Example("a", "b"), Example("abcdef", "gh")]
    with pytest.raises(
        InputError, match=r"example 1 \('abcdef'.*6 prompt and 2 answer tokens, 2 m"
    ):
        encode(examples, tokenize, length=5)


def test_truncation_cuts_the_prompt_on_the_left():
    (row,) = encode([Example("abcdef", "gh")], tokenize, length=5, truncate=True)
    assert row == Encoded(tuple(tokenize("cdefgh")), 4)
    with pytest.raises(InputError, match="length of 5"):
        encode([Example("ab", "cdefgh")], tokenize, length=5, truncate=True)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="0 prompt"):
        encode([Example("", "b")], tokenize, length=5)


def test_every_epoch_shows_every_row_once():
    batches = Batches(ROWS, size=4, length=6, seed=5)
    seen = np.concatenate([batches(step)["ids"][:, 0] for step in range(11)])
    for epoch in range(4):
        assert sorted(seen[11 * epoch : 11 * (epoch + 1)]) == [row.ids[0] for row in ROWS]
    assert seen[:11].tolist() != seen[11:22].tolist()


def test_batches_are_a_function_of_seed_and_step():
    one, two = (Batches(ROWS, size=4, length=6, seed=5) for _ in range(2))
    one(0), one(1)
    for name, array in one(2).items():
        np.testing.assert_array_equal(array, two(2)[name])
    assert one(2)["ids"].tolist() != Batches(ROWS, size=4, length=6, seed=6)(2)["ids"].tolist()


def test_a_batch_may_be_larger_than_the_data():
    batch = Batches(ROWS, size=25, length=6, seed=0)(0)
    assert batch["ids"].shape == (25, 6)
    assert batch["at"].shape == batch["targets"].shape == batch["weights"].shape == (25, 3)


@pytest.mark.parametrize(("rows", "size"), [(ROWS, 0), ([], 4)])
def test_empty_batches_are_refused(rows, size):
    with pytest.raises(InputError):
        Batches(rows, size=size, length=6, seed=0)


def test_held_out_batches_cover_every_row_once_and_fill_with_weight_zero():
    seen, weight = [], 0.0
    for numbers, batch in held_out_batches(ROWS, size=4, length=6, multiple=2):
        assert batch["ids"].shape[0] == 4
        assert batch["ids"].shape[1] in (2, 4)
        for row, number in enumerate(numbers):
            inputs = ROWS[number].ids[:-1]
            assert batch["ids"][row, : len(inputs)].tolist() == list(inputs)
        seen += numbers.tolist()
        weight += batch["weights"].sum()
    assert sorted(seen) == list(range(len(ROWS)))
    assert weight == sum(len(row.ids) - row.start for row in ROWS)


def test_no_rows_make_no_batches():
    assert list(held_out_batches([], size=4, length=6)) == []
