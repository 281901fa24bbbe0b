"""New users of a recommender, known by their first ratings: `config.task = "ratings"`.

A factorisation is pretrained on what everybody had rated before some users came; those start as the
mean user. What is adapted, as `config.targets` says (`users/embedding`: the lookup of a user's
vector), learns from their first ratings alone and is measured on all their later ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.settings import Settings, in_config
from experiments.tasks.factors import ModelSettings as ModelSettings
from experiments.tasks.factors import pretrain, squared_loss
from experiments.tasks.task import Measured, Task, check_positive, compiled, draw_rows
from lora_jax.data.ratings import (
    PACKAGE,
    SHA256,
    Arrivals,
    Batch,
    Ratings,
    item_and_user_means,
    read_ratings,
    split_arrivals,
)
from lora_jax.errors import InputError
from lora_jax.evaluate import Estimate
from lora_jax.evaluate.bootstrap import bootstrap, group_sums
from lora_jax.io.packages import fetch_package
from lora_jax.models.network import Network

MOVIELENS = "movielens"


@dataclass(frozen=True)
class Data:
    """Where the ratings lie, and who is new."""

    source: str = MOVIELENS
    """Or a tab-separated file with user_id, item_id, rating and timestamp."""
    dev: int = 100
    """New users whose later ratings settings are chosen on."""
    test: int = 200
    """New users whose later ratings are read once."""
    first: int = 10
    """Ratings of every new user to learn from."""
    shrink: float = 10.0
    """Of the baseline of means: ratings that a mean of none is worth."""

    def __post_init__(self) -> None:
        check_positive("data", self, "dev", "test", "first")
        if not self.shrink >= 0:
            raise InputError(f"config.data.shrink is {self.shrink}; give 0 or more ratings")


def make(settings: Settings) -> Task:
    """Read and split the ratings, and pretrain on those that came first."""
    parts = _read(settings.data, settings.seed)
    network = pretrain(parts.known, settings.model, settings.seed)
    held_out: Ratings = getattr(parts, settings.evaluate.split)
    means = item_and_user_means(parts.known, parts.first, settings.data.shrink)
    baseline = means(held_out.users, held_out.items) - held_out.values
    return Task(
        apply=network.apply,
        params=network.params,
        inputs=network.inputs,
        loss=squared_loss(network),
        batches=_batches(parts.first, settings.train.batch, settings.seed),
        measure=_make_measure(network, held_out),
        about=_about(parts, settings.evaluate.split, _error(held_out.users, baseline)),
        show=lambda before, after: _show(held_out.users, baseline, before, after),
    )


def _read(data: Data, seed: int) -> Arrivals:
    path = fetch_package(*PACKAGE, SHA256) if data.source == MOVIELENS else data.source
    ratings = read_ratings(path)
    with in_config("data: "):
        return split_arrivals(ratings, dev=data.dev, test=data.test, first=data.first, seed=seed)


def _batches(first: Ratings, size: int, seed: int) -> Callable[[int], Batch]:
    return lambda step: first.take(draw_rows(len(first), size, seed, step)).batch()


def _make_measure(network: Network, held_out: Ratings) -> Callable[[Any, Any], Measured]:
    predict = compiled(network.apply)

    def measure(frozen: Any, trained: Any) -> Measured:
        found = predict(frozen, trained, held_out.users, held_out.items)
        errors = np.asarray(found) - held_out.values
        return Measured(_error(held_out.users, errors), errors)

    return measure


def _error(users: np.ndarray, errors: np.ndarray) -> Estimate:
    """The root of the mean square of errors, its interval by drawing users again."""
    sums = group_sums(users, np.square(errors), np.ones(len(errors)))
    found = bootstrap(lambda totals: np.sqrt(totals[..., 0] / totals[..., 1]), sums)
    return Estimate("RMSE", *found, len(errors))


def _show(users: np.ndarray, baseline: np.ndarray, before: Measured, after: Measured | None) -> str:
    """Compare the two with each other and with the baseline, user by user."""
    if after is None:
        return ""
    pairs = {"before training": before.details, "item and user means": baseline}
    return "\n".join(
        f"  RMSE less that {name}: {_difference(users, after.details, errors)}"
        for name, errors in pairs.items()
    )


def _difference(users: np.ndarray, errors: np.ndarray, others: np.ndarray) -> str:
    sums = group_sums(users, np.square(errors), np.square(others), np.ones(len(errors)))

    def less(totals: np.ndarray) -> np.ndarray:
        ours, theirs = (np.sqrt(totals[..., k] / totals[..., 2]) for k in (0, 1))
        return ours - theirs

    value, low, high = bootstrap(less, sums)
    return f"{value:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, users drawn again)"


def _about(parts: Arrivals, split: str, baseline: Estimate) -> str:
    known, first, held_out = parts.known, parts.first, getattr(parts, split)
    users = len(np.unique(held_out.users))
    return (
        f"ratings: {len(known)} pretrained on; {len(first)} first ones of new users to learn from; "
        f"{split} on {len(held_out)} later ones of {users} of them; item and user means: {baseline}"
    )
