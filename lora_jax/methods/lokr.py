"""LoKr: a Kronecker product of two small matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.cores import at_windows, core_of, rows_draw, through_core
from lora_jax.methods.ranges import (
    check_choice,
    check_positive,
    check_positive_integers,
    check_rates,
)
from lora_jax.methods.update import kept_outputs, masked, with_update


def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    factor: int = -1,
    decompose_both: bool = False,
    zero: str = "w1",
    effective_conv: bool = False,
    rank_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
    module_dropout: float = 0.0,
) -> Method:
    """Low-rank Kronecker product: `w' = w + s (w1 kron w2)`, `s = alpha / rank`.

    `w1: [c, a]` and `w2: [d, b]` with `c d = d_in`, `a b = d_out`, the sides split by `divided`
    towards `factor` (-1: as evenly as can be). `w2` is a product `a2 b2` of rank `rank` where
    `rank < max(d, b) / 2`, and with `decompose_both` so is `w1 = a1 b1` where
    `rank < max(c, a) / 2`. The factor that starts at zero, so that a fresh adapter changes nothing,
    is `w1` (or `b1`), as in PEFT, or with `zero="w2"` it is `w2` (or `a2`), as in LyCORIS; the
    others start at `U(-1/sqrt(n), 1/sqrt(n))`, `n` their first side. Trains `c a` or
    `rank (c + a)`, and `d b` or `rank (d + b)` numbers.

    Of a convolution the input channels alone are split, `c d = c_in`, and the window belongs to
    `w2: [d places, b]`, `places` the number of its places. There `effective_conv` gives a low-rank
    `w2` the CP form (PEFT's `use_effective_conv2d`), but for a window of one place: `a2: [d, rank]`
    and a core `t2: [rank, rank, *window]`, where row `(i, window)` of what stands for `a2` is
    `sum_q t2[p, q, window] a2[i, q]`; `n` is `b` for `b2` then, and `rank places` for `t2`.
    `w2` trains `d b places`, `rank (d places + b)` or `rank (d + b) + rank^2 places` numbers.

    `x @ (w1 kron w2)` goes through `x @ (l1 kron l2)`, each `l` the narrowest of the factor, its
    first factor and the identity: a few hundred columns at width 4096.

    Where `bind` gets a key, `rank_dropout` zeroes columns of the update with this probability, and
    with `rank_dropout_scale` divides the others by the share that is left; `module_dropout` leaves
    out the whole update. The draw is one for all rows of the input.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    factor that is neither positive nor -1, an unknown `zero` and rates outside [0, 1).

    Sources: Edalati et al. 2022, arXiv:2212.10650 (KronA); Yeh et al. 2023, arXiv:2309.14859
    (LyCORIS).

    >>> lokr(rank=4, alpha=8, factor=8)
    lokr(rank=4, alpha=8.0, factor=8)
    """
    check_positive_integers("lokr", rank=rank)
    check_positive("lokr", alpha=alpha)
    check_choice("lokr", "zero", zero, ("w1", "w2"))
    check_rates("lokr", rank_dropout=rank_dropout, module_dropout=module_dropout)
    if factor != -1 and (isinstance(factor, bool) or not isinstance(factor, int) or factor < 1):
        raise InputError(f"lokr(factor={factor!r}): a side to split off; give 1 or more, or -1")
    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "factor": factor,
        "decompose_both": decompose_both,
        "zero": zero,
        "effective_conv": effective_conv,
        "rank_dropout": float(rank_dropout),
        "rank_dropout_scale": rank_dropout_scale,
        "module_dropout": float(module_dropout),
    }
    return _lokr(hyper)


def _lokr(hyper: Mapping[str, Any], window: Any = None) -> Method:
    """The method, for kernels with a `window` or without."""
    factor = hyper["factor"]
    names = ("rank_dropout", "module_dropout", "rank_dropout_scale")
    dropout = tuple(hyper[name] for name in names)

    def narrow(t: Arrays, w: jax.Array) -> list[tuple[jax.Array, jax.Array | None]]:
        """Both sides as `left @ right`, `left` of few columns; None is 1."""
        sides = split_sides(w.shape, factor, window)
        return [_narrowest(t, i, side) for i, side in zip("12", sides, strict=True)]

    def placed(m: jax.Array) -> jax.Array:
        """Rows in the order of the kernel's."""
        return m if window is None else window.rows(m)

    def update(frozen: Arrays, t: Arrays) -> jax.Array:
        return frozen["scale"] * placed(jnp.kron(_formed(t, "1"), _formed(t, "2")))

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"] + update(frozen, trained)

    def product(frozen: Arrays, t: Arrays) -> tuple[jax.Array, jax.Array]:
        (l1, r1), (l2, r2) = narrow(t, frozen["w"])
        right = jnp.kron(_right(l1, r1), _right(l2, r2))
        return frozen["scale"] * placed(jnp.kron(l1, l2)), right

    def apply(frozen: Arrays, t: Arrays, x: Any) -> jax.Array:
        w = frozen["w"]
        kept = kept_outputs(x, w.shape[1], *dropout)
        (l1, r1), (l2, r2) = narrow(t, w)
        if 3 * l1.shape[1] * l2.shape[1] > w.shape[1]:
            return with_update(x, w, masked(update(frozen, t), kept))
        y = x @ (frozen["scale"] * placed(jnp.kron(l1, l2)))
        y = y.reshape(-1, l1.shape[1], l2.shape[1])
        y = y if r2 is None else y @ r2.astype(x.dtype)
        y = y if r1 is None else jnp.einsum("tpb,pa->tab", y, r1.astype(x.dtype))
        y = y.reshape(-1, w.shape[1])
        return x @ w + masked(y, None if kept is None else x.rows(kept))

    start, at = _start(hyper, window), at_windows(functools.partial(_lokr, hyper))
    return Method("lokr", start, weight, apply, hyper, at=at, factors=product, factory=lokr)


def split_sides(
    shape: tuple[int, ...], factor: int, window: Any = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of `w1` and `w2` for a kernel `[d_in, d_out]`: `(c, a)` and `(d places, b)`.

    >>> split_sides((24, 20), -1), split_sides((24, 20), 2)
    (((4, 4), (6, 5)), ((2, 2), (12, 10)))
    """
    c_in, places = (shape[0], 1) if window is None else (window.c_in, math.prod(window.shape))
    (c, d), (a, b) = divided(c_in, factor), divided(shape[1], factor)
    return (c, a), (d * places, b)


def is_low(rank: int, first: int, second: int) -> bool:
    """Whether a factor of these sides, the window left out, is a product of rank `rank` itself."""
    return rank < max(first, second) / 2


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


def _start(hyper: Mapping[str, Any], window: Any) -> Callable[..., tuple[Arrays, Arrays]]:
    """Where the arrays start: one factor at zero, the rest at random."""
    rank, alpha, zero = hyper["rank"], hyper["alpha"], hyper["zero"]
    places = 1 if window is None else math.prod(window.shape)
    core = window if hyper["effective_conv"] else None

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        (c, a), (d, b) = split_sides(w.shape, hyper["factor"], window)
        of_1, of_2 = jax.random.split(key)
        low1 = hyper["decompose_both"] and is_low(rank, c, a)
        trained = _drawn(of_1, "1", (c, a), rank if low1 else None, dtype)
        if not is_low(rank, d // places, b):
            trained |= _drawn(of_2, "2", (d, b), None, dtype)
        elif core is None:
            trained |= _drawn(of_2, "2", (d, b), rank, dtype)
        else:
            trained |= _drawn_core(of_2, (d // places, b), rank, core, dtype)
        none = ("w1", "b1") if zero == "w1" else ("w2", "a2")
        trained = {n: jnp.zeros_like(v) if n in none else v for n, v in trained.items()}
        return {"w": w, "scale": jnp.asarray(alpha / rank, dtype)}, trained

    return start


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


def _drawn_core(
    key: jax.Array, sides: tuple[int, int], rank: int, window: Any, dtype: Any
) -> Arrays:
    """The second side in the CP form."""
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    of_a, of_b, of_t = jax.random.split(key, 3)
    return {
        "a2": draw(of_a, (sides[0], rank), dtype),
        "b2": rows_draw(of_b, (rank, sides[1]), dtype),
        "t2": core_of(of_t, rank, window, dtype),
    }


def _low(t: Arrays, number: str) -> jax.Array:
    """The first factor of a side that is a product."""
    a, core = t[f"a{number}"], t.get(f"t{number}")
    return a if core is None else through_core(a, core)


def _formed(t: Arrays, number: str) -> jax.Array:
    """One side of the Kronecker product."""
    whole = t.get(f"w{number}")
    return _low(t, number) @ t[f"b{number}"] if whole is None else whole


def _narrowest(
    t: Arrays, number: str, sides: tuple[int, int]
) -> tuple[jax.Array, jax.Array | None]:
    """One side of the Kronecker product as `left @ right`, `left` of few columns; None is 1."""
    w = t.get(f"w{number}")
    if w is None:
        return _low(t, number), t[f"b{number}"]
    return (jnp.eye(sides[0], dtype=w.dtype), w) if sides[0] < sides[1] else (w, None)


def _right(left: jax.Array, right: jax.Array | None) -> jax.Array:
    return jnp.eye(left.shape[1], dtype=left.dtype) if right is None else right
