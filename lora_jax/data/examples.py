"""Prompt and completion pairs, and their split by seed with duplicates kept on one side."""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.errors import InputError


class Example(NamedTuple):
    r"""One task: the model reads `prompt` and is trained to go on with `completion`.

    >>> Example("Review: dull\nSentiment:", " negative").completion
    ' negative'
    """

    prompt: str
    completion: str


class Splits(NamedTuple):
    """Three disjoint sets of examples: fit on `train`, choose on `dev`, read `test` once."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]

    def sha256(self) -> str:
        """Hash every text of every split, in order, as 64 hexadecimal digits.

        >>> len(Splits((Example("a", "b"),), (), ()).sha256())
        64
        """
        text = json.dumps([list(self.train), list(self.dev), list(self.test)], ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def normalise(text: str) -> str:
    """Reduce a text to its letters and digits: texts that read alike come out equal.

    >>> normalise("  It's GOOD -- really!") == normalise("its good really")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(c for c in folded if c.isalnum() or c.isspace())
    return " ".join(letters.split()) or folded.strip()


def split_examples(examples: Sequence[Example], *, dev: int, test: int, seed: int) -> Splits:
    """Shuffle by `seed` and split; examples whose prompts read alike never cross splits.

    The order is that of sha256(seed, normalised prompt), so it depends on no library's random
    stream and adding an example moves no other. `test` and `dev` take one example of each group of
    duplicates, `train` all of the remaining groups. InputError when too few groups are left for a
    training set.

    >>> examples = [Example(f"{n} plus one is", f" {n + 1}") for n in range(10)]
    >>> [len(part) for part in split_examples(examples, dev=2, test=3, seed=0)]
    [5, 2, 3]
    """
    groups = sorted(_groups(examples).items(), key=lambda item: _rank(seed, item[0]))
    if len(groups) <= dev + test:
        raise InputError(
            f"dev={dev} and test={test} leave nothing to train on: the data has {len(examples)} "
            f"examples with {len(groups)} distinct prompts; ask for fewer held-out examples"
        )
    members = [group for _, group in groups]
    held_out = tuple(group[0] for group in members[: test + dev])
    train = tuple(example for group in members[test + dev :] for example in group)
    return Splits(train, held_out[test:], held_out[:test])


def read_examples(path: str | Path) -> list[Example]:
    """Read your own task: JSON lines or CSV with a `prompt` and a `completion` column.

    The format follows the file's suffix (.jsonl, .csv); text is UTF-8. InputError names the file
    and the line that cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise InputError(
            f"cannot tell the format of the data file '{path}' from its suffix; "
            "expected .jsonl (one JSON object a line) or .csv"
        )
    if not path.is_file():
        raise InputError(f"no data file '{path}'; give one with config.data.source")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data file '{path}' is not UTF-8 text: {error}") from error
    examples = [_example(path, line, row) for line, row in readers[path.suffix](path, text)]
    if not examples:
        raise InputError(
            f"data file '{path}' has no examples; each row needs a 'prompt' and a 'completion'"
        )
    return examples


def _groups(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Gather the examples whose prompts are equal after `normalise`."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(normalise(example.prompt), []).append(example)
    return groups


def _rank(seed: int, key: str) -> bytes:
    """Place of a group in the shuffled order."""
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()


def _json_rows(path: Path, text: str) -> Iterable[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"data file '{path}', line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"data file '{path}', line {number} is not a JSON object: {line[:60]}")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"data file '{path}', line {reader.line_num}: {error}") from error


def _example(path: Path, line: int, row: Mapping[str, object]) -> Example:
    values = [row.get("prompt"), row.get("completion")]
    if not all(isinstance(value, str) for value in values) or not values[1]:
        columns = ", ".join(repr(name) for name in row) or "none"
        raise InputError(
            f"data file '{path}', line {line} needs a text 'prompt' and a non-empty text "
            f"'completion'; its columns: {columns}"
        )
    return Example(str(values[0]), str(values[1]))
