"""BOFT: the kernel's input side turned by a butterfly of block rotations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.oft import cayley_exact, check_block, turned


def boft(block_size: int = 4, *, factors: int = 1) -> Method:
    """Butterfly orthogonal finetuning: `w' = (F_m ... F_2 F_1 w) s`.

    There are `m = factors` factors `F_i = P_i blockdiag(R_i1, R_i2, ...) P_i^T` with rotations
    `R_ik = (1 - S) (1 + S)^-1`, `S = (r - r^T) / 2` for `r[i - 1, k - 1]: [b, b]`, of
    `b = block_size` features. `P_1 = 1`; `P_i` cuts each group of `b 2^(i - 1)` features into
    chunks of `b / 2` and lists the even chunks before the odd ones, so that m factors mix
    `b 2^(m - 1)` features. `s: [d_out]` scales the outputs (not the model's bias). `r` starts at
    zero and `s` at one: a fresh adapter changes nothing. Trains `m d_in b + d_out` numbers, with
    the symmetric half of `r`, which does nothing. On CPUs PEFT silently takes one factor; here
    `factors` is what it says.

    Raises InputError for a block of fewer than two features, a number of factors that is no
    positive integer, an odd block with several factors, and a kernel whose `d_in` is no multiple
    of `b 2^(m - 1)`.

    Source: Liu et al. 2023, arXiv:2311.06243.

    >>> boft(block_size=8, factors=2)
    boft(block_size=8, factors=2)
    """
    check_block("boft", block_size)
    if isinstance(factors, bool) or not isinstance(factors, int) or factors < 1:
        raise InputError(f"boft(factors={factors!r}): how many rotations follow one another; >= 1")
    if factors > 1 and block_size % 2:
        raise InputError(
            f"boft(block_size={block_size}, factors={factors}): the butterfly deals out half "
            "blocks; give an even block_size, or factors=1"
        )
    group = block_size * 2 ** (factors - 1)

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        d_in, d_out = w.shape
        if d_in % group:
            raise InputError(
                f"boft(block_size={block_size}, factors={factors}) turns groups of {group} input "
                f"features, and a kernel of {tuple(w.shape)} has {d_in}; give smaller ones"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        shape = (factors, d_in // block_size, block_size, block_size)
        return {"w": w}, {"r": jnp.zeros(shape, dtype), "s": jnp.ones(d_out, dtype)}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        w = frozen["w"]
        for i, r in enumerate(trained["r"]):
            rotations = cayley_exact((r - jnp.swapaxes(r, 1, 2)) / 2)
            order = butterfly(w.shape[0], block_size, i)
            w = turned(rotations, w[np.argsort(order)])[order]
        return w * trained["s"][None, :]

    # No `apply`, as in oft: one product with a kernel formed at m b / T of its cost.
    hyper = {"block_size": block_size, "factors": factors}
    return Method("boft", init, weight, hyper=hyper, splits=("out",), factory=boft)


def butterfly(d_in: int, block_size: int, level: int) -> np.ndarray:
    """The order of features in factor `level` (from 0): `(P z)[j] = z[order[j]]`.

    >>> butterfly(8, 4, 0).tolist(), butterfly(8, 4, 1).tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7])
    """
    if level == 0:
        return np.arange(d_in)
    chunks = np.arange(d_in).reshape(-1, 2**level, 2, block_size // 2)  # group, pair, parity, chunk
    return chunks.swapaxes(1, 2).reshape(-1)
