"""Parameters under a method: bind their trained parts, form them, merge them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.errors import InputError
from lora_jax.fused import rejoined
from lora_jax.method import Arrays, Method
from lora_jax.operands import lifted
from lora_jax.sites import Site

Trained = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Adapted:
    """A parameter under a method: what stands in the tree in place of its array.

    `frozen` and `trained` are the method's dicts, every array with the site's stack axes in front;
    only the kernel `frozen["w"]` keeps the parameter's own layout. In a frozen tree `trained` is
    empty; `bind` fills it. `methods` is one Method, or one (or None) for each layer of the stack.
    Parameters of one `pool` have arrays in common; the first one holds those that are frozen, as
    `common`, and `bind` hands them to all.

    As a node of a tree it compares by what a compiled program depends on, so adapters that differ
    in alpha or in how they started share one.
    """

    frozen: dict[str, Any]
    trained: dict[str, Any]
    key: Any
    path: str
    methods: Method | tuple[Method | None, ...]
    site: Site | None  # None under a method that may stand anywhere
    dtype: Any  # the parameter's own
    common: dict[str, Any] = field(default_factory=dict)
    pool: str = ""
    bound: bool = False

    @property
    def method(self) -> Method:
        """The method whose functions run, the first one where layers differ."""
        if isinstance(self.methods, Method):
            return self.methods
        return next(method for method in self.methods if method is not None)

    def __jax_array__(self) -> jax.Array:
        raise InputError(
            f"'{self.path}' is adapted, so it is no plain array here; run the model's function "
            "through lora_jax.factored (or materialised), or merge first"
        )

    __array__ = __rmatmul__ = __matmul__ = lambda self, *_: self.__jax_array__()

    def matrices(self) -> tuple[Arrays, Arrays]:
        """`frozen` and `trained` with the kernel as `[*stack, d_in, d_out]`."""
        frozen = {name: value for name, value in self.frozen.items() if name != "idle"}
        if self.site is not None and "w" in frozen:
            frozen["w"] = self.site.view.matrix(frozen["w"])
        return frozen, self.trained

    def weight(self) -> jax.Array:
        """The adapted parameter, formed: the method's definition, cast once to the base's dtype.

        Raises InputError for a method that has no matrix.
        """
        if self.method.weight is None:
            raise InputError(
                f"'{self.path}' is adapted by {self.method!r}, which is no change of its matrix "
                "and cannot be formed or merged; run the model through lora_jax.factored"
            )
        frozen, trained = self.matrices()
        if self.site is None:
            return self.method.weight(frozen, trained).astype(self.dtype)
        weight = formed(self.method, self.site.stack, frozen, trained)
        return self.site.view.leaf(weight).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class _Static:
    """What a tree's structure knows of an `Adapted` node."""

    path: str
    methods: Any
    site: Site | None
    dtype: Any
    pool: str
    bound: bool

    def _key(self) -> Any:
        one = isinstance(self.methods, Method)
        each = (self.methods,) if one else self.methods
        forward = tuple(method and method.forward for method in each)
        return self.path, one, forward, self.site, self.dtype, self.pool, self.bound

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


_ARRAYS = ("frozen", "trained", "key", "common")


def _flatten(node: Adapted) -> tuple[list[Any], _Static]:
    arrays = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in _ARRAYS]
    static = node.path, node.methods, node.site, node.dtype, node.pool, node.bound
    return arrays, _Static(*static)


def _unflatten(at: _Static, arrays: Iterable[Any]) -> Adapted:
    frozen, trained, key, common = arrays
    rest = at.path, at.methods, at.site, at.dtype
    return Adapted(frozen, trained, key, *rest, common=common, pool=at.pool, bound=at.bound)


jax.tree_util.register_pytree_with_keys(Adapted, _flatten, _unflatten)


def formed(method: Method, stack: Sequence[int], frozen: Arrays, trained: Arrays) -> jax.Array:
    """A method's definition over stack axes, the sum taken in float32 at least."""
    assert method.weight is not None
    wide = {n: v.astype(_wide(v.dtype)) if n == "w" else v for n, v in frozen.items()}
    return lifted(method.weight, stack)(wide, trained)


def is_adapted(x: Any) -> bool:
    """Whether a node of a tree is an `Adapted` parameter."""
    return isinstance(x, Adapted)


def adapted(frozen: Any) -> dict[str, Adapted]:
    """The adapted parameters of a frozen or bound tree, by path."""
    leaves = tree.flatten(frozen, is_adapted)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Adapted)}


def bind(frozen: Any, trained: Trained, key: jax.Array | None = None) -> Any:
    """The frozen tree with its trained parts in place, ready for `factored` or `materialised`.

    `key` draws the dropout of this call; without it nothing is dropped (evaluation). Raises
    InputError when `trained` belongs to other parameters.
    """
    key = None if key is None else typed(key)
    nodes = adapted(frozen)
    if twice := [path for path, node in nodes.items() if node.bound]:
        raise InputError(
            f"'{twice[0]}' is bound already; bind takes the frozen tree that attach returned"
        )
    pools = {node.pool for node in nodes.values() if node.pool}
    expected = set(nodes) | (pools & set(trained))
    if expected != set(trained):
        missing, surplus = sorted(expected - set(trained)), sorted(set(trained) - expected)
        raise InputError(
            f"trained does not belong to frozen: missing {missing}, surplus {surplus}; "
            "take both from one attach"
        )
    held = {node.pool: node.common for node in nodes.values() if node.common}
    bound = {
        path: _bind(node, trained[path], key, held.get(node.pool, {}), trained.get(node.pool, {}))
        for path, node in nodes.items()
    }
    return tree.replace(frozen, bound, is_adapted)


def check_bound(nodes: Mapping[str, Adapted]) -> None:
    """Raise InputError for adapted parameters without their trained part."""
    if loose := [path for path, node in nodes.items() if not node.bound]:
        raise InputError(
            f"'{loose[0]}' is not bound: give lora_jax.bind(frozen, trained), not frozen alone"
        )


def merge(frozen: Any, trained: Trained) -> Any:
    """Plain parameters with every adapted kernel formed: no cost at inference.

    The sum is taken in float32 at least and cast once to the base's dtype. Nothing is mutated, so
    the base needs no unmerging.
    """
    return dissolve(bind(frozen, trained))


def dissolve(params: Any) -> Any:
    """A bound tree with every `Adapted` node replaced by the array that it stands for."""
    weights = {path: node.weight() for path, node in adapted(params).items()}
    return rejoined(tree.replace(params, weights, is_adapted))


def summary(frozen: Any, trained: Trained) -> str:
    """`trainable params: X || all params: Y || trainable%: Z`, as PEFT prints it."""
    leaves = tree.flatten(frozen, is_adapted).values()
    base = sum(_kernel_size(x) if isinstance(x, Adapted) else tree.count(x) for x in leaves)
    ours = tree.count(trained)
    total = base + ours
    return (
        f"trainable params: {ours:,} || all params: {total:,} "
        f"|| trainable%: {100 * ours / max(total, 1):.4f}"
    )


def _kernel_size(node: Adapted) -> int:
    """How many numbers of the base a node stands for, packed ones too; none where they train."""
    if node.site is None:
        return tree.count(node.frozen.get("w"))
    return math.prod(node.site.view.shape)


def start_of(method: Method, site: Site) -> Any:
    """The method's initialisation at a site."""
    return method.lookup_init if site.lookup and method.lookup_init else method.init


def _bind(
    node: Adapted, trained: dict[str, Any], key: jax.Array | None, held: Arrays, common: Arrays
) -> Any:
    """A node with its trained part, and what its pool holds frozen and trained."""
    if node.site is None:
        whole = replace(node, frozen=node.frozen | held, trained=trained | common)
        return whole.weight()
    stack = node.site.stack
    if isinstance(node.methods, Method):
        trained = trained | _for_all(common, stack)
    else:
        own = node.frozen["idle"] | trained
        layers = [
            own.get(str(i), {}) | (common if method and method.common else {})
            for i, method in enumerate(node.methods)
        ]
        trained = stacked(layers, stack)
    if key is not None:
        key = jax.random.fold_in(key, zlib.crc32(node.path.encode()))
        key = jax.random.split(key, stack)
    frozen = node.frozen | _for_all(held, stack)
    return replace(node, frozen=frozen, trained=trained, key=key, common={}, bound=True)


def _for_all(arrays: Arrays, stack: Sequence[int]) -> Arrays:
    """Arrays that every matrix of a stack has, with stack axes of size one."""
    return {name: x.reshape(*(1 for _ in stack), *x.shape) for name, x in arrays.items()}


def stacked(layers: Sequence[dict[str, Any]], stack: tuple[int, ...]) -> dict[str, Any]:
    """Arrays of unequal rank as one stack: zeros added to both factors add nothing to a product."""

    def pad(*arrays: jax.Array) -> jax.Array:
        shape = [max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True)]
        padded = [
            jax.lax.pad(
                a,
                jnp.zeros((), a.dtype),
                [(0, n - m, 0) for n, m in zip(shape, a.shape, strict=True)],
            )
            for a in arrays
        ]
        return jnp.stack(padded).reshape(*stack, *shape)

    return jax.tree.map(pad, *layers)


def typed(key: jax.Array) -> jax.Array:
    """A typed key; the older uint32 pairs are wrapped."""
    if not hasattr(key, "dtype"):
        raise InputError(f"key is {key!r}; give a random key such as jax.random.key(0)")
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
