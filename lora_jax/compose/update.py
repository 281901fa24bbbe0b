"""What an adapter does to each kernel, beside the base that it stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, bind, formed, is_adapted, start_of
from lora_jax.errors import InputError
from lora_jax.fused import Fused, is_fused
from lora_jax.method import Method
from lora_jax.methods import full, lora
from lora_jax.operands import lifted

Pair = tuple[Any, Trained]


class Factors(NamedTuple):
    """An update `scale a b`, every array with the stack axes in front."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    @property
    def rank(self) -> int:
        """The width of the factors."""
        return self.a.shape[-1]


def kernels(frozen: Any, trained: Trained) -> dict[str, Adapted]:
    """The adapted kernels by path, bound; those that nothing trains are left out."""
    bound = adapted(bind(frozen, trained))
    return {path: node for path, node in bound.items() if jax.tree.leaves(node.trained)}


def wholes(frozen: Any, trained: Trained) -> dict[str, tuple[Adapted, jax.Array]]:
    """The parameters that are adapted in their own shape, not as kernels, and their values now."""
    nodes = {path: node for path, node in adapted(frozen).items() if node.site is None}
    values = tree.flatten(bind(frozen, trained), is_adapted) if nodes else {}
    return {path: (node, values[path]) for path, node in nodes.items()}


def factors(node: Adapted) -> Factors | None:
    """The update as a product, None for a method that has no such form.

    The factors are a plain LoRA's own, beside its scale; another method's product has scale one.
    """
    product, site = node.method.factors, node.site
    if product is None or site is None:
        return None
    frozen, trained = node.matrices()
    a, b = lifted(product, site.stack)(frozen, trained)
    arrays = frozen | trained
    plain = set(trained) <= {"a", "b"} and {"a", "b", "scale"} <= set(arrays)
    if plain and arrays["a"].shape[-1] == a.shape[-1]:
        own = jnp.broadcast_to(arrays["a"], a.shape), jnp.broadcast_to(arrays["b"], b.shape)
        return Factors(*own, jnp.broadcast_to(arrays["scale"], site.stack))
    return Factors(a, b, jnp.ones(site.stack, a.dtype))


def change(node: Adapted, base: jax.Array | None) -> jax.Array:
    """The update itself, `[*stack, d_in, d_out]`: the product, or what is formed less the base."""
    product, site = factors(node), node.site
    assert site is not None
    if product is not None:
        return product.scale[..., None, None] * (product.a @ product.b)
    if node.method.weight is None:
        raise InputError(
            f"'{node.path}' is adapted by {node.method!r}, which is no change of its matrix, so "
            "it has no sum with others and no LoRA stands for it; leave it out"
        )
    w = formed(node.method, site.stack, *node.matrices())
    return w - site.view.matrix(known(node.path, base)).astype(w.dtype)


def bases(frozens: Sequence[Any], params: Any = None) -> dict[str, jax.Array]:
    """The base's parameters by path: those of `params`, or those that the frozen trees keep."""
    if params is not None:
        return _parts(params, frozens[0])
    found: dict[str, jax.Array] = {}
    for frozen in frozens:
        for path, leaf in tree.flatten(frozen, is_adapted).items():
            if not isinstance(leaf, Adapted):
                found.setdefault(path, leaf)
            elif keeps_kernel(leaf):
                found.setdefault(path, leaf.frozen["w"])
    return found


def known(path: str, base: Any) -> Any:
    """A base that is there; InputError where no frozen tree has it."""
    if base is None:
        raise InputError(
            f"the base's '{path}' is in none of the frozen trees (it is trained whole, quantised, "
            "or kept as a residual); give params, the parameters that were adapted"
        )
    return base


def keeps_kernel(node: Adapted) -> bool:
    """Whether `frozen["w"]` is the base's own kernel, not a residual of it: read from a trace."""
    if "w" not in node.frozen:
        return False
    method, site = node.method, node.site
    stack = len(site.stack) if site else 0
    whole = node.frozen["w"]
    shape = (site.d_in, site.d_out) if site else whole.shape
    w = jax.ShapeDtypeStruct(shape, whole.dtype)
    if method.rebuild is not None:
        single = {
            name: jax.ShapeDtypeStruct(x.shape[stack:], x.dtype)
            for name, x in node.frozen.items()
            if name not in ("w", "idle")
        }
        traced, out = jax.make_jaxpr(method.rebuild, return_shape=True)(w, single)
        names, given = out, traced.jaxpr.invars[0]
    else:
        start = start_of(method, site) if site else method.init
        traced, out = jax.make_jaxpr(start, return_shape=True)(jax.random.key(0), w)
        names, given = out[0], traced.jaxpr.invars[-1]
    outputs = jax.tree.unflatten(jax.tree.structure(out), traced.jaxpr.outvars)
    held = outputs if names is out else outputs[0]
    return "w" in names and held["w"] is given


def plain_lora(like: Adapted, base: Any, a: jax.Array, b: jax.Array) -> tuple[Adapted, Any]:
    """A LoRA node of scale one with these factors, where `like` stands, and its trained arrays."""
    site = like.site
    assert site is not None
    base = known(like.path, base)
    if tuple(base.shape) != site.view.shape:
        raise InputError(
            f"the base's '{like.path}' has shape {tuple(base.shape)}, the adapter's kernel "
            f"{site.view.shape}; combine adapters of one base"
        )
    rank = a.shape[-1]
    method = lora(rank=rank, alpha=float(rank))
    keys = jax.random.split(jax.random.key(0), site.stack)
    start = lifted(start_of(method, site), site.stack)
    frozen = start(keys, site.view.matrix(base))[0] | {"w": base}
    return _fresh(like, frozen, method), {"a": a, "b": b}


def whole_node(like: Adapted, value: jax.Array) -> tuple[Adapted, Any]:
    """A node whose parameter is trained itself, where `like` stands, at this value."""
    return _fresh(like, {}, full()), {"w": value}


def _fresh(like: Adapted, frozen: dict[str, Any], method: Method) -> Adapted:
    """An unbound node on its own."""
    new = {"frozen": frozen, "methods": method, "trained": {}, "key": None, "common": {}}
    return replace(like, **new, pool="", bound=False)


def tree_with(frozen: Any, made: Mapping[str, tuple[Adapted, Any]]) -> Pair:
    """A frozen tree with new nodes, and their trained arrays; nodes that train nothing stay."""
    idle: Trained = {path: {} for path in adapted(frozen) if path not in made}
    nodes = {path: node for path, (node, _) in made.items()}
    trained = idle | {path: own for path, (_, own) in made.items()}
    return tree.replace(frozen, nodes, is_adapted), trained


def _parts(params: Any, frozen: Any) -> dict[str, Any]:
    """Parameters by path, split where the frozen tree has them in parts."""
    flat = tree.flatten(params)
    nodes = tree.flatten(frozen, lambda x: is_fused(x) or is_adapted(x))
    for path, node in nodes.items():
        if is_fused(node) and path in flat:
            flat |= _split(path, node, flat[path])
    return flat


def _split(path: str, node: Fused, whole: jax.Array) -> dict[str, Any]:
    found, start = {}, 0
    for name, part in node.parts.items():
        size = _size(part, node.axis)
        cut = jax.lax.slice_in_dim(whole, start, start + size, axis=node.axis)
        inner = f"{path}/{name}"
        found |= _split(inner, part, cut) if is_fused(part) else {inner: cut}
        start += size
    return found


def _size(part: Any, axis: int) -> int:
    if is_fused(part):
        sizes = [_size(inner, axis) for inner in part.parts.values()]
        return sum(sizes) if part.axis == axis else sizes[0]
    if isinstance(part, Adapted) and part.site is not None:
        return part.site.view.shape[axis]
    return (part.frozen["w"] if isinstance(part, Adapted) else part).shape[axis]
