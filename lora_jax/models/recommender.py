"""A rating from a user's vector and an item's: biased matrix factorisation in Flax NNX.

Letters: B batch, U users, I items, D width. All that is known of a user stands in one row of one
table, so adapting that table's lookup adapts the user's taste and the user's level alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from lora_jax.errors import InputError
from lora_jax.models.layers import Embed, Linear
from lora_jax.models.network import Network


@dataclass(frozen=True)
class RecommenderConfig:
    """Sizes: how many users and items there are, and how wide their vectors."""

    users: int
    items: int
    width: int = 16

    def __post_init__(self) -> None:
        for name in ("users", "items", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"a recommender with {name}={getattr(self, name)}; give >= 1")


class Recommender(nnx.Module):
    """rating(u, i) = mean + p . q + p . v + q . w, p = users[u] and q = items[i].

    Koren, Bell and Volinsky (2009), eq. 4, with the biases of users and items read off their
    vectors: a column of the table would do the same with v a unit vector.
    """

    def __init__(self, config: RecommenderConfig, *, rngs: nnx.Rngs) -> None:
        self.users = Embed(config.users, config.width, rngs=rngs)
        self.items = Embed(config.items, config.width, rngs=rngs)
        self.user_bias = Linear(config.width, 1, bias=False, rngs=rngs)
        self.item_bias = Linear(config.width, 1, bias=False, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(self, users: jax.Array, items: jax.Array) -> jax.Array:
        """`users`, `items` [B] int -> ratings [B]."""
        p, q = self.users(users), self.items(items)
        biases = (self.user_bias(p) + self.item_bias(q))[:, 0]
        return jnp.sum(p * q, axis=-1) + biases + self.mean[...]


def initialise_recommender(config: RecommenderConfig, key: jax.Array) -> Network:
    """Make a recommender with fresh random tables: `apply(params, users, items) -> ratings`.

    `users` and `items` are [B] integers; others are an InputError, and so is a number beyond its
    table (under jit, where numbers are not known, its rating is nan).

    >>> network = initialise_recommender(RecommenderConfig(5, 7, width=3), jax.random.key(0))
    >>> network.apply(network.params, jnp.array([0, 4]), jnp.array([6, 1])).shape
    (2,)
    """
    model = nnx.eval_shape(lambda: Recommender(config, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(model)

    def apply(params: Mapping[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
        _check_shapes(users, items)
        _check_range("user", users, config.users)
        _check_range("item", items, config.items)
        return nnx.merge(graph, params)(users, items)

    @jax.jit
    def fresh(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Recommender(config, rngs=nnx.Rngs(key)), nnx.Param))

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    return Network(apply, fresh(key), config, inputs=(one, one))


def _check_shapes(users: jax.Array, items: jax.Array) -> None:
    shapes, dtypes = (users.shape, items.shape), (users.dtype, items.dtype)
    whole = all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes)
    if users.ndim != 1 or users.shape != items.shape or not whole:
        raise InputError(
            f"users {shapes[0]} {dtypes[0]} and items {shapes[1]} {dtypes[1]}; a recommender takes "
            "one integer number of each for every rating, both of shape [B]"
        )


def _check_range(name: str, numbers: jax.Array, count: int) -> None:
    if isinstance(numbers, Tracer) or not numbers.size:
        return
    lowest, highest = int(numbers.min()), int(numbers.max())
    if lowest < 0 or highest >= count:
        raise InputError(
            f"{name} {lowest if lowest < 0 else highest} is not in the table of {count} {name}s; "
            f"numbers go from 0 to {count - 1}"
        )
