"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays, Method
from lora_jax.methods.cores import at_windows, core_of, rows_draw, through_core
from lora_jax.methods.ranges import check_positive, check_positive_integers, check_rates
from lora_jax.methods.update import kept_outputs, masked, with_update

Start = Callable[[jax.Array, jax.Array], tuple[Arrays, Arrays]]


def loha(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    effective_conv: bool = False,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
) -> Method:
    """Low-rank Hadamard product: `w' = w + s (a1 b1) * (a2 b2)`, `s = alpha / rank`.

    `a1, a2: [d_in, rank]`, `b1, b2: [rank, d_out]`. The update has a rank of up to `rank^2`: it is
    `a b` with `a[i, pq] = s a1[i, p] a2[i, q]` and `b[pq, j] = b1[p, j] b2[q, j]`. Used that way
    where `3 rank^2 <= d_out`, else formed. `a2` starts at zero, so a fresh adapter changes nothing;
    the others at `U(-1/sqrt(n), 1/sqrt(n))`, `n` their first side. Trains
    `2 rank (d_in + d_out)` numbers.

    `effective_conv` gives convolutions the CP form (PEFT's `use_effective_conv2d`), but for those
    with a window of one place: `a1, a2: [c_in, rank]` and cores `t1, t2: [rank, rank, *window]`,
    where row `(c, window)` of what stands for `a` is `sum_q t[p, q, window] a[c, q]`. Trains
    `2 rank (c_in + d_out) + 2 rank^2 prod(window)` numbers; `n` is `d_out` for `b` there, and
    `rank prod(window)` for `t`.

    Where `bind` gets a key, `rank_dropout` zeroes columns of the update with this probability and
    divides the others by the share that is left, and `module_dropout` leaves out the whole update.
    The draw is one for all rows of the input.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive and
    rates outside [0, 1).

    Sources: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara); Yeh et al. 2023, arXiv:2309.14859
    (LyCORIS).

    >>> loha(rank=4, alpha=8)
    loha(rank=4, alpha=8.0)
    """
    check_positive_integers("loha", rank=rank)
    check_positive("loha", alpha=alpha)
    check_rates("loha", rank_dropout=rank_dropout, module_dropout=module_dropout)
    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "effective_conv": effective_conv,
        "rank_dropout": float(rank_dropout),
        "module_dropout": float(module_dropout),
    }
    return _loha(hyper)


def _loha(hyper: Mapping[str, Any], window: Any = None) -> Method:
    """The method; for kernels with a `window` in the CP form."""
    rank_dropout, module_dropout = hyper["rank_dropout"], hyper["module_dropout"]

    def tall(t: Arrays, number: str) -> jax.Array:
        """`[d_in, rank]`: the factor of the inputs, its rank read from it as layers may differ."""
        a = t[f"a{number}"]
        return a if window is None else window.rows(through_core(a, t[f"t{number}"]))

    def update(frozen: Arrays, t: Arrays) -> jax.Array:
        return frozen["scale"] * (tall(t, "1") @ t["b1"]) * (tall(t, "2") @ t["b2"])

    def product(frozen: Arrays, t: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        a = tall(t, "1")[:, :, None] * tall(t, "2")[:, None, :]
        b = t["b1"][:, None, :] * t["b2"][None, :, :]
        return frozen["scale"] * a.reshape(d_in, -1), b.reshape(-1, d_out)

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"] + update(frozen, trained)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        w = frozen["w"]
        kept = kept_outputs(x, w.shape[1], rank_dropout, module_dropout)
        if 3 * len(trained["b1"]) ** 2 > w.shape[1]:
            return with_update(x, w, masked(update(frozen, trained), kept))
        a, b = product(frozen, trained)
        return x @ w + (x @ a) @ masked(b, kept).astype(x.dtype)

    return Method(
        "loha",
        _start(hyper["rank"], hyper["alpha"], window),
        weight,
        apply,
        hyper,
        at=at_windows(lambda found: _loha(hyper, found)) if hyper["effective_conv"] else None,
        factors=product,
        splits=("in", "out") if window is None else ("out",),
        factory=loha,
    )


def _start(rank: int, alpha: float, window: Any) -> Start:
    """Where the arrays start: `a2` at zero, the rest at random."""
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        d_in, d_out = w.shape if window is None else (window.c_in, w.shape[1])
        k1, k2, k3, *others = jax.random.split(key, 3 if window is None else 5)
        beside = draw if window is None else rows_draw
        trained = {
            "a1": draw(k1, (d_in, rank), dtype),
            "b1": beside(k2, (rank, d_out), dtype),
            "a2": jnp.zeros((d_in, rank), dtype),
            "b2": beside(k3, (rank, d_out), dtype),
        }
        cores = {f"t{i}": core_of(k, rank, window, dtype) for i, k in enumerate(others, 1)}
        return {"w": w, "scale": jnp.asarray(alpha / rank, dtype)}, trained | cores

    return start
