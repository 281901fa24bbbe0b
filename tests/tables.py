"""Tables of cases, of which the default suite takes the usual ones and the slow suite the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(rows: Iterable[Any], usual: Collection[Any]) -> list[Any]:
    """The rows as parameters; those that are not among the `usual` are slow."""
    return [pytest.param(row, marks=() if row in usual else pytest.mark.slow) for row in rows]
