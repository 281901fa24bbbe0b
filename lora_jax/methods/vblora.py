"""VB-LoRA: both factors put together from one bank of short vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method, Shapes
from lora_jax.methods.ranges import check_dropout, check_positive, check_positive_integers
from lora_jax.methods.update import by_product


def vblora(
    rank: int = 4,
    vectors: int = 256,
    length: int = 256,
    top_k: int = 2,
    *,
    bank_bound: float = 0.02,
    logits_std: float = 0.1,
    dropout: float = 0.0,
) -> Method:
    """Vector bank: `y = x w + (drop(x) a) b`, every piece of `a` and `b` a mixture of bank rows.

    `bank: [vectors, length]` is trained and common to all sites. Each run of `length` numbers of a
    column of `a: [d_in, rank]` or a row of `b: [rank, d_out]` is
    `sum_k softmax(top logits)_k bank[top_k]`, over the `top_k` largest of its `vectors` logits:
    `logits_a: [rank, d_in / length, vectors]`, `logits_b: [d_out / length, rank, vectors]`.
    Gradients reach the chosen logits and rows alone. The bank starts at `U(-bank_bound,
    bank_bound)`, the logits at `N(0, logits_std^2)`: a fresh adapter is a tiny update, not none.
    There is no alpha. Trains `vectors length` numbers, and `rank (d_in + d_out) / length vectors`
    a site.

    Raises InputError for sizes that are no positive integers, more of them chosen than there are,
    a bound or deviation that is not positive, a dropout outside [0, 1), and a kernel with a side
    that `length` does not divide.

    Source: Li et al. 2024, arXiv:2405.15179.

    >>> vblora(rank=2, vectors=8, length=4)
    vblora(rank=2, vectors=8, length=4)
    """
    sizes = {"rank": rank, "vectors": vectors, "length": length, "top_k": top_k}
    check_positive_integers("vblora", **sizes)
    check_positive("vblora", bank_bound=bank_bound, logits_std=logits_std)
    check_dropout("vblora", dropout)
    if top_k > vectors:
        raise InputError(
            f"vblora(top_k={top_k}): more rows than the bank's vectors={vectors}; give fewer"
        )

    def common(key: jax.Array, shapes: Shapes) -> tuple[Arrays, Arrays]:
        dtype = jnp.result_type(jnp.float32, *(s.dtype for s in shapes.values()))
        bank = jax.random.uniform(key, (vectors, length), dtype, -bank_bound, bank_bound)
        return {}, {"bank": bank}

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        if any(side % length for side in w.shape):
            raise InputError(
                f"vblora(length={length}): it must divide both sides of the kernel "
                f"{list(w.shape)}; give a common divisor of all sides, or leave this path out"
            )
        (d_in, d_out), (of_a, of_b) = w.shape, jax.random.split(key)
        draw = lambda key, shape: logits_std * jax.random.normal(key, shape, dtype)  # noqa: E731
        return {"w": w}, {
            "logits_a": draw(of_a, (rank, d_in // length, vectors)),
            "logits_b": draw(of_b, (d_out // length, rank, vectors)),
        }

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        d_in, d_out = frozen["w"].shape
        a = _mixed(trained["logits_a"], trained["bank"], top_k).reshape(-1, d_in).T
        b = jnp.swapaxes(_mixed(trained["logits_b"], trained["bank"], top_k), 0, 1)
        return a, b.reshape(-1, d_out)

    weight, apply = by_product(product, dropout)
    hyper = {
        **sizes,
        "bank_bound": float(bank_bound),
        "logits_std": float(logits_std),
        "dropout": float(dropout),
    }
    return Method(
        "vblora", start, weight, apply, hyper, common=common, factors=product, factory=vblora
    )


def _mixed(logits: jax.Array, bank: jax.Array, top_k: int) -> jax.Array:
    """The mixture of bank rows that the last axis of the logits chooses, `[..., length]`."""
    top, rows = jax.lax.top_k(logits, top_k)
    return jnp.einsum("...k,...kl->...l", jax.nn.softmax(top), bank[rows])
