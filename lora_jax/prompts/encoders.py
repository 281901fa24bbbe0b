"""The small networks that make virtual tokens while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp


def encoded(prompt: Mapping[str, Any], keys_values: bool) -> jax.Array:
    """What the network of a prompt makes of its embedding, which stays as it is without one.

    P-tuning's has relu between its layers, the one that makes keys and values tanh.
    """
    x = prompt["embedding"]
    for _, cells in sorted(prompt.get("lstm", {}).items()):
        back = jnp.flip(_lstm(cells["backward"], jnp.flip(x, 0)), 0)
        x = jnp.concatenate([_lstm(cells["forward"], x), back], axis=1)
    activation = jnp.tanh if keys_values else jax.nn.relu
    for name, layer in sorted(prompt.get("mlp", {}).items()):
        x = (activation(x) if name != "0" else x) @ layer["kernel"] + layer["bias"][None, :]
    return x


def _lstm(cell: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """`x` [n, D] -> the hidden state after each step [n, h]; gates in torch's order i, f, g, o."""
    driven = x @ cell["input"] + cell["bias"][None, :]
    zeros = jnp.zeros((cell["recurrent"].shape[0],), x.dtype)

    def step(memory: Any, driven: jax.Array) -> tuple[Any, jax.Array]:
        hidden, state = memory
        i, f, g, o = jnp.split(driven + hidden @ cell["recurrent"], 4)
        state = jax.nn.sigmoid(f) * state + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(state)
        return (hidden, state), hidden

    return jax.lax.scan(step, (zeros, zeros), driven)[1]


def _uniform(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)


def mlp_layers(key: jax.Array, sizes: Sequence[int]) -> dict[str, Any]:
    """Linear layers "0", "1", ... between these sizes."""
    layers = {}
    for i, (d_in, d_out) in enumerate(pairwise(sizes)):
        key, kernel, bias = jax.random.split(key, 3)
        drawn = {
            "kernel": _uniform(kernel, (d_in, d_out), d_in),
            "bias": _uniform(bias, (d_out,), d_in),
        }
        layers[str(i)] = drawn
    return layers


def lstm_layers(key: jax.Array, width: int, hidden: int, depth: int) -> dict[str, Any]:
    """Cells of a bidirectional LSTM, the first one reading `width` features."""
    layers: dict[str, Any] = {}
    for i in range(depth):
        d_in = width if i == 0 else 2 * hidden
        layers[str(i)] = {}
        for way in ("forward", "backward"):
            key, *keys = jax.random.split(key, 4)
            first, second, third = keys
            layers[str(i)][way] = {
                "input": _uniform(first, (d_in, 4 * hidden), hidden),
                "recurrent": _uniform(second, (hidden, 4 * hidden), hidden),
                "bias": _uniform(third, (4 * hidden,), hidden),
            }
    return layers
