"""Short texts as sequences of characters, each a row that begins and ends with the same symbol.

The texts are those of `lora_jax.data.domains`: film reviews, tweets, product reviews, editorials.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.data.domains import DOMAINS
from lora_jax.data.order import by_hash
from lora_jax.data.reviews import rated_texts
from lora_jax.errors import InputError

END, UNKNOWN = 0, 1
_FIRST, _LAST = " ", "~"
VOCABULARY = ord(_LAST) - ord(_FIRST) + 3
"""END, UNKNOWN and the 95 characters of ASCII that print."""


class Texts(NamedTuple):
    """Disjoint texts: fit on `train`, choose on `dev`, read `test` once."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]


def read_texts(sdist: str | Path, domains: Sequence[str]) -> list[str]:
    """Read all sentences of some domains, rated or not, each once, in the order of the files.

    `sdist` is the vaderSentiment 3.3.2 source archive. movie has 10,603 sentences (1.2 million
    characters), tweets 4,200 (0.33), amazon 3,697 (0.33), nyt 5,119 (0.54). InputError for an
    unknown domain, or an archive that cannot be read.
    """
    if strange := [domain for domain in domains if domain not in DOMAINS]:
        raise InputError(f"no domain {strange[0]!r}; there are {', '.join(DOMAINS)}")
    rows = (text for name in domains for _, text in rated_texts(sdist, DOMAINS[name]))
    return list(dict.fromkeys(rows))


def split_texts(texts: Sequence[str], *, dev: int, test: int, seed: int) -> Texts:
    """Draw `test`, then `dev` texts by sha256(seed, text); the rest is for training.

    >>> [len(part) for part in split_texts(["a", "b", "c", "d"], dev=1, test=2, seed=0)]
    [1, 1, 2]
    """
    if min(dev, test) < 1 or len(texts) <= dev + test:
        raise InputError(
            f"dev={dev} and test={test} of {len(texts)} texts; each split needs at least one, and "
            "training what is left"
        )
    ordered = sorted(dict.fromkeys(texts), key=lambda text: by_hash(seed, text))
    return Texts(
        tuple(ordered[dev + test :]), tuple(ordered[test : dev + test]), tuple(ordered[:test])
    )


def encode_text(text: str) -> list[int]:
    """One id a character; what is not printable ASCII is UNKNOWN.

    >>> encode_text("a ~é")
    [67, 2, 96, 1]
    """
    return [
        ord(character) - ord(_FIRST) + 2 if _FIRST <= character <= _LAST else UNKNOWN
        for character in text
    ]


def character_rows(texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Rows [N, length]: `ids` the symbols read, `targets` those to foretell, `mask` where they are.

    A row reads END and the text, and is to foretell the text and END. What is longer than `length`
    is cut; the rest of a shorter row is END and masked.

    >>> rows = character_rows(["ab", "abcd"], 3)
    >>> rows["ids"].tolist(), rows["targets"].tolist(), int(rows["mask"].sum())
    ([[0, 67, 68], [0, 67, 68]], [[67, 68, 0], [67, 68, 69]], 6)
    """
    if length < 1:
        raise InputError(f"rows of length={length} hold nothing; give at least 1")
    symbols = np.full((len(texts), length + 1), END, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        whole = [END, *encode_text(text), END][: length + 1]
        symbols[row, : len(whole)] = whole
        mask[row, : len(whole) - 1] = True
    return {"ids": symbols[:, :-1], "targets": symbols[:, 1:], "mask": mask}
