r"""Plain text as documents, split so that no paragraph stands on two sides, and as token rows.

Python's own language reference lies in the standard library, `pydoc_data.topics`: what `help("if")`
prints, 79 topics and half a million characters, no download. It varies with the Python version.
A quarter of its text stands in several topics ("specialnames" holds "customization" whole), so a
split by topic alone would test on paragraphs that were trained on.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.data.batches import Encoded
from lora_jax.data.order import by_hash
from lora_jax.errors import InputError

PYDOC = "pydoc"
SECTION = 8_000  # characters of the sections that a single file is cut into


class Document(NamedTuple):
    """A named text."""

    name: str
    text: str


class Prose(NamedTuple):
    """Disjoint documents: fit on `train`, choose on `dev`, read `test` once."""

    train: tuple[Document, ...]
    dev: tuple[Document, ...]
    test: tuple[Document, ...]

    def sha256(self) -> str:
        """Hash every name and text of every split, in order, as 64 hexadecimal digits."""
        text = json.dumps([list(self.train), list(self.dev), list(self.test)], ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_prose(source: str | Path) -> list[Document]:
    """Read the documents of a source, in the order of their names.

    `source` is "pydoc" (the topics of Python's own documentation), a folder (each .txt, .md or
    .rst file below it is a document) or such a file, which is cut into sections of about SECTION
    characters. InputError for a source that is missing, holds no text or is not UTF-8.

    >>> [topic.name for topic in read_prose("pydoc")][:2]
    ['assert', 'assignment']
    """
    if str(source) == PYDOC:
        topics = importlib.import_module("pydoc_data.topics").topics
        return [Document(name, topics[name]) for name in sorted(topics)]
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md", ".rst"))
        found = [Document(str(file.relative_to(path)), _read(file)) for file in files]
    else:
        found = _sections(path.name, _read(path))
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise InputError(
            f"'{path}' holds no text; give a .txt file, or a folder of .txt, .md, .rst"
        )
    return documents


def split_prose(documents: Sequence[Document], *, dev: int, test: int, seed: int) -> Prose:
    r"""Draw `test`, then `dev` documents by sha256(seed, name); the rest is for training.

    A paragraph (what blank lines part, compared without its spacing) is kept once, in the first of
    test, dev, train that has it: no split holds a paragraph of another. Documents with none left
    are dropped. InputError when too few documents are there.

    >>> texts = ["one\n\ntwo", "two\n\nthree", "four"]
    >>> prose = split_prose([Document(t[:3], t) for t in texts], dev=1, test=1, seed=0)
    >>> prose.test[0].text, prose.dev[0].text, prose.train[0].text
    ('four', 'two\n\nthree', 'one')
    """
    if min(dev, test) < 1 or len(documents) <= dev + test:
        raise InputError(
            f"dev={dev} and test={test} of {len(documents)} documents; each split needs at least "
            "one, and training what is left"
        )
    ordered = sorted(documents, key=lambda document: by_hash(seed, document.name))
    seen: set[str] = set()
    parts = (ordered[:test], ordered[test : test + dev], ordered[test + dev :])
    held_out, chosen_on, fitted = (_unseen(part, seen) for part in parts)
    return Prose(fitted, chosen_on, held_out)


def prose_rows(
    document: Document, tokenize: Callable[[str], Sequence[int]], *, length: int
) -> list[Encoded]:
    """Cut a document into rows of `length` inputs; every token but the first is scored once.

    Rows overlap by one token, and the last may be shorter. A row sees nothing before its own
    first token.

    >>> prose_rows(Document("x", "abcde"), lambda text: [ord(c) for c in text], length=3)
    [Encoded(ids=(97, 98, 99, 100), start=1), Encoded(ids=(100, 101), start=1)]
    """
    if length < 1:
        raise InputError(f"rows of length={length} hold nothing; give at least 1")
    ids = tuple(tokenize(document.text))
    starts = range(0, len(ids) - 1, length)
    return [Encoded(ids[start : start + length + 1], 1) for start in starts]


def _unseen(documents: Iterable[Document], seen: set[str]) -> tuple[Document, ...]:
    """Drop the paragraphs in `seen`, and add those that are kept."""
    kept = []
    for name, text in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            kept.append(Document(name, "\n\n".join(paragraphs)))
    return tuple(kept)


def _sections(name: str, text: str) -> list[Document]:
    """Cut a text after blank lines, into parts of SECTION characters or a paragraph more."""
    parts, size = [[]], 0
    for paragraph in re.split(r"\n\s*\n", text):
        if size >= SECTION:
            parts.append([])
            size = 0
        parts[-1].append(paragraph)
        size += len(paragraph)
    return [Document(f"{name}:{n}", "\n\n".join(part)) for n, part in enumerate(parts)]


def _read(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"no text at '{file}'; give a file, a folder or '{PYDOC}'")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is not UTF-8 text: {error}") from error
