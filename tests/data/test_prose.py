"""Documents from Python itself, files and folders; splits without a common paragraph; rows."""

import pytest

from lora_jax.data import prose
from lora_jax.data.prose import Document, prose_rows, read_prose, split_prose
from lora_jax.errors import InputError


def codes(text):
    return [ord(letter) for letter in text]


def paragraphs(documents):
    return {" ".join(part.split()) for text in documents for part in text.text.split("\n\n")}


def test_pythons_own_documentation():
    documents = read_prose("pydoc")
    names = [document.name for document in documents]
    assert names == sorted(names) and len(names) > 70
    split = split_prose(documents, dev=10, test=20, seed=0)
    parts = [paragraphs(part) for part in split]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set.union(*parts) | {""} == paragraphs(documents) | {""}
    assert split.sha256() == split_prose(documents[::-1], dev=10, test=20, seed=0).sha256()
    assert split.sha256() != split_prose(documents, dev=10, test=20, seed=1).sha256()


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.py").write_text("code")
    (tmp_path / "empty.rst").write_text("\n \n")
    assert read_prose(tmp_path) == [Document("a.txt", "first"), Document("inner/b.md", "second")]


def test_a_file_is_cut_into_sections(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "SECTION", 8)
    path = tmp_path / "book.txt"
    path.write_text("one two\n\nthree\n\nfour\n \nfive six\n\nseven")
    found = read_prose(path)
    assert [document.text for document in found] == [
        "one two\n\nthree",
        "four\n\nfive six",
        "seven",
    ]
    assert found[0].name == "book.txt:0"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no text at"), (b"", "holds no text"), (b"\xff", "not UTF-8")]
)
def test_sources_without_text_are_refused(tmp_path, content, message):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prose(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no text"):
        read_prose(tmp_path)


def test_documents_that_others_hold_whole_are_dropped():
    texts = [
        Document("a", "x\n\ny"),
        Document("b", "y\n\nx"),
        Document("c", " x"),
        Document("d", "z"),
    ]
    split = split_prose(texts, dev=1, test=1, seed=0)
    kept = [document for part in split for document in part]
    assert sorted(p for document in kept for p in document.text.split()) == ["x", "y", "z"]
    assert len(kept) < 4


@pytest.mark.parametrize(
    "sizes", [{"dev": 0, "test": 1}, {"dev": 1, "test": 0}, {"dev": 2, "test": 2}]
)
def test_splits_that_leave_nothing_are_refused(sizes):
    with pytest.raises(InputError, match="of 4 documents"):
        split_prose([Document(n, n) for n in "abcd"], **sizes, seed=0)


@pytest.mark.parametrize("count", [2, 4, 5, 12, 13])
def test_every_token_but_the_first_is_scored_once(count):
    text = "abcdefghijklm"[:count]
    rows = prose_rows(Document("x", text), codes, length=4)
    assert [code for row in rows for code in row.ids[row.start :]] == codes(text[1:])
    assert all(len(row.ids) == 5 for row in rows[:-1]) and 2 <= len(rows[-1].ids) <= 5


def test_a_single_token_makes_no_row():
    assert prose_rows(Document("x", "a"), codes, length=4) == []
    with pytest.raises(InputError, match="length=0"):
        prose_rows(Document("x", "ab"), codes, length=0)
