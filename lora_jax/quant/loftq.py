"""LoftQ: factors and codes that together start near the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.quant.quantized import followers, packed, quantized, unpacked
from lora_jax.quant.storage import Storage


def loftq(method: Method, storage: Storage, *, steps: int = 5, scale: str = "exact") -> Method:
    """`quantized(method, storage)` whose factors start at what the codes lose of the kernel.

    With `a = b = 0` at first, `steps` times: `q = quantise(w - s a b)`; `a b` is the best product
    of this rank for `w - deq(q)`, the singular values shared between both: `a = u sqrt(S / s)`,
    `b = sqrt(S / s) v`. The base is the last `q`. `method` is a `lora` with any options but its
    `init`; its scale is `s`. `scale="peft"` leaves `s` out of all this, as PEFT does, which starts
    near the kernel for `s = 1` alone. No steps are `quantized`, and one is PEFT's default, over
    `nf4(double=False)`.

    Files hold the factors before the last step too, from which `q` follows.

    Raises InputError for another method, for `steps` below 0, and where the kernel has fewer
    singular values than the rank.

    Source: Li et al. 2023, arXiv:2310.08659.

    >>> from lora_jax import lora
    >>> from lora_jax.quant.nf4 import nf4
    >>> loftq(lora(rank=4, alpha=4), nf4(double=False), steps=1)
    loftq(method=lora(rank=4, alpha=4.0), storage=nf4(block=64, double=False), steps=1)
    """
    _check(method, steps, scale)
    plain = quantized(method, storage)

    def strength(frozen: Arrays) -> jax.Array:
        return frozen["scale"] if scale == "exact" else jnp.ones_like(frozen["scale"])

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        frozen, trained = plain.init(key, w)
        if steps == 0:
            return frozen, trained
        both = frozen | trained
        a, b, s = jnp.zeros_like(both["a"]), jnp.zeros_like(both["b"]), strength(frozen)
        _check_rank(method, a.shape[1], w)
        for _ in range(steps):
            before = {"a_0": a, "b_0": b}
            base = packed(storage, _rest(w, s, before), w.dtype)
            a, b = _best(w - unpacked(storage, base, wide=True), a.shape[1], s)
        new = {"a": a, "b": b}
        frozen, trained = (
            arrays | {n: new[n] for n in new if n in arrays} for arrays in (frozen, trained)
        )
        return frozen | base | (before if steps > 1 else {}), trained

    def rebuild(w: jax.Array, frozen: Arrays) -> Arrays:
        return followers(storage, _rest(w, strength(frozen), frozen), frozen, w.dtype)

    site_method = method.at
    return replace(
        plain,
        name="loftq",
        init=start,
        lookup_init=start if steps else plain.lookup_init,
        hyper={"method": method, "storage": storage, "steps": steps, "scale": scale},
        at=site_method
        and (lambda site: loftq(site_method(site), storage, steps=steps, scale=scale)),
        rebuild=rebuild,
        factory=loftq,
    )


def _rest(w: jax.Array, s: jax.Array, factors: Arrays) -> jax.Array:
    """`w - s a_0 b_0`, in float32 at least; the kernel itself before there are factors."""
    wide = w.astype(s.dtype)
    if "a_0" not in factors:
        return wide
    a = s * factors["a_0"]
    return wide - jnp.matmul(a, factors["b_0"], precision=jax.lax.Precision.HIGHEST)


def _best(w: jax.Array, rank: int, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors with `s a b` the best approximation of `w` by a product of this rank."""
    u, values, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(values[:rank] / s)
    return u[:, :rank] * root[None, :], root[:, None] * v[:rank]


def _check(method: Any, steps: int, scale: str) -> None:
    if not isinstance(method, Method) or method.name != "lora" or method.rebuild or method.data:
        raise InputError(
            f"loftq({method!r}): the factors start from the kernel's codes; give a lora without "
            "init, such as lora(rank=8)"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"loftq(steps={steps!r}): how often to alternate; give 0 or more")
    if scale not in ("exact", "peft"):
        raise InputError(f"loftq(scale={scale!r}): unknown scale; give 'exact' or 'peft'")


def _check_rank(method: Method, rank: int, w: jax.Array) -> None:
    if rank > min(w.shape):
        raise InputError(
            f"loftq({method!r}) on a kernel of shape {list(w.shape)}: it has {min(w.shape)} "
            "singular values; give a rank that is not above them"
        )
