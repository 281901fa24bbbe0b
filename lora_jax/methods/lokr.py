"""LoKr: a Kronecker product of two small matrices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.ranges import check_choice, check_positive, check_positive_integers
from lora_jax.methods.update import with_update


def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    factor: int = -1,
    decompose_both: bool = False,
    zero: str = "w1",
) -> Method:
    """Low-rank Kronecker product: `w' = w + s (w1 kron w2)`, `s = alpha / rank`.

    `w1: [c, a]` and `w2: [d, b]` with `c d = d_in`, `a b = d_out`, the sides split by `divided`
    towards `factor` (-1: as evenly as can be). `w2` is a product `a2 b2` of rank `rank` where
    `rank < max(d, b) / 2`, and with `decompose_both` so is `w1 = a1 b1` where
    `rank < max(c, a) / 2`. The factor that starts at zero, so that a fresh adapter changes nothing,
    is `w1` (or `b1`), as in PEFT, or with `zero="w2"` it is `w2` (or `a2`), as in LyCORIS; the
    others start at `U(-1/sqrt(n), 1/sqrt(n))`, `n` their first side. Trains `c a` or
    `rank (c + a)`, and `d b` or `rank (d + b)` numbers.

    `x @ (w1 kron w2)` goes through `x @ (l1 kron l2)`, each `l` the narrowest of the factor, its
    first factor and the identity: a few hundred columns at width 4096.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    factor that is neither positive nor -1 and an unknown `zero`.

    Sources: Edalati et al. 2022, arXiv:2212.10650 (KronA); Yeh et al. 2023, arXiv:2309.14859
    (LyCORIS).

    >>> lokr(rank=4, alpha=8, factor=8)
    lokr(rank=4, alpha=8.0, factor=8)
    """
    check_positive_integers("lokr", rank=rank)
    check_positive("lokr", alpha=alpha)
    check_choice("lokr", "zero", zero, ("w1", "w2"))
    if factor != -1 and (isinstance(factor, bool) or not isinstance(factor, int) or factor < 1):
        raise InputError(f"lokr(factor={factor!r}): a side to split off; give 1 or more, or -1")

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        (c, d), (a, b) = (divided(side, factor) for side in w.shape)
        of_1, of_2 = jax.random.split(key)
        low1 = decompose_both and rank < max(c, a) / 2
        trained = _drawn(of_1, "1", (c, a), rank if low1 else None, dtype)
        trained |= _drawn(of_2, "2", (d, b), rank if rank < max(d, b) / 2 else None, dtype)
        none = ("w1", "b1") if zero == "w1" else ("w2", "a2")
        trained = {n: jnp.zeros_like(v) if n in none else v for n, v in trained.items()}
        return {"w": w, "scale": jnp.asarray(alpha / rank, dtype)}, trained

    def update(frozen: Arrays, t: Arrays) -> jax.Array:
        w1 = t["w1"] if "w1" in t else t["a1"] @ t["b1"]
        w2 = t["w2"] if "w2" in t else t["a2"] @ t["b2"]
        return frozen["scale"] * jnp.kron(w1, w2)

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"] + update(frozen, trained)

    def product(frozen: Arrays, t: Arrays) -> tuple[jax.Array, jax.Array]:
        (l1, r1), (l2, r2) = _narrowest(t, "1"), _narrowest(t, "2")
        return frozen["scale"] * jnp.kron(l1, l2), jnp.kron(_right(l1, r1), _right(l2, r2))

    def apply(frozen: Arrays, t: Arrays, x: Any) -> jax.Array:
        w = frozen["w"]
        (l1, r1), (l2, r2) = _narrowest(t, "1"), _narrowest(t, "2")
        if 3 * l1.shape[1] * l2.shape[1] > w.shape[1]:
            return with_update(x, w, update(frozen, t))
        y = x @ (frozen["scale"] * jnp.kron(l1, l2))
        y = y.reshape(-1, l1.shape[1], l2.shape[1])
        y = y if r2 is None else y @ r2.astype(x.dtype)
        y = y if r1 is None else jnp.einsum("tpb,pa->tab", y, r1.astype(x.dtype))
        return x @ w + y.reshape(-1, w.shape[1])

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "factor": factor,
        "decompose_both": decompose_both,
        "zero": zero,
    }
    return Method("lokr", start, weight, apply, hyper, factors=product, factory=lokr)


def divided(side: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `side`: `factor` and the rest, where it divides.

    Else the pair that is reached by climbing the divisors from 1 while the pair's sum shrinks and
    the smaller one is at most `factor` (-1: no limit); the smaller one comes first.

    >>> [divided(side, -1) for side in (24, 768, 3072, 127)], divided(12, 6), divided(12, 5)
    ([(4, 6), (24, 32), (48, 64), (1, 127)], (6, 2), (3, 4))
    """
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    limit = side if factor == -1 else factor
    fitting = [m for m in range(1, min(limit, math.isqrt(side)) + 1) if side % m == 0]
    return fitting[-1], side // fitting[-1]


def _drawn(
    key: jax.Array, number: str, shape: tuple[int, int], rank: int | None, dtype: Any
) -> Arrays:
    """One side of the Kronecker product, whole or as two factors of a rank."""
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    if rank is None:
        return {f"w{number}": draw(key, shape, dtype)}
    of_a, of_b = jax.random.split(key)
    a, b = draw(of_a, (shape[0], rank), dtype), draw(of_b, (rank, shape[1]), dtype)
    return {f"a{number}": a, f"b{number}": b}


def _narrowest(t: Arrays, number: str) -> tuple[jax.Array, jax.Array | None]:
    """One side of the Kronecker product as `left @ right`, `left` of few columns; None is 1."""
    if f"w{number}" not in t:
        return t[f"a{number}"], t[f"b{number}"]
    w = t[f"w{number}"]
    return (jnp.eye(len(w), dtype=w.dtype), w) if w.shape[0] < w.shape[1] else (w, None)


def _right(left: jax.Array, right: jax.Array | None) -> jax.Array:
    return jnp.eye(left.shape[1], dtype=left.dtype) if right is None else right
