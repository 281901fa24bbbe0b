"""Any method over a base that is kept in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.operands import KEPT
from lora_jax.quant.storage import Storage

# Frozen arrays that make up the kernel; a dot is in no name of a method's own.
_PART = "w."
_PRODUCTS = jax.checkpoint_policies.save_only_these_names(KEPT)


def quantized(method: Method, storage: Storage) -> Method:
    """`method` on the kernel `deq(q(w))`, which exists in few bits only: QLoRA, QDoRA and so on.

    The packed arrays stand in `frozen` instead of the kernel. Everything the method reads from its
    kernel it reads from the dequantised one (DoRA's norms), in the base's dtype. But a start that
    changes the base does so first, and what is left is quantised (`lora(init="pissa")`: QPiSSA).
    A product dequantises the kernel anew, forwards and again backwards: between the two only `x`
    and the results of products with it are kept. Files hold the adapter alone; the base is
    quantised again when they are read.

    `quantized(fixed(), nf4())` quantises a kernel that nothing adapts. Trains what `method` trains.

    Raises InputError for a method that does not freeze its kernel, is quantised already, or starts
    from data and changes the base (LoRA-GA, CorDA: the data belong to the kernel as it was).

    Sources: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA); Meng et al. 2024, arXiv:2404.02948
    (QPiSSA).

    >>> from lora_jax import lora
    >>> from lora_jax.quant.nf4 import nf4
    >>> quantized(lora(rank=4), nf4())
    quantized(method=lora(rank=4, alpha=8.0), storage=nf4(block=64, double=True))
    """
    _check(method, storage)
    definition, product = method.weight, method.apply or _formed(method.weight)

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        assert definition is not None
        return definition(_whole(storage, frozen, wide=True), trained)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        def again(frozen: Arrays, trained: Arrays) -> jax.Array:
            return product(_whole(storage, frozen), trained, x.kept())

        return jax.checkpoint(again, policy=_PRODUCTS)(frozen, trained)

    site_method = method.at
    return replace(
        method,
        name="quantized",
        init=_start(method, method.init, storage),
        weight=weight if definition else None,
        apply=apply,
        hyper={"method": method, "storage": storage},
        lookup_init=method.lookup_init and _start(method, method.lookup_init, storage),
        at=site_method and (lambda site: quantized(site_method(site), storage)),
        rebuild=_rebuild(method, storage),
        factors=_factors(method, storage),
        splits=tuple(side for side in method.splits if side in storage.splits),
        factory=quantized,
    )


def packed(storage: Storage, w: jax.Array, dtype: Any, kept: Arrays | None = None) -> Arrays:
    """A kernel as the frozen arrays that stand for it in a base of this dtype."""
    arrays = storage.quantise(w, kept or {})
    # No numbers, but the kernel's shape and dtype, which flat codes do not tell.
    like = jnp.zeros((0, *w.shape), dtype)
    return {_PART + name: x for name, x in {**arrays, "like": like}.items()}


def unpacked(storage: Storage, frozen: Arrays, wide: bool = False) -> jax.Array:
    """The kernel that frozen arrays stand for: in the base's dtype, or (`wide`) not yet rounded."""
    parts = {n.removeprefix(_PART): x for n, x in frozen.items() if n.startswith(_PART)}
    like = parts.pop("like")
    d_in, d_out = like.shape[1:]
    dtype = jnp.promote_types(like.dtype, jnp.float32) if wide else like.dtype
    return storage.dequantise(parts, (d_in, d_out)).astype(dtype)


def kept_of(storage: Storage, frozen: Arrays) -> Arrays:
    """The arrays that files hold, so that quantising again gives the same bits."""
    return {name: frozen[_PART + name] for name in storage.kept if _PART + name in frozen}


def followers(storage: Storage, w: jax.Array, frozen: Arrays, dtype: Any) -> Arrays:
    """The packed arrays that follow from a kernel and the `kept` ones."""
    kept = kept_of(storage, frozen)
    made = packed(storage, w, dtype, kept)
    return {name: x for name, x in made.items() if name.removeprefix(_PART) not in kept}


def _whole(storage: Storage, frozen: Arrays, wide: bool = False) -> Arrays:
    """A method's own frozen arrays, with the kernel among them."""
    own = {name: x for name, x in frozen.items() if not name.startswith(_PART)}
    return {**own, "w": unpacked(storage, frozen, wide)}


def _start(method: Method, init: Callable[..., Any], storage: Storage) -> Callable[..., Any]:
    def start(key: jax.Array, w: jax.Array, *data: Any) -> tuple[Arrays, Arrays]:
        frozen, trained = init(key, w, *data)
        if "w" not in frozen:
            raise InputError(
                f"quantized({method!r}): the method freezes no kernel that could be quantised; "
                "use it as it is"
            )
        if frozen["w"] is w:
            made = packed(storage, w, w.dtype)
            frozen, trained = init(key, unpacked(storage, made), *data)
        else:
            made = packed(storage, frozen["w"], w.dtype)
        return {name: x for name, x in frozen.items() if name != "w"} | made, trained

    return start


def _rebuild(method: Method, storage: Storage) -> Callable[[jax.Array, Arrays], Arrays]:
    remake = method.rebuild

    def rebuild(w: jax.Array, frozen: Arrays) -> Arrays:
        made = remake(w, frozen) if remake else {"w": w}
        base = followers(storage, made["w"], frozen, w.dtype)
        if remake and made["w"] is w:
            made = remake(unpacked(storage, frozen | base), frozen)
        return {name: x for name, x in made.items() if name != "w"} | base

    return rebuild


def _factors(method: Method, storage: Storage) -> Callable[..., Any] | None:
    """The update on the dequantised kernel; none where the base is what a start left of it."""
    product = method.factors
    if product is None or method.rebuild is not None:
        return None
    return lambda frozen, trained: product(_whole(storage, frozen), trained)


def _formed(weight: Any) -> Callable[..., jax.Array]:
    return lambda frozen, trained, x: x @ weight(frozen, trained)


def _check(method: Any, storage: Any) -> None:
    if not isinstance(method, Method) or not isinstance(storage, Storage):
        raise InputError(
            f"quantized({method!r}, {storage!r}): give a method and a storage, such as "
            "quantized(lora(rank=8), nf4())"
        )
    if method.anywhere:
        raise InputError(
            f"quantized({method!r}): this method trains the parameter itself, and packed codes "
            "have no gradient; quantise a method that freezes its kernel, such as lora"
        )
    if isinstance(method.hyper.get("storage"), Storage):
        raise InputError(f"quantized({method!r}): its base is quantised already; wrap it once")
    if method.data is not None and method.rebuild is not None:
        raise InputError(
            f"quantized({method!r}): this start subtracts from the base what data say of the "
            "kernel as it was, not of the rounded one; give init='pissa', 'eva' or the default"
        )
