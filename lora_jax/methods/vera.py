"""VeRA: one pair of random projections for all sites, two trained vectors for each."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method, Shapes
from lora_jax.methods.ranges import check_choice, check_dropout, check_positive_integers


def vera(
    rank: int = 256,
    d_initial: float = 0.1,
    *,
    seed: int | None = None,
    projection: str = "stored",
    dropout: float = 0.0,
) -> Method:
    """Vector-based random matrix adaptation: `y = x w + b * (((drop(x) shared_a) * d) shared_b)`.

    The projections are frozen and common to all sites: `shared_a: [D_in, rank]` in
    `U(-sqrt(6/D_in), sqrt(6/D_in))`, `shared_b: [rank, D_out]` in `U(-sqrt(6/rank), sqrt(6/rank))`,
    where `D_in` and `D_out` are the largest sides among the sites. A site of `[d_in, d_out]` takes
    the first `d_in` rows of the one and the first `d_out` columns of the other. Trained are
    `d: [rank]`, which starts at `d_initial`, and `b: [d_out]`, which starts at zero, so a fresh
    adapter changes nothing: `rank + d_out` numbers a site. There is no alpha.

    `projection="stored"` keeps the projections once; `"seed"` keeps a key and draws the same
    numbers anew in each use, which trades time for memory. They follow from the key of `attach`,
    or from `seed`. All rules of one attach share them, and so must agree in rank and seed.

    Raises InputError for a rank that is no positive integer, a `d_initial` that is zero (nothing
    would ever learn: both gradients vanish), a dropout outside [0, 1) and an unknown projection.

    Source: Kopiczko et al. 2023, arXiv:2310.11454.

    >>> vera(rank=4)
    vera(rank=4)
    """
    check_positive_integers("vera", rank=rank)
    check_dropout("vera", dropout)
    check_choice("vera", "projection", projection, ("stored", "seed"))
    if d_initial == 0:
        raise InputError(
            "vera(d_initial=0): with d and b both zero no gradient is left; give 0.1, say"
        )

    def common(key: jax.Array, shapes: Shapes) -> tuple[Arrays, Arrays]:
        widest_in, widest_out = (max(s.shape[i] for s in shapes.values()) for i in (0, 1))
        dtype = jnp.result_type(jnp.float32, *(s.dtype for s in shapes.values()))
        key = key if seed is None else jax.random.key(seed)
        # not the caller's own key, whose kind a stored array could not tell
        held = {
            "projection_key": jax.random.bits(key, (2,), jnp.uint32),
            "bounds": jnp.asarray([math.sqrt(6 / widest_in), math.sqrt(6 / rank)], dtype),
        }
        if projection == "seed":
            return held, {}
        a, b = _drawn(held, rank, widest_in, widest_out)
        return {"shared_a": a, "shared_b": b}, {}

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        d, b = jnp.full(rank, d_initial, dtype), jnp.zeros(w.shape[1], dtype)
        return {"w": w}, {"d": d, "b": b}

    def projections(frozen: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        if projection == "seed":
            return _drawn(frozen, rank, d_in, d_out)
        return frozen["shared_a"][:d_in], frozen["shared_b"][:, :d_out]

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        a, b = projections(frozen)
        return a * trained["d"][None], b * trained["b"][None]

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        a, b = product(frozen, trained)
        return frozen["w"] + a @ b

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        a, b = projections(frozen)
        inner = x.dropout(dropout) @ a
        inner = inner * x.rows(trained["d"].astype(inner.dtype))
        update = inner @ b.astype(x.dtype)
        return x @ frozen["w"] + update * x.rows(trained["b"].astype(update.dtype))

    hyper = {
        "rank": rank,
        "d_initial": float(d_initial),
        "seed": seed,
        "projection": projection,
        "dropout": float(dropout),
    }
    return Method("vera", start, weight, apply, hyper, common=common, factors=product, factory=vera)


def _drawn(frozen: Arrays, rank: int, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
    """Leading rows `[d_in, rank]` and columns `[rank, d_out]` of the projections that a key gives.

    Every row (or column) has a key of its own, so it is the same whatever number is drawn.
    """
    bounds = frozen["bounds"]
    key = jax.random.wrap_key_data(frozen["projection_key"], impl="threefry2x32")

    def rows(key: jax.Array, count: int) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        draw = lambda key: jax.random.uniform(key, (rank,), bounds.dtype, -1, 1)  # noqa: E731
        return jax.vmap(draw)(keys)

    of_a, of_b = jax.random.split(key)
    return bounds[0] * rows(of_a, d_in), bounds[1] * rows(of_b, d_out).T
