"""Movie-review snippets with the mean rating of twenty readers, from the vaderSentiment sdist.

Source: C. Hutto and E. Gilbert, "VADER", ICWSM 2014; the ratings ship as `additional_resources/
hutto_ICWSM_2014.tar.gz` inside the source package. The archive is opened in memory: nothing is
unpacked on disk and no code of the package runs.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lora_jax.data.examples import Example
from lora_jax.errors import InputError

PACKAGE = ("vaderSentiment", "3.3.2")
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
PROMPT = "Review: {text}\nSentiment:"
POSITIVE, NEGATIVE = " positive", " negative"

_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_TABLE = "movieReviewSnippets_GroundTruth.txt"
_GARBLED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)


def read_reviews(sdist: str | Path, *, threshold: float = 0.5) -> list[Example]:
    """Read the snippets rated beyond +-`threshold` as prompts with " positive" or " negative".

    `sdist` is the vaderSentiment 3.3.2 source archive. Ratings lie in [-4, 4]; about 10,000 of
    10,605 snippets pass 0.5, half of each kind, in the order of the file: the first half is nearly
    all positive, so split them with `split_examples`, which shuffles. InputError when the archive
    or its table is missing, empty or garbled.
    """
    examples = []
    for rating, text in rated_texts(sdist, _TABLE):
        if abs(rating) > threshold:
            examples.append(Example(PROMPT.format(text=text), POSITIVE if rating > 0 else NEGATIVE))
    if not examples:
        raise InputError(
            f"no review in '{sdist}' is rated beyond +-{threshold}; lower the threshold"
        )
    return examples


def rated_texts(sdist: str | Path, table: str) -> Iterator[tuple[float, str]]:
    """Give the mean rating in [-4, 4] and the text of each row of one table of the archive.

    InputError when the archive or the table is missing or garbled.
    """
    sdist = Path(sdist)
    try:
        with tarfile.open(sdist) as outer:
            inner = _member(outer, _ARCHIVE, sdist)
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                rows = _member(archive, table, sdist).decode("utf-8")
    except _GARBLED as error:
        raise InputError(
            f"'{sdist}' is not a readable vaderSentiment source archive ({error}); delete it and "
            "let it be fetched again"
        ) from error
    return _rows(rows, f"{table} in '{sdist}'")


def _member(archive: tarfile.TarFile, name: str, sdist: Path) -> bytes:
    """Read the one regular file of the archive whose last path component is `name`."""
    for entry in archive:
        if entry.isfile() and entry.name.rsplit("/", 1)[-1] == name:
            stream = archive.extractfile(entry)
            if stream is not None:
                return stream.read()
    raise InputError(f"'{sdist}' holds no '{name}'; expected {PACKAGE[0]} {PACKAGE[1]}")


def _rows(table: str, where: str) -> Iterator[tuple[float, str]]:
    """Parse lines of id, mean rating, text, separated by tabs."""
    for number, line in enumerate(table.split("\n"), 1):
        if not line.strip():
            continue
        try:
            _, rating, text = line.rstrip("\r").split("\t", 2)
            yield float(rating), text.strip()
        except ValueError as error:
            raise InputError(
                f"{where}, line {number} is not 'id<TAB>rating<TAB>text': {line[:60]!r}"
            ) from error
