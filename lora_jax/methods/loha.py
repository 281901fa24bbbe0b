"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.method import Arrays, Method
from lora_jax.methods.ranges import check_positive, check_positive_integers
from lora_jax.methods.update import with_update


def loha(rank: int = 8, alpha: float = 8.0) -> Method:
    """Low-rank Hadamard product: `w' = w + s (a1 b1) * (a2 b2)`, `s = alpha / rank`.

    `a1, a2: [d_in, rank]`, `b1, b2: [rank, d_out]`. The update has a rank of up to `rank^2`: it is
    `a b` with `a[i, pq] = s a1[i, p] a2[i, q]` and `b[pq, j] = b1[p, j] b2[q, j]`. Used that way
    where `3 rank^2 <= d_out`, else formed. `a2` starts at zero, so a fresh adapter changes nothing;
    the others at `U(-1/sqrt(n), 1/sqrt(n))`, `n` their first side. Trains
    `2 rank (d_in + d_out)` numbers.

    Raises InputError for a rank that is no positive integer and an alpha that is not positive.

    Sources: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara); Yeh et al. 2023, arXiv:2309.14859
    (LyCORIS).

    >>> loha(rank=4, alpha=8)
    loha(rank=4, alpha=8.0)
    """
    check_positive_integers("loha", rank=rank)
    check_positive("loha", alpha=alpha)

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        (d_in, d_out), (k1, k2, k3) = w.shape, jax.random.split(key, 3)
        draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        trained = {
            "a1": draw(k1, (d_in, rank), dtype),
            "b1": draw(k2, (rank, d_out), dtype),
            "a2": jnp.zeros((d_in, rank), dtype),
            "b2": draw(k3, (rank, d_out), dtype),
        }
        return {"w": w, "scale": jnp.asarray(alpha / rank, dtype)}, trained

    def update(frozen: Arrays, t: Arrays) -> jax.Array:
        return frozen["scale"] * (t["a1"] @ t["b1"]) * (t["a2"] @ t["b2"])

    def product(frozen: Arrays, t: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        a = t["a1"][:, :, None] * t["a2"][:, None, :]
        b = t["b1"][:, None, :] * t["b2"][None, :, :]
        return frozen["scale"] * a.reshape(d_in, -1), b.reshape(-1, d_out)

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"] + update(frozen, trained)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        w = frozen["w"]
        if 3 * rank**2 > w.shape[1]:
            return with_update(x, w, update(frozen, trained))
        a, b = product(frozen, trained)
        return x @ w + (x @ a) @ b.astype(x.dtype)

    return Method(
        "loha",
        start,
        weight,
        apply,
        {"rank": rank, "alpha": float(alpha)},
        factors=product,
        splits=("in", "out"),
        factory=loha,
    )
