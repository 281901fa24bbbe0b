"""How sure a figure is whose examples come in groups: ratings of users, tokens of documents."""

from collections.abc import Callable

import numpy as np

from lora_jax.errors import InputError


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    *,
    draws: int = 4_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return a statistic of sums over all groups and its 95 % interval: value, low, high.

    `sums` [G, K] has a row for each group; `statistic` maps totals [..., K] to [...]. Whole groups
    are drawn again with replacement (Efron 1979; percentiles), so what the examples of one group
    have in common does not pass for evidence. A difference between two models is a statistic too,
    with a column for each. With few groups (below thirty or so) the interval is somewhat narrow.

    >>> errors = np.array([[4.0, 1.0], [1.0, 1.0], [1.0, 1.0]])  # squares, count: one row a user
    >>> bootstrap(lambda totals: np.sqrt(totals[..., 0] / totals[..., 1]), errors)
    (1.41..., 1.0, 2.0)
    """
    sums = np.asarray(sums, np.float64)
    if len(sums) < 2:
        raise InputError(
            f"an interval over {len(sums)} group of examples tells nothing; hold out at least 2 "
            "(users, documents)"
        )
    generator = np.random.Generator(np.random.Philox(seed))
    counts = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    low, high = np.percentile(statistic(counts @ sums), [2.5, 97.5])
    return float(statistic(sums.sum(axis=0))), float(low), float(high)


def group_sums(groups: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sum columns [N] by their group [N]: [G, K], groups in ascending order.

    >>> group_sums(np.array([7, 2, 7]), np.array([1.0, 2.0, 3.0]), np.ones(3)).tolist()
    [[2.0, 1.0], [4.0, 2.0]]
    """
    _, places = np.unique(groups, return_inverse=True)
    return np.stack([np.bincount(places, column) for column in columns], axis=1)
