"""OFT: the kernel's input side turned in blocks."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method


def oft(
    block_size: int = 32,
    *,
    cayley: str = "neumann",
    block_share: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    strict: bool = False,
) -> Method:
    """Orthogonal finetuning: `w' = R w` with `R` block diagonal, `R_k: [block_size, block_size]`.

    With `b = block_size`, each block follows from a skew matrix `Q_k` by the Cayley map, its upper
    triangle being the trained row `q[k]` of `b (b - 1) / 2` numbers (row by row).
    `cayley="exact"` is `R_k = (1 - Q_k) (1 + Q_k)^-1`, so that `w'^T w' = w^T w`;
    `cayley="neumann"` is `R_k = 1 + 2 Q_k + 2 Q_k^2 + 2 Q_k^3 + Q_k^4`, close to orthogonal for
    small `Q_k` only, and close to the *transpose* of the exact one. Both are as in PEFT: never
    change between training and use. `block_share` gives all blocks one `q: [1, ...]`. `coft` keeps
    each `Q_k` in the ball of radius `eps / sqrt(blocks)` (Frobenius norm) at every use; its
    gradient is that at the projected point, as in PEFT, which overwrites the trained array by it.

    `q` starts at zero: `R = 1` exactly. Where `b` does not divide `d_in` the nearest divisor takes
    its place (the smaller of two), with a warning, or an error if `strict` or if that is 1. On an
    embedding rows of the table are mixed in blocks of `b`. Trains `(d_in / b) b (b - 1) / 2`
    numbers.

    Raises InputError for a block of fewer than two features, an unknown `cayley`, an `eps` that
    is not positive, and with `strict` for a kernel that has no such blocks.

    Sources: Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847 (Neumann).

    >>> oft(block_size=4, cayley="exact")
    oft(block_size=4, cayley='exact')
    """
    check_block("oft", block_size)
    if cayley not in ("neumann", "exact"):
        raise InputError(f"oft(cayley={cayley!r}): unknown map; give 'neumann' or 'exact'")
    if not eps > 0:
        raise InputError(f"oft(eps={eps!r}): the radius of the ball is positive; give eps > 0")

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        b = _fitting(block_size, tuple(w.shape), strict)
        blocks = 1 if block_share else w.shape[0] // b
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        return {"w": w}, {"q": jnp.zeros((blocks, b * (b - 1) // 2), dtype)}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        q = trained["q"]
        skew = _skew(projected(q, eps) if coft else q)
        blocks = cayley_exact(skew) if cayley == "exact" else cayley_neumann(skew)
        return turned(blocks, frozen["w"])

    # No `apply`: x @ (R w) is one product with a kernel formed at b / T of its cost (T rows of x).
    # Keeping the base's term apart, x @ w + x @ ((R - 1) w), would take two products forward and
    # two more backward, and R = 1 leaves w as it is, so a fresh adapter is neutral without that.
    hyper = {
        "block_size": block_size,
        "cayley": cayley,
        "block_share": block_share,
        "coft": coft,
        "eps": eps,
        "strict": strict,
    }
    return Method("oft", init, weight, hyper=hyper, splits=("out",), factory=oft)


def turned(blocks: jax.Array, w: jax.Array) -> jax.Array:
    """`R w` for block diagonal `R`: each run of b rows by its block; one block serves all runs.

    >>> turned(jnp.array([[[0.0, 1.0], [-1.0, 0.0]]]), jnp.arange(4.0)[:, None]).T
    Array([[ 1.,  0.,  3., -2.]], dtype=float32)
    """
    b = blocks.shape[-1]
    runs = w.astype(jnp.promote_types(w.dtype, blocks.dtype)).reshape(-1, b, w.shape[-1])
    return jnp.matmul(blocks, runs, precision="highest").reshape(w.shape)


def cayley_exact(skew: jax.Array) -> jax.Array:
    """`(1 - Q) (1 + Q)^-1` of skew matrices `[..., b, b]`: rotations."""
    one = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    return jnp.linalg.solve(one + skew, one - skew)  # the two factors commute


def cayley_neumann(skew: jax.Array) -> jax.Array:
    """`1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4`: PEFT's five terms of `(1 + Q) (1 - Q)^-1`."""
    one = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    square = jnp.matmul(skew, skew, precision="highest")
    return one + 2 * skew + jnp.matmul(square, 2 * one + 2 * skew + square, precision="highest")


def projected(q: jax.Array, eps: float) -> jax.Array:
    """`q` with each block's skew matrix in the ball of radius `eps / sqrt(blocks)`.

    The derivative is one, as if `q` had been there already.
    """
    radius = eps / math.sqrt(q.shape[0])
    norm = jnp.sqrt(2 * jnp.sum(jnp.square(q), axis=1, keepdims=True))  # both triangles
    inside = jnp.where(norm > radius, q * (radius / jnp.maximum(norm, radius)), q)
    return q + jax.lax.stop_gradient(inside - q)


def check_block(name: str, block_size: int) -> None:
    """Raise InputError for a block that has no rotation."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
        raise InputError(
            f"{name}(block_size={block_size!r}): a rotation turns 2 features or more; "
            "give block_size >= 2"
        )


def _skew(q: jax.Array) -> jax.Array:
    """Skew matrices `[blocks, b, b]` from their upper triangles `[blocks, b (b - 1) / 2]`."""
    b = (1 + math.isqrt(1 + 8 * q.shape[1])) // 2
    rows, columns = jnp.triu_indices(b, 1)
    upper = jnp.zeros((q.shape[0], b, b), q.dtype).at[:, rows, columns].set(q)
    return upper - jnp.swapaxes(upper, 1, 2)


def _fitting(block: int, shape: tuple[int, ...], strict: bool) -> int:
    """The divisor of `d_in` that is nearest to the block size."""
    d_in = shape[0]
    if d_in % block == 0:
        return block
    divisors = [b for b in range(1, d_in + 1) if d_in % b == 0]
    nearest = min(divisors, key=lambda b: abs(b - block))
    problem = f"oft(block_size={block}) does not divide the {d_in} input features of {shape}"
    if strict:
        raise InputError(f"{problem}; give one of {divisors[1:]}, or strict=False")
    if nearest == 1:
        raise InputError(
            f"{problem}, and blocks of 1 have nothing to turn; give one of {divisors[1:]}"
        )
    warnings.warn(f"{problem}; {nearest} is taken instead", stacklevel=4)
    return nearest
