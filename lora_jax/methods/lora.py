"""LoRA, and its scale and initial factors, which other low-rank methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method

Draw = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def lora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    freeze_a: bool = False,
    init: str = "kaiming",
) -> Method:
    """Low-rank adaptation: `y = x w + s (drop(x) a) b`, `a: [d_in, rank]`, `b: [rank, d_out]`.

    The scale is `s = alpha / rank`, or `alpha / sqrt(rank)` with `rslora`. `b` starts at zero, so
    a fresh adapter changes nothing, and `a` at `U(-1/sqrt(d_in), 1/sqrt(d_in))` (`init="kaiming"`)
    or `N(0, 1/rank^2)` (`"gaussian"`). On an embedding the looked-up side starts at zero instead:
    `a = 0`, `b ~ N(0, 1)`. `freeze_a` trains `b` alone (LoRA-FA). `dropout` is the rate on the
    adapter's input; it acts where `bind` gets a key, and never on lookups. Trains
    `rank (d_in + d_out)` numbers, in float32 at least.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    dropout outside [0, 1) and an unknown init.

    Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA);
    Zhang et al. 2023, arXiv:2308.03303 (LoRA-FA).

    >>> lora(rank=4, alpha=8)
    lora(rank=4, alpha=8.0, rslora=False, dropout=0.0, freeze_a=False, init='kaiming')
    """
    check_factors("lora", rank, alpha, dropout, init)
    scale = scale_of(rank, alpha, rslora)

    def split(w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[Arrays, Arrays]:
        frozen = {"w": w, "scale": jnp.asarray(scale, a.dtype)}
        return (frozen | {"a": a}, {"b": b}) if freeze_a else (frozen, {"a": a, "b": b})

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return split(w, *factors(key, w, rank, init))

    def start_lookup(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return split(w, *lookup_factors(key, w, rank))

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        f = frozen | trained
        return f["w"] + f["scale"] * (f["a"] @ f["b"])

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        f = frozen | trained
        b = (f["scale"] * f["b"]).astype(x.dtype)
        return x @ f["w"] + (x.dropout(dropout) @ f["a"]) @ b

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": rslora,
        "dropout": float(dropout),
        "freeze_a": freeze_a,
        "init": init,
    }
    return Method("lora", start, weight, apply, hyper, lookup_init=start_lookup)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.

    >>> scale_of(4, 8.0, rslora=False), scale_of(4, 8.0, rslora=True)
    (2.0, 4.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def factors(key: jax.Array, w: jax.Array, rank: int, init: str) -> tuple[jax.Array, jax.Array]:
    """A random `a: [d_in, rank]` and a zero `b: [rank, d_out]`, in float32 at least."""
    d_in, d_out = w.shape
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    return _DRAWS[init](key, (d_in, rank), dtype), jnp.zeros((rank, d_out), dtype)


def lookup_factors(key: jax.Array, w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """For an embedding: a zero `a`, whose rows are looked up, and `b ~ N(0, 1)`."""
    d_in, d_out = w.shape
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    return jnp.zeros((d_in, rank), dtype), jax.random.normal(key, (rank, d_out), dtype)


def check_factors(name: str, rank: int, alpha: float, dropout: float, init: str) -> None:
    """Raise InputError for hyper-parameters outside their range."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{name}(rank={rank!r}): the rank is a positive integer; give rank >= 1")
    if not alpha > 0:
        raise InputError(f"{name}(alpha={alpha!r}): alpha scales the update; give alpha > 0")
    if not 0 <= dropout < 1:
        raise InputError(f"{name}(dropout={dropout!r}): a dropout rate lies in [0, 1)")
    if init not in _DRAWS:
        known = ", ".join(repr(known) for known in _DRAWS)
        raise InputError(f"{name}(init={init!r}): unknown init; give one of {known}")


def _kaiming(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / shape[1]


_DRAWS: dict[str, Draw] = {"kaiming": _kaiming, "gaussian": _gaussian}
