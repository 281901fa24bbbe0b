"""Bottleneck adapters after a kernel: a small network on its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def houlsby(size: int = 64, *, activation: str = "gelu", near_identity: str = "zero") -> Method:
    """A bottleneck adapter: `y = h + f(h down + down_bias) up + up_bias`, `h = x w`.

    `down: [d_out, size]`, `up: [size, d_out]`, `f` the activation ("gelu", "relu", "silu" or
    "tanh"). Being no linear function of `x`, it has no matrix: it runs factored only and cannot be
    merged. `near_identity="zero"` starts `up` at zero, so a fresh adapter changes nothing;
    `"normal"` draws both matrices from N(0, 0.01^2), cut at two deviations, as the authors do
    (`down` is drawn so in either case). Biases start at zero. Trains
    `2 d_out size + size + d_out` numbers.

    Which kernels take it names the variant. Houlsby et al. put one after the attention's output
    projection and one after the feed-forward's second kernel, before the residual sums; Pfeiffer
    et al. only the latter. Both train the norms too:

    ```
    {".*/(o_proj|down_proj)/kernel": houlsby(64), ".*norm/.*": full()}   # Houlsby
    {".*/down_proj/kernel": houlsby(64), ".*norm/.*": full()}            # Pfeiffer
    ```

    Where the model adds a bias `c` after the kernel, the paper's adapter reads `x w + c`. This one
    reads `x w`; the difference, `c down`, is a vector that `down_bias` takes up, so the functions
    that training can reach are the same.

    Raises InputError for a size that is no positive integer and for unknown names.

    Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247.

    >>> houlsby(size=16, activation="relu")
    houlsby(size=16, activation='relu')
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"houlsby(size={size!r}): the bottleneck's width; give size >= 1")
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise InputError(f"houlsby(activation={activation!r}): unknown; give one of {known}")
    if near_identity not in ("zero", "normal"):
        raise InputError(
            f"houlsby(near_identity={near_identity!r}): unknown start; give 'zero' or 'normal'"
        )
    f = ACTIVATIONS[activation]

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        d_out, dtype = w.shape[1], jnp.promote_types(w.dtype, jnp.float32)
        first, second = jax.random.split(key)
        up = jnp.zeros((size, d_out), dtype)
        trained = {
            "down": _small(first, (d_out, size), dtype),
            "down_bias": jnp.zeros(size, dtype),
            "up": up if near_identity == "zero" else _small(second, up.shape, dtype),
            "up_bias": jnp.zeros(d_out, dtype),
        }
        return {"w": w}, trained

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        h = x @ frozen["w"]
        down, up = (trained[name].astype(h.dtype) for name in ("down", "up"))
        biases = ("down_bias", "up_bias")
        down_bias, up_bias = (x.rows(trained[name].astype(h.dtype)) for name in biases)
        return h + f(h @ down + down_bias) @ up + up_bias

    hyper = {"size": size, "activation": activation, "near_identity": near_identity}
    return Method("houlsby", init, apply=apply, hyper=hyper, factory=houlsby)


def _small(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """N(0, 0.01^2) cut at two deviations."""
    return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
