"""The names of the combinations, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.compose.tensors import Recipe
from lora_jax.errors import InputError

_RECIPES = {
    "linear": Recipe(),
    "magnitude_prune": Recipe(prune="magnitude"),
    "dare_linear": Recipe(prune="random"),
    "ties": Recipe(prune="magnitude", vote="total"),
    "dare_ties": Recipe(prune="random", vote="total"),
}
METHODS = ("cat", "svd", *_RECIPES, *(f"{name}_svd" for name in _RECIPES if name != "linear"))


def recipe_of(
    method: str, density: float | None, sign: str, scope: str, key: jax.Array | None
) -> Recipe:
    """What a method's name means; InputError for names and numbers that mean nothing."""
    for what, value, names in (
        ("method", method, METHODS),
        ("sign", sign, ("total", "frequency")),
        ("scope", scope, ("tensor", "global")),
    ):
        if value not in names:
            raise InputError(f"weighted_sum({what}={value!r}): give one of {', '.join(names)}")
    recipe = _RECIPES.get(method.removesuffix("_svd"), Recipe())
    if not recipe.prune:
        return recipe
    if density is None or not density >= 0:
        raise InputError(
            f"weighted_sum(method={method!r}, density={density!r}): it keeps this part of the "
            "entries; give 0 .. 1"
        )
    if density >= 1:
        warnings.warn(f"density={density} keeps every entry: nothing is pruned", stacklevel=3)
    if recipe.prune == "random" and density < 1 and key is None:
        raise InputError(f"weighted_sum(method={method!r}) drops entries at random; give key=")
    return recipe._replace(vote=sign if recipe.vote else "", density=float(density))


def check(adapters: Sequence[Any], weights: Sequence[float], rank: int | None) -> None:
    """Raise InputError for lists and numbers that mean nothing."""
    if not adapters or len(adapters) != len(weights):
        raise InputError(
            f"weighted_sum: {len(adapters)} adapters and {len(weights)} weights; give one weight "
            "to each of at least one adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weighted_sum(weights={list(weights)}): every weight is a finite number")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"weighted_sum(rank={rank!r}): the rank is a positive integer; give >= 1")
