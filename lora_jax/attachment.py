"""Split a parameter tree into frozen and trained parts, by rules."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, stacked, start_of, typed
from lora_jax.errors import InputError
from lora_jax.method import Method, identity
from lora_jax.operands import lifted
from lora_jax.sites import Site, Sites
from lora_jax.tree import Rule

Chosen = Method | Sequence[Method | None]
Choice = Chosen | None


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
    return _attached(typed(key), params, rules, sites, bare=False)


def skeleton(params: Any, rules: Mapping[Rule, Choice], sites: Sites) -> tuple[Any, Trained]:
    """What `attach` gives, as shapes alone: nothing is computed, no data asked for."""

    def shapes(params: Any) -> tuple[Any, Trained]:
        return _attached(jax.random.key(0), params, rules, sites, bare=True)

    return jax.eval_shape(shapes, params)


def _attached(
    key: jax.Array, params: Any, rules: Mapping[Rule, Choice], sites: Sites, bare: bool
) -> tuple[Any, Trained]:
    _check_params(params, sites)
    params = sites.taken_apart(params)
    leaves = tree.flatten(params)
    chosen = tree.first_match(rules, {path: sites.get(path) for path in leaves})
    choices = {
        path: _checked(path, leaves[path], choice, sites)
        for path, choice in chosen.items()
        if choice is not None
    }
    pools = _pools(key, choices, leaves, sites)
    nodes: dict[str, Any] = {}
    trained: Trained = {}
    for path, choice in choices.items():
        folded = jax.random.fold_in(key, zlib.crc32(path.encode()))
        pool = pools.get(path)
        node, own = _attach(folded, path, leaves[path], choice, sites.get(path), pool, bare)
        if pool:
            held = pool.frozen if path == pool.first else {}
            node = replace(node, pool=pool.name, common=held)
            trained |= {pool.name: pool.trained} if pool.trained else {}
        if isinstance(choice, Method) and choice.follows:
            _check_leader(path, choice, choices)
            node = replace(node, pool=choice.follows)
        _check_finite(node, own)
        nodes[path], trained[path] = node, own
    return tree.replace(params, nodes), trained


class _Pool(NamedTuple):
    """Parameters under equal methods that have arrays in common."""

    name: str
    first: str
    frozen: dict[str, Any]
    trained: dict[str, Any]


def _pools(
    key: jax.Array, choices: Mapping[str, Chosen], leaves: Mapping[str, Any], sites: Sites
) -> dict[str, _Pool]:
    """The pool of every path whose method has arrays in common with others of the same `common`."""
    members: dict[Any, list[tuple[str, Method]]] = {}
    for path, choice in choices.items():
        if method := _sharing(path, choice):
            maker = _owner(method).name, identity(method.common)
            members.setdefault(maker, []).append((path, method))
    pools: dict[str, _Pool] = {}
    firsts: dict[str, list[_Pool]] = {}
    for (owner, _), found in members.items():
        before = firsts.setdefault(f"shared/{owner}", [])
        name = f"shared/{owner}" + (f":{len(before) + 1}" if before else "")
        shapes = {path: _matrix(leaves[path], sites.get(path), method) for path, method in found}
        folded = jax.random.fold_in(key, zlib.crc32(name.encode()))
        first, method = found[0]
        assert method.common is not None
        pool = _Pool(name, first, *method.common(folded, shapes))
        if before and pool.frozen:
            raise InputError(
                f"{method!r} for '{first}' and another {owner} for '{before[0].first}' would "
                "freeze two sets of common arrays, but one attach has one; give both what makes "
                "the same (rank, seed)"
            )
        before.append(pool)
        pools |= dict.fromkeys((path for path, _ in found), pool)
    return pools


def _owner(method: Method) -> Method:
    """The method whose `common` it is, under what wraps it (`quantized`)."""
    inside = method.hyper.get("method")
    if isinstance(inside, Method) and inside.common is method.common:
        return _owner(inside)
    return method


def _sharing(path: str, choice: Chosen) -> Method | None:
    """The one method of a choice that has arrays in common with others, if any."""
    each = [choice] if isinstance(choice, Method) else choice
    found = {method for method in each if method and method.common}
    if len(found) > 1:
        raise InputError(
            f"the layers of '{path}' share arrays in two ways, {found}; one stack takes one"
        )
    return next(iter(found), None)


def _matrix(leaf: Any, site: Site | None, method: Method) -> jax.ShapeDtypeStruct:
    """The shape that a method sees a parameter in."""
    if site is None or method.anywhere:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct((site.d_in, site.d_out), leaf.dtype)


def _checked(path: str, leaf: Any, choice: Chosen, sites: Sites) -> Chosen:
    """A choice that can stand at its path: a method for this very site, or one a layer."""
    _check_dtype(path, getattr(leaf, "dtype", None), choice)
    if isinstance(choice, Method) and choice.anywhere:
        return choice
    site = sites.get(path)
    _check(path, choice, site, sites)
    assert site is not None
    if isinstance(choice, Method):
        return choice.at(site) if choice.at else choice
    return tuple(method.at(site) if method and method.at else method for method in choice)


def _attach(
    key: jax.Array,
    path: str,
    leaf: Any,
    choice: Chosen,
    site: Site | None,
    pool: _Pool | None,
    bare: bool,
) -> tuple[Adapted, dict[str, Any]]:
    if isinstance(choice, Method) and choice.anywhere:
        frozen, trained = choice.init(key, leaf)
        return Adapted(frozen, {}, None, path, choice, None, leaf.dtype), trained
    assert site is not None
    keys = jax.random.split(key, site.stack)
    w = site.view.matrix(leaf)
    if isinstance(choice, Method):
        data = _data(choice, path, bare)
        frozen, trained = lifted(start_of(choice, site), site.stack)(keys, w, *data)
        trained = _shared(choice, site, trained)
    else:
        _check_each(path, list(choice), site, pool)
        frozen, trained = _attach_each(choice, site, keys, w, pool, bare)
    if "w" in frozen:
        same = frozen["w"] is w  # keep the caller's own array, not a copy of it
        frozen = frozen | {"w": leaf if same else site.view.leaf(frozen["w"])}
    methods = choice if isinstance(choice, Method) else tuple(choice)
    return Adapted(frozen, {}, None, path, methods, site, site.dtype), trained


def _data(method: Method, path: str, bare: bool) -> tuple[Any, ...]:
    """What a method starts from besides the kernel."""
    if method.data is None or bare:
        return ()
    if path not in method.data:
        known = ", ".join(sorted(method.data)) or "nothing"
        raise InputError(
            f"{method!r} starts '{path}' from data, and was given {known}; gather it for this path"
        )
    return (method.data[path],)


def _check_leader(path: str, method: Method, choices: Mapping[str, Chosen]) -> None:
    """Raise InputError where the parameter that another one follows has no one method."""
    leader = choices.get(method.follows)
    if not isinstance(leader, Method) or leader.follows:
        raise InputError(
            f"'{path}' is under {method!r}, so '{method.follows}' needs one method for all its "
            f"layers, but has {leader!r}; adapt it in the same attach, or drop the rule"
        )


def _check_finite(node: Adapted, trained: dict[str, Any]) -> None:
    """Raise InputError where a method that reads its kernel (by an SVD, say) found no numbers."""
    if node.method.rebuild is None and node.method.data is None:
        return
    held = {name: x for name, x in node.frozen.items() if name != "w"}
    for x in jax.tree.leaves((held, trained)):
        if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
            raise InputError(
                f"{node.method!r} starts '{node.path}' from its own values, and these give numbers "
                "that are not finite; look for nan or inf in the kernel or in the data"
            )


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


def _check_each(path: str, methods: list[Method | None], site: Site, pool: _Pool | None) -> None:
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
        same = method.forward == present[0].forward
        parts = _parts(method, site, pool), _parts(present[0], site, pool)
        if not same or parts[0] != parts[1]:
            arrays = " and ".join(", ".join(trained) for _, trained in parts[::-1])
            why = f" (these train {arrays})" if same else ""
            raise InputError(
                f"the layers of '{path}' mix {present[0]!r} and {method!r}; one stack takes one "
                f"kind of method, whose layers differ in rank and alpha only{why}"
            )


def _idle(
    method: Method, site: Site, w: jax.Array, frozen: dict[str, Any], trained: dict[str, Any]
) -> dict[str, Any]:
    """Trained arrays under which a layer that is left alone keeps its kernel: fresh, or zero."""
    definition = method.weight
    if method.common is not None or definition is None or isinstance(w, jax.core.Tracer):
        return trained
    for arrays in (trained, jax.tree.map(jnp.zeros_like, trained)):
        if jnp.allclose(definition(frozen, arrays), w, atol=1e-5):
            return arrays
    raise InputError(
        f"the rule for '{site.path}' gives None to a layer beside {method!r}, which changes a "
        "kernel from the start; give every layer of the stack a method"
    )


def _parts(method: Method, site: Site, pool: _Pool | None) -> Any:
    """The names of the arrays that a method freezes and trains."""
    w = jax.ShapeDtypeStruct((site.d_in, site.d_out), site.dtype)
    frozen, trained = jax.eval_shape(start_of(method, site), jax.random.key(0), w)
    common = pool.trained if pool and method.common else {}
    return sorted(frozen), sorted({**trained, **common})


def _attach_each(
    methods: Sequence[Method | None],
    site: Site,
    keys: jax.Array,
    w: jax.Array,
    pool: _Pool | None,
    bare: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One method a layer; layers with None keep a fresh, hence neutral, adapter in `frozen`."""
    sharing = pool is not None and bool(pool.trained)
    own = [method for method in methods if method and not (sharing and method.common)]
    if None in methods and not own:
        raise InputError(
            f"'{site.path}' shares one adapter in some layers and has none in others; adapt all "
            "of them, or one with an adapter of its own"
        )
    matrices = w.reshape(-1, *w.shape[-2:])
    pairs = []
    for i, (method, k) in enumerate(zip(methods, keys.reshape(-1), strict=True)):
        method = method or own[0]
        data = [
            x.reshape(-1, *x.shape[len(site.stack) :])[i] for x in _data(method, site.path, bare)
        ]
        frozen, trained = start_of(method, site)(k, matrices[i], *data)
        if methods[i] is None:
            trained = _idle(method, site, matrices[i], frozen, trained)
        pairs.append((frozen, trained))
    frozen = stacked([frozen for frozen, _ in pairs], site.stack)
    parts = {str(i): trained for i, (_, trained) in enumerate(pairs)}
    idle = {i: part for i, part in parts.items() if methods[int(i)] is None}
    return frozen | {"idle": idle}, {i: part for i, part in parts.items() if i not in idle}
