"""A parameter kept as named parts along one axis, so that each part can be adapted on its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Fused:
    """Parts that stand side by side along `axis` of the parameter that a model sees.

    >>> Fused({"q": jnp.ones((3, 4)), "k": jnp.ones((3, 2))}, axis=1).whole().shape
    (3, 6)
    """

    parts: Mapping[str, Any]
    axis: int

    def whole(self) -> jax.Array:
        """The parameter in one piece."""
        return jnp.concatenate([rejoined(part) for part in self.parts.values()], self.axis)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """The parts by name."""
        return [(DictKey(k), v) for k, v in self.parts.items()], (tuple(self.parts), self.axis)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Iterable[Any]) -> Fused:
        """The inverse of flattening."""
        names, axis = aux
        return cls(dict(zip(names, children, strict=True)), axis)


def is_fused(x: Any) -> bool:
    """Whether a node of a tree is a `Fused` parameter."""
    return isinstance(x, Fused)


def rejoined(tree: Any) -> Any:
    """The tree with every `Fused` node in one piece."""
    return jax.tree.map(lambda x: x.whole() if is_fused(x) else x, tree, is_leaf=is_fused)
