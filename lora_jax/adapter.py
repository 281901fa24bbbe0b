"""Split a parameter tree into frozen and trained parts, and put it together again."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.errors import InputError
from lora_jax.fused import rejoined
from lora_jax.method import Arrays, Method
from lora_jax.operands import lifted
from lora_jax.sites import Site, Sites
from lora_jax.tree import Rule

Chosen = Method | Sequence[Method | None]
Choice = Chosen | None
Trained = dict[str, dict[str, Any]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["frozen", "trained", "key"],
    meta_fields=["path", "methods", "site"],
)
@dataclass(frozen=True, eq=False)
class Adapted:
    """A parameter under a method: what stands in the tree in place of its array.

    `frozen` and `trained` are the method's dicts, every array with the site's stack axes in front;
    only the kernel `frozen["w"]` keeps the parameter's own layout. In a frozen tree `trained` is
    empty; `bind` fills it. `methods` is one Method, or one (or None) for each layer of the stack.
    """

    frozen: dict[str, Any]
    trained: dict[str, Any]
    key: Any
    path: str
    methods: Method | tuple[Method | None, ...]
    site: Site | None  # None under a method that may stand anywhere

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
        """The adapted parameter, formed: the method's definition, cast once to the base's dtype."""
        frozen, trained = self.matrices()
        if self.site is None:
            return self.method.weight(frozen, trained)
        weight = formed(self.method, self.site.stack, frozen, trained)
        return self.site.view.leaf(weight).astype(self.site.dtype)


def formed(method: Method, stack: Sequence[int], frozen: Arrays, trained: Arrays) -> jax.Array:
    """A method's definition over stack axes, the sum taken in float32 at least."""
    wide = {n: v.astype(_wide(v.dtype)) if n == "w" else v for n, v in frozen.items()}
    return lifted(method.weight, stack)(wide, trained)


def is_adapted(x: Any) -> bool:
    """Whether a node of a tree is an `Adapted` parameter."""
    return isinstance(x, Adapted)


def adapted(frozen: Any) -> dict[str, Adapted]:
    """The adapted parameters of a frozen or bound tree, by path."""
    leaves = tree.flatten(frozen, is_adapted)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Adapted)}


def attach(
    key: jax.Array, params: Any, rules: Mapping[Rule, Choice], sites: Sites
) -> tuple[Any, Trained]:
    """Split parameters into a frozen tree and the trained arrays of the methods that rules choose.

    `rules` maps a pattern (a regular expression that matches a whole path) or a predicate on Site
    to a method; the first match wins, None leaves the parameter alone, and a list gives one
    method (or None) to each layer of a stack. Returns `frozen`, the tree with `Adapted` nodes, and
    `trained`, a flat dict by path. Keys follow from paths, so adding a target changes no other.

    Raises InputError for a rule that settles nothing, for a parameter that is no kernel under a
    method that needs one, and for a list of the wrong length.

    >>> from lora_jax import find_sites, lora
    >>> params = {"q": jnp.ones((3, 5)), "k": jnp.ones((3, 4))}
    >>> sites = find_sites(lambda p, x: (x @ p["q"], x @ p["k"]), params, jnp.ones((2, 3)))
    >>> frozen, trained = attach(jax.random.key(0), params, {"q": lora(rank=2)}, sites)
    >>> jax.tree.map(jnp.shape, trained)
    {'q': {'a': (3, 2), 'b': (2, 5)}}
    """
    key = _typed(key)
    _check_params(params, sites)
    params = sites.taken_apart(params)
    leaves = tree.flatten(params)
    chosen = tree.first_match(rules, {path: sites.get(path) for path in leaves})
    nodes: dict[str, Any] = {}
    trained: Trained = {}
    for path, choice in chosen.items():
        if choice is None:
            continue
        node, trained[path] = _attach(key, path, leaves[path], choice, sites)
        nodes[path] = node
    return tree.replace(params, nodes), trained


def bind(frozen: Any, trained: Trained, key: jax.Array | None = None) -> Any:
    """The frozen tree with its trained parts in place, ready for `factored` or `materialised`.

    `key` draws the dropout of this call; without it nothing is dropped (evaluation). Raises
    InputError when `trained` belongs to other parameters.
    """
    key = None if key is None else _typed(key)
    nodes = adapted(frozen)
    if twice := [path for path, node in nodes.items() if node.trained]:
        raise InputError(
            f"'{twice[0]}' is bound already; bind takes the frozen tree that attach returned"
        )
    if set(nodes) != set(trained):
        missing, surplus = sorted(set(nodes) - set(trained)), sorted(set(trained) - set(nodes))
        raise InputError(
            f"trained does not belong to frozen: missing {missing}, surplus {surplus}; "
            "take both from one attach"
        )
    bound = {path: _bind(node, trained[path], key) for path, node in nodes.items()}
    return tree.replace(frozen, bound, is_adapted)


def check_bound(nodes: Mapping[str, Adapted]) -> None:
    """Raise InputError for adapted parameters without their trained part."""
    if loose := [path for path, node in nodes.items() if not node.trained]:
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
    base = [
        leaf.frozen.get("w") if isinstance(leaf, Adapted) else leaf
        for leaf in tree.flatten(frozen, is_adapted).values()
    ]
    ours = tree.count(trained)
    total = tree.count(base) + ours
    return (
        f"trainable params: {ours:,} || all params: {total:,} "
        f"|| trainable%: {100 * ours / max(total, 1):.4f}"
    )


def _attach(
    key: jax.Array, path: str, leaf: Any, choice: Chosen, sites: Sites
) -> tuple[Adapted, dict[str, Any]]:
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    site = sites.get(path)
    _check_dtype(path, getattr(leaf, "dtype", None), choice)
    if isinstance(choice, Method) and choice.anywhere:
        frozen, trained = choice.init(key, leaf)
        return Adapted(frozen, {}, None, path, choice, None), trained
    _check(path, choice, site, sites)
    assert site is not None
    keys = jax.random.split(key, site.stack)
    w = site.view.matrix(leaf)
    if isinstance(choice, Method):
        choice = choice.at(site) if choice.at else choice
        frozen, trained = lifted(_init(choice, site), site.stack)(keys, w)
        trained = _shared(choice, site, trained)
    else:
        frozen, trained = _attach_each(choice, site, keys, w)
        choice = tuple(choice)
    if "w" in frozen:
        same = frozen["w"] is w  # keep the caller's own array, not a copy of it
        frozen = frozen | {"w": leaf if same else site.view.leaf(frozen["w"])}
    return Adapted(frozen, {}, None, path, choice, site), trained


def _shared(method: Method, site: Site, trained: dict[str, Any]) -> dict[str, Any]:
    """With one array for all experts where the method says so; its axis stays, of size one."""
    axes = [i for i, kind in enumerate(site.stacks) if kind in ("experts", "batch")]
    if method.shared and not axes:
        raise InputError(
            f"{method!r} shares {', '.join(method.shared)} between the experts of '{site.path}', "
            "but it has none; share nothing there"
        )

    def first(array: jax.Array) -> jax.Array:
        for axis in axes:
            array = jax.lax.slice_in_dim(array, 0, 1, axis=axis)
        return array

    return {n: first(x) if n in method.shared else x for n, x in trained.items()}


def _check_params(params: Any, sites: Sites) -> None:
    """Raise InputError for parameters that are bound already, or that the sites do not know."""
    if bound := adapted(params):
        raise InputError(
            f"'{next(iter(bound))}' is adapted already; attach takes the base's parameters: merge "
            "first, or attach all rules in one call"
        )
    leaves = tree.flatten(params)
    for path, site in sites.items():
        if path in sites.parts:
            continue
        if path not in leaves:
            raise InputError(
                f"params has no '{path}', which the sites were found with; nearest: "
                f"{tree.nearest(path, leaves)}; find the sites of these parameters"
            )
        if tuple(leaves[path].shape) != site.view.shape:
            raise InputError(
                f"'{path}' has shape {tuple(leaves[path].shape)}, but {site.view.shape} when the "
                "sites were found; find the sites of these parameters"
            )


def _check_dtype(path: str, dtype: Any, choice: Any) -> None:
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        kind = "no array" if dtype is None else f"an array of {dtype}"
        raise InputError(
            f"'{path}' is {kind}, so {choice!r} cannot train it: only floating-point parameters "
            "have gradients; leave it out of the rules"
        )


def _check(path: str, choice: Any, site: Site | None, sites: Sites) -> None:
    methods = list(choice) if isinstance(choice, list | tuple) else [choice]
    for method in methods:
        if not isinstance(method, Method | None):
            raise InputError(
                f"the rule for '{path}' gives {method!r}, which is no method; give one such as "
                "lora(rank=8), or None to leave the parameter alone"
            )
    if site is None:
        used = ", ".join(sites.others.get(path, ()))
        if not used:
            raise InputError(
                f"'{path}' is never read by apply on the inputs that the sites were found with, so "
                f"{choice!r} has no matrix to adapt; find the sites with inputs (and flags) that "
                "use it, or leave it out of the rules"
            )
        raise InputError(
            f"'{path}' is no kernel (it is used by: {used}), so {choice!r} has no matrix to adapt; "
            "only full() can train it"
        )
    if not isinstance(choice, Method):
        _check_each(path, methods, site)


def _check_each(path: str, methods: list[Method | None], site: Site) -> None:
    layers = tree.count(jnp.empty(site.stack)) if site.stack else 0
    if len(methods) != layers:
        raise InputError(
            f"the rule for '{path}' lists {len(methods)} methods, but its stack has {layers} layers"
        )
    present = [method for method in methods if method is not None]
    if not present:
        raise InputError(f"the rule for '{path}' lists no method at all; give None instead")
    for method in present:
        if method.anywhere:
            raise InputError(
                f"the rule for '{path}' gives {method!r} to single layers; give it to the whole "
                "stack, or choose a method that adapts one matrix"
            )
        if not method.same_forward(present[0]) or _parts(method, site) != _parts(present[0], site):
            raise InputError(
                f"the layers of '{path}' mix {present[0]!r} and {method!r}; one stack takes one "
                "kind of method, whose layers differ in rank and alpha only"
            )


def _parts(method: Method, site: Site) -> Any:
    """The names of the arrays that a method freezes and trains."""
    w = jax.ShapeDtypeStruct((site.d_in, site.d_out), site.dtype)
    return jax.tree.structure(jax.eval_shape(_init(method, site), jax.random.key(0), w))


def _init(method: Method, site: Site) -> Any:
    return method.lookup_init if site.lookup and method.lookup_init else method.init


def _attach_each(
    methods: Sequence[Method | None], site: Site, keys: jax.Array, w: jax.Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One method a layer; layers with None keep a fresh, hence neutral, adapter in `frozen`."""
    lead = next(method for method in methods if method is not None)
    matrices = w.reshape(-1, *w.shape[-2:])
    pairs = [
        _init(method or lead, site)(k, m)
        for method, k, m in zip(methods, keys.reshape(-1), matrices, strict=True)
    ]
    frozen = _stacked([frozen for frozen, _ in pairs], site.stack)
    parts = {str(i): trained for i, (_, trained) in enumerate(pairs)}
    idle = {i: part for i, part in parts.items() if methods[int(i)] is None}
    return frozen | {"idle": idle}, {i: part for i, part in parts.items() if i not in idle}


def _bind(node: Adapted, trained: dict[str, Any], key: jax.Array | None) -> Any:
    if not isinstance(node.methods, Method):
        layers = node.frozen["idle"] | trained
        assert node.site is not None
        trained = _stacked([layers[str(i)] for i in range(len(layers))], node.site.stack)
    if node.site is None:
        return node.method.weight(node.frozen, trained)
    if key is not None:
        key = jax.random.fold_in(key, zlib.crc32(node.path.encode()))
        key = jax.random.split(key, node.site.stack)
    return replace(node, trained=trained, key=key)


def _stacked(layers: Sequence[dict[str, Any]], stack: tuple[int, ...]) -> dict[str, Any]:
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


def _typed(key: jax.Array) -> jax.Array:
    """A typed key; the older uint32 pairs are wrapped."""
    if not hasattr(key, "dtype"):
        raise InputError(f"key is {key!r}; give a random key such as jax.random.key(0)")
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
