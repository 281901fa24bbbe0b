"""LoRA, and its scale and the checks that other low-rank methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits import Start, named, remainder
from lora_jax.method import Arrays, Method


def lora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    freeze_a: bool = False,
    init: str | Start = "kaiming",
    active_experts: int = 1,
    share: str = "",
) -> Method:
    """Low-rank adaptation: `y = x w + s (drop(x) a) b`, `a: [d_in, rank]`, `b: [rank, d_out]`.

    The scale is `s = alpha / rank`, or `alpha / sqrt(rank)` with `rslora`. `freeze_a` trains `b`
    alone (LoRA-FA). `dropout` is the rate on the adapter's input; it acts where `bind` gets a key,
    and never on lookups. Trains `rank (d_in + d_out)` numbers, in float32 at least.

    `init` says where the factors start, by name or as a `Start` (`lora_jax.inits`). `b = 0`, so
    that a fresh adapter changes nothing, and `a` is random: `"kaiming"`, `"gaussian"`; an embedding
    has `a = 0` and `b ~ N(0, 1)` instead. `"orthogonal"` has `a b = 0` with neither zero. From the
    kernel: `"pissa"` (`"pissa_niter_16"`), `"olora"`, and `"mica"`, which trains `a` alone. From
    data, gathered by `lora_jax.calibrate`: `"eva"`, `"corda"` (`"corda_kpm"`), `"lora_ga"`. Where
    `s a b` starts at something else than zero, the base becomes `w - s a_0 b_0`; files hold `a_0`
    and `b_0`, and `factors` are those of the update on `w` itself, of rank `2 rank`.

    A mixture of experts has factors for each expert, of rank `max(1, rank // active_experts)`, so
    that a token which passes `active_experts` of them meets `rank` in all; `s` follows that rank.
    `share="a"` (or `"b"`) gives all experts of a kernel one such factor: the one that faces the
    model's width, `a` going in and `b` coming out.

    Raises InputError for a rank that is no positive integer, an alpha that is not positive, a
    dropout outside [0, 1), an unknown init, nothing left to train, and a factor to share that is
    not trained or belongs to its expert's kernel.

    Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA);
    Zhang et al. 2023, arXiv:2308.03303 (LoRA-FA); Schulman et al. 2025, "LoRA Without Regret"
    (experts).

    >>> lora(rank=4, alpha=8)
    lora(rank=4, alpha=8.0)
    """
    check_factors("lora", rank, alpha, dropout)
    begin = named(init, "lora")
    fixed = _fixed(begin, freeze_a)
    check_experts("lora", active_experts, share, [n for n in "ab" if n not in fixed], begin)
    scale, residual = scale_of(rank, alpha, rslora), begin.residual

    def split(w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[Arrays, Arrays]:
        frozen = {"w": w, "scale": jnp.asarray(scale, a.dtype)}
        if residual:
            frozen |= {"a_0": a, "b_0": b}
            frozen |= remainder(w, frozen)
            a, b = jnp.copy(a), jnp.copy(b)  # a step may give the trained buffers away
        trained = {"a": a, "b": b}
        return frozen | {name: trained.pop(name) for name in fixed}, trained

    def start(key: jax.Array, w: jax.Array, *datum: Any) -> tuple[Arrays, Arrays]:
        return split(w, *begin.factors(key, w, rank, scale, *datum, lookup=False))

    def start_lookup(key: jax.Array, w: jax.Array, *datum: Any) -> tuple[Arrays, Arrays]:
        return split(w, *begin.factors(key, w, rank, scale, *datum, lookup=True))

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        f = frozen | trained
        return f["w"] + f["scale"] * (f["a"] @ f["b"])

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        f = frozen | trained
        b = (f["scale"] * f["b"]).astype(x.dtype)
        return x @ f["w"] + (x.dropout(dropout) @ f["a"]) @ b

    def factors(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        f = frozen | trained
        if not residual:
            return f["scale"] * f["a"], f["b"]
        both = jnp.concatenate([f["a"], -f["a_0"]], axis=1)
        return f["scale"] * both, jnp.concatenate([f["b"], f["b_0"]])

    hyper = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": rslora,
        "dropout": float(dropout),
        "freeze_a": freeze_a,
        "init": begin.name,
        "active_experts": active_experts,
        "share": share,
    }
    return Method(
        "lora",
        start,
        weight,
        apply,
        hyper,
        lookup_init=None if freeze_a else start_lookup,  # else nothing would learn
        shared=(share,) if share else (),
        at=fewer_ranks(lora, {**hyper, "init": begin}),
        data=begin.data,
        rebuild=rebuilt(begin),
        factors=factors,
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


def rebuilt(begin: Start) -> Callable[[jax.Array, Arrays], Arrays] | None:
    """The frozen kernel as it follows from the base's, for a start that decomposes that."""
    if begin.residual:
        return remainder
    return _itself if begin.freezes else None


def _itself(w: jax.Array, frozen: Arrays) -> Arrays:
    return {"w": w}


def _fixed(begin: Start, freeze_a: bool) -> list[str]:
    """The factors that are not trained."""
    fixed = [name for name in "ab" if name in begin.freezes or (freeze_a and name == "a")]
    if len(fixed) == 2:
        raise InputError(
            f"lora(freeze_a=True, init={begin.name!r}): this init freezes b, so nothing is left to "
            "train; drop freeze_a"
        )
    return fixed


def check_factors(name: str, rank: int, alpha: float, dropout: float) -> None:
    """Raise InputError for hyper-parameters outside their range."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{name}(rank={rank!r}): the rank is a positive integer; give rank >= 1")
    if not alpha > 0:
        raise InputError(f"{name}(alpha={alpha!r}): alpha scales the update; give alpha > 0")
    if not 0 <= dropout < 1:
        raise InputError(f"{name}(dropout={dropout!r}): a dropout rate lies in [0, 1)")


def check_experts(name: str, active: int, share: str, trained: Sequence[str], begin: Start) -> None:
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
    if share and not begin.noise:
        raise InputError(
            f"{name}(share={share!r}, init={begin.name!r}): this start gives each expert a factor "
            "of its own; share nothing, or give init='kaiming'"
        )
