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
    active_experts: int = 1,
    share: str = "",
) -> Method:
    """Low-rank adaptation: `y = x w + s (drop(x) a) b`, `a: [d_in, rank]`, `b: [rank, d_out]`.

    The scale is `s = alpha / rank`, or `alpha / sqrt(rank)` with `rslora`. `b` starts at zero, so
    a fresh adapter changes nothing, and `a` at `U(-1/sqrt(d_in), 1/sqrt(d_in))` (`init="kaiming"`)
    or `N(0, 1/rank^2)` (`"gaussian"`). On an embedding the looked-up side starts at zero instead:
    `a = 0`, `b ~ N(0, 1)`. `freeze_a` trains `b` alone (LoRA-FA). `dropout` is the rate on the
    adapter's input; it acts where `bind` gets a key, and never on lookups. Trains
    `rank (d_in + d_out)` numbers, in float32 at least.

    A mixture of experts has factors for each expert, of rank `max(1, rank // active_experts)`, so
    that a token which passes `active_experts` of them meets `rank` in all; `s` follows that rank.
    `share="a"` (or `"b"`) gives all experts of a kernel one such factor: the one that faces the
    model's width, `a` going in and `b` coming out.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    dropout outside [0, 1), an unknown init and a factor to share that is not trained.

    Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA);
    Zhang et al. 2023, arXiv:2308.03303 (LoRA-FA); Schulman et al. 2025, "LoRA Without Regret"
    (experts).

    >>> lora(rank=4, alpha=8)
    lora(rank=4, alpha=8.0)
    """
    check_factors("lora", rank, alpha, dropout, init)
    check_experts("lora", active_experts, share, ("b",) if freeze_a else ("a", "b"))
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

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        f = frozen | trained
        return f["scale"] * f["a"], f["b"]

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": rslora,
        "dropout": float(dropout),
        "freeze_a": freeze_a,
        "init": init,
        "active_experts": active_experts,
        "share": share,
    }
    return Method(
        "lora",
        start,
        weight,
        apply,
        hyper,
        lookup_init=start_lookup,
        shared=(share,) if share else (),
        at=fewer_ranks(lora, hyper),
        factors=product,
        splits=("in", "out"),
        factory=lora,
    )


def fewer_ranks(factory: Callable[..., Method], hyper: dict[str, Any]) -> Any:
    """The choice of the same method with `rank // active_experts` at sites with experts."""
    active = hyper["active_experts"]
    if active == 1:
        return None
    smaller = {**hyper, "rank": max(1, hyper["rank"] // active), "active_experts": 1}
    plain = {**hyper, "active_experts": 1}
    return lambda site: factory(**(smaller if site.experts else plain))


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


def check_experts(name: str, active: int, share: str, trained: tuple[str, ...]) -> None:
    """Raise InputError for options on experts that say nothing or what cannot be."""
    if isinstance(active, bool) or not isinstance(active, int) or active < 1:
        raise InputError(
            f"{name}(active_experts={active!r}): how many experts a token passes; give 1 or more"
        )
    if share and share not in trained:
        raise InputError(
            f"{name}(share={share!r}): only a trained factor can be shared; give one of "
            f"{', '.join(map(repr, trained))} or ''"
        )


def _kaiming(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / shape[1]


_DRAWS: dict[str, Draw] = {"kaiming": _kaiming, "gaussian": _gaussian}
