"""Delta-LoRA: the kernel moves along with the product of the factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits import kaiming
from lora_jax.method import Arrays, Method
from lora_jax.methods.lora import check_factors


def delta_lora(
    rank: int = 8, alpha: float = 8.0, *, ratio: float = 0.5, dropout: float = 0.0
) -> Method:
    """LoRA over a kernel that moves too: `w' = w + s a b + ratio s (a b - a_k b_k)`.

    In the paper every step adds `ratio s` times the change of `a b` to the kernel itself. Those
    changes telescope, so the kernel stays and `a_k, b_k`, the factors when that began, are kept
    instead. The extra term passes no gradient to `a` and `b`, but does to `x`.
    `dynamics.delta_lora` takes the snapshot and sets the frozen `ratio`, which is 0 until then;
    without it this is LoRA.
    Scale, factors at the start and the `rank (d_in + d_out)` trained numbers are LoRA's; the whole
    is a product of rank `2 rank`, `[s a, s a_k]` times `[(1 + ratio) b; -ratio b_k]`.

    Raises InputError for values out of range, and for any dropout: the gradient of the kernel
    stands for that of `s a b`, which it is only when both see the same input.

    Source: Zi et al. 2023, arXiv:2309.02411.

    >>> delta_lora(rank=4, alpha=8, ratio=1.0)
    delta_lora(rank=4, alpha=8.0, ratio=1.0)
    """
    check_factors("delta_lora", rank, alpha, 0.0)
    if dropout:
        raise InputError(
            f"delta_lora(dropout={dropout!r}): the kernel moves by the update's own changes, which "
            "belong to it only where both see the same input; use dropout=0, or lora with dropout"
        )
    if not 0 <= ratio < float("inf"):
        raise InputError(f"delta_lora(ratio={ratio!r}): give a number from 0 on, such as 0.5")

    scale = alpha / rank

    def split(w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[Arrays, Arrays]:
        scalars = {"scale": scale, "ratio": 0.0}
        frozen = {name: jnp.asarray(value, a.dtype) for name, value in scalars.items()}
        return frozen | {"w": w, "a_k": jnp.copy(a), "b_k": jnp.copy(b)}, {"a": a, "b": b}

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return split(w, *kaiming().factors(key, w, rank, alpha / rank, lookup=False))

    def start_lookup(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return split(w, *kaiming().factors(key, w, rank, alpha / rank, lookup=True))

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        product = trained["a"] @ trained["b"]
        moved = jax.lax.stop_gradient(product) - frozen["a_k"] @ frozen["b_k"]
        return frozen["w"] + frozen["scale"] * (product + frozen["ratio"] * moved)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        b = (frozen["scale"] * trained["b"]).astype(x.dtype)
        left, right = _moved(frozen, *jax.lax.stop_gradient((trained["a"], trained["b"])))
        return x @ frozen["w"] + (x @ trained["a"]) @ b + (x @ left) @ right.astype(x.dtype)

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        b = trained["b"]
        left, right = _moved(frozen, trained["a"], b)
        return left, right.at[: len(b)].add(frozen["scale"] * b)

    hyper = {"rank": rank, "alpha": float(alpha), "ratio": float(ratio), "dropout": 0.0}
    return Method(
        "delta_lora",
        start,
        weight,
        apply,
        hyper,
        lookup_init=start_lookup,
        factors=product,
        splits=("in", "out"),
        factory=delta_lora,
    )


def _moved(frozen: Arrays, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far the kernel has moved, `ratio s (a b - a_k b_k)`, as one product of rank 2r."""
    rate = frozen["ratio"] * frozen["scale"]
    left = jnp.concatenate([a, frozen["a_k"]], axis=1)
    return left, jnp.concatenate([rate * b, -rate * frozen["b_k"]])
