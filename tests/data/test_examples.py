"""Reading a task's examples and splitting them."""

import csv
import json

import pytest

from lora_jax.data import Example, read_examples, split_examples
from lora_jax.data.examples import normalise
from lora_jax.errors import InputError

EXAMPLES = [Example(f"question {n}", " yes" if n % 2 else " no") for n in range(30)]


def test_split_has_the_sizes_and_loses_nothing():
    splits = split_examples(EXAMPLES, dev=5, test=7, seed=0)
    assert [len(part) for part in splits] == [18, 5, 7]
    assert sorted(e for part in splits for e in part) == sorted(EXAMPLES)


def test_split_follows_the_seed_alone():
    one, again = (split_examples(EXAMPLES, dev=5, test=7, seed=3) for _ in range(2))
    assert one == again
    assert one.sha256() == again.sha256()
    other = split_examples(EXAMPLES, dev=5, test=7, seed=4)
    assert other != one
    assert other.sha256() != one.sha256()


def test_split_does_not_depend_on_the_order_of_the_file():
    backwards = split_examples(EXAMPLES[::-1], dev=5, test=7, seed=3)
    assert backwards == split_examples(EXAMPLES, dev=5, test=7, seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_stay_on_one_side(seed):
    twins = [Example(f"  QUESTION {n}!", e.completion) for n, e in enumerate(EXAMPLES)]
    splits = split_examples(EXAMPLES + twins, dev=5, test=7, seed=seed)
    texts = [{normalise(e.prompt) for e in part} for part in splits]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert [len(part) for part in splits] == [36, 5, 7]


def test_texts_without_letters_stay_apart():
    assert normalise("!!!") != normalise("???")


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="dev=10 and test=20 leave nothing"):
        split_examples(EXAMPLES, dev=10, test=20, seed=0)


def test_json_lines(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [
        {"prompt": "a\u2028b", "completion": " c", "more": 1},
        {"prompt": "", "completion": "d"},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_examples(path) == [Example("a\u2028b", " c"), Example("", "d")]


def test_csv_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "task.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "completion", "prompt"], [1, " yes", 'one\n"two", three']])
    assert read_examples(path) == [Example('one\n"two", three', " yes")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no examples"),
        ("a.csv", "prompt,completion\n", "has no examples"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n{"prompt"', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.jsonl", '{"prompt": "x", "answer": "y"}', "line 1 needs .* its columns: 'prompt', 'a"),
        ("a.jsonl", '{"prompt": "x", "completion": ""}', "non-empty"),
        ("a.csv", "prompt\nx\n", "line 2 needs"),
        ("a.txt", "x", "suffix"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_examples(path)
    assert name in str(error.value)


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_examples(path)
