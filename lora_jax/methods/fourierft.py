"""FourierFT: a few trained frequencies of the update's spectrum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.ranges import check_choice, check_positive, check_positive_integers
from lora_jax.methods.update import with_update
from lora_jax.torch_random import randperm


def fourierft(
    n: int = 1000, alpha: float = 150.0, *, seed: int = 777, init: str = "normal"
) -> Method:
    """Fourier fine-tuning: `w' = w + alpha Re(ifft2(f))`, `f` zero but at `n` entries `c`.

    `c: [n]` is trained; its places in the spectrum `[d_in, d_out]` are random, and the same for
    every kernel of a shape: they follow from `seed` as PEFT's do, `p` of the first `n` of
    `torch.randperm(d_in d_out)` standing for row `p % d_in`, column `p // d_in`. A frequency
    `(v, u)` adds `alpha c / (d_in d_out) cos(2 pi (v i / d_in + u j / d_out))`, a product of rank
    two; so few of them run as thin products (`4 n < min(d_in, d_out)`), and more are formed. `c`
    starts at `N(0, 1)` (`init="normal"`, PEFT's: a fresh adapter is not neutral) or at zero
    (`"zeros"`). Trains `n` numbers a kernel.

    Raises InputError for an n that is no positive integer, an alpha that is not positive, an
    unknown init, and a kernel of fewer than n entries, or of more than torch_random.randperm takes.

    Source: Gao et al. 2024, arXiv:2405.03003.

    >>> fourierft(n=6, init="zeros")
    fourierft(n=6, alpha=150.0, init='zeros')
    """
    check_positive_integers("fourierft", n=n)
    check_positive("fourierft", alpha=alpha)
    check_choice("fourierft", "init", init, ("normal", "zeros"))

    def start(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        if n > w.shape[0] * w.shape[1]:
            raise InputError(
                f"fourierft(n={n}): more than the entries of the kernel {list(w.shape)}; give fewer"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        c = jax.random.normal(key, (n,), dtype) if init == "normal" else jnp.zeros(n, dtype)
        return {"w": w, "scale": jnp.asarray(alpha, dtype)}, {"c": c}

    def update(frozen: Arrays, trained: Arrays) -> jax.Array:
        c, shape = trained["c"], frozen["w"].shape
        spectrum = jnp.zeros(shape, c.dtype).at[_places(shape, n, seed)].set(c)
        return frozen["scale"] * jnp.fft.ifft2(spectrum).real

    def product(frozen: Arrays, trained: Arrays) -> tuple[jax.Array, jax.Array]:
        (d_in, d_out), c = frozen["w"].shape, trained["c"]
        rows, columns = _places((d_in, d_out), n, seed)
        cos_in, sin_in = _waves(d_in, rows, c.dtype)
        cos_out, sin_out = _waves(d_out, columns, c.dtype)
        c = frozen["scale"] / (d_in * d_out) * c[None]
        return jnp.hstack([cos_in, sin_in]), jnp.hstack([c * cos_out, -c * sin_out]).T

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"] + update(frozen, trained)

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        w = frozen["w"]
        if 4 * n >= min(w.shape):
            return with_update(x, w, update(frozen, trained))
        a, b = product(frozen, trained)
        return x @ w + (x @ a) @ b.astype(x.dtype)

    hyper = {"n": n, "alpha": float(alpha), "seed": seed, "init": init}
    return Method("fourierft", start, weight, apply, hyper, factors=product, factory=fourierft)


def _places(shape: tuple[int, ...], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the trained entries in the spectrum, `[n]` each."""
    d_in, d_out = shape
    places = np.asarray(randperm(d_in * d_out, n, seed))
    return places % d_in, places // d_in


def _waves(size: int, frequencies: np.ndarray, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`cos` and `sin` of `2 pi f t / size`, `[size, n]`, with whole turns taken off exactly."""
    t, f = jnp.arange(size)[:, None], jnp.asarray(frequencies, jnp.int32)[None]
    high = t * (f >> 8) % size * 256  # in two steps, as t f may exceed 32 bits
    turns = ((high + t * (f & 255)) % size).astype(dtype) / size
    return jnp.cos(2 * jnp.pi * turns), jnp.sin(2 * jnp.pi * turns)
