"""MiSS (Bone): one small matrix repeated along the inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.ranges import check_dropout, check_positive_integers
from lora_jax.methods.update import with_update


def miss(
    rank: int = 64, *, mini_rank: int | None = None, bat: bool = False, dropout: float = 0.0
) -> Method:
    """Matrix shard sharing: `y = x w + (drop(x) e) m`, `e[i, j] = 1` where `i = j (mod rank)`.

    `m: [rank, d_out]` is trained and starts at zero, so a fresh adapter changes nothing. The update
    is `m` repeated along the inputs, cut off at `d_in`, and `x e` sums the inputs over runs of
    `rank`. With `mini_rank` it is `m: [rank, mini_rank]`, repeated along the outputs too. With
    `bat` it is `m: [d_out / rank, rank, rank]` and depends on the kernel: in `rank x rank` blocks,
    `w'[i, o] = w[i, o] + m[o] (w[i, o] + 1)`, `1` the identity; `w'` is formed. There is no alpha.
    Trains `rank d_out`, or `rank mini_rank`, numbers.

    Raises InputError for a rank or mini_rank that is no positive integer, for both options at once,
    for dropout with `bat` or outside [0, 1), for a rank above `d_in`, a mini_rank that does not
    divide `d_out`, and with `bat` for a rank that does not divide both sides.

    Source: Kang and Yin 2024, arXiv:2409.15371 (Bone: Block-Affine Adaptation; since MiSS).

    >>> miss(rank=4)
    miss(rank=4)
    """
    check_positive_integers("miss", rank=rank)
    check_dropout("miss", dropout)
    if mini_rank is not None:
        check_positive_integers("miss", mini_rank=mini_rank)
    if bat and (mini_rank is not None or dropout):
        option = f"mini_rank={mini_rank}" if mini_rank is not None else f"dropout={dropout}"
        raise InputError(f"miss(bat=True, {option}): blocks that change w take no {option}")

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        _check_shape(w.shape, rank, mini_rank, bat)
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        d_out = w.shape[1]
        shape = (d_out // rank, rank, rank) if bat else (rank, mini_rank or d_out)
        return {"w": w}, {"m": jnp.zeros(shape, dtype)}

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        m = trained["m"]
        return _repeats(d_in, rank, m.dtype), jnp.tile(m, (1, d_out // m.shape[1]))

    def update(frozen: Arrays, trained: Arrays) -> jax.Array:
        w, m = frozen["w"], trained["m"]
        blocks = w.astype(m.dtype).reshape(-1, rank, len(m), rank)
        changed = jnp.einsum("okl,ilop->ikop", m, blocks) + m.swapaxes(0, 1)[None]
        return changed.reshape(w.shape)

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        if bat:
            return frozen["w"] + update(frozen, trained)
        a, b = product(frozen, trained)
        return frozen["w"] + a @ b

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        w, m = frozen["w"], trained["m"]
        if bat:
            return with_update(x, w, update(frozen, trained))
        d_in, d_out = w.shape
        y = (x.dropout(dropout) @ _repeats(d_in, rank, x.dtype)) @ m.astype(x.dtype)
        return x @ w + jnp.tile(y, (1, d_out // m.shape[1]))

    hyper = {"rank": rank, "mini_rank": mini_rank, "bat": bat, "dropout": float(dropout)}
    factors = None if bat else product
    return Method("miss", start, weight, apply, hyper, factors=factors, factory=miss)


def _repeats(d_in: int, rank: int, dtype: Any) -> jax.Array:
    """Identities of size `rank` below one another, cut off at `d_in` rows."""
    return (jnp.arange(d_in)[:, None] % rank == jnp.arange(rank)[None]).astype(dtype)


def _check_shape(shape: tuple[int, ...], rank: int, mini_rank: int | None, bat: bool) -> None:
    d_in, d_out = shape
    if rank > d_in:
        raise InputError(
            f"miss(rank={rank}): above the inputs of the kernel {[d_in, d_out]}; "
            f"give rank <= {d_in}"
        )
    if mini_rank and d_out % mini_rank:
        raise InputError(
            f"miss(mini_rank={mini_rank}): it must divide the outputs of the kernel "
            f"{[d_in, d_out]}; give a divisor of {d_out}"
        )
    if bat and (d_in % rank or d_out % rank):
        raise InputError(
            f"miss(rank={rank}, bat=True): rank must divide both sides of the kernel "
            f"{[d_in, d_out]}; give a common divisor"
        )
