"""A fresh classification head over a network's features."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.models.network import Network

_DEVIATION = 0.02


def with_head(
    network: Network,
    classes: int,
    key: jax.Array,
    features: Callable[..., jax.Array] | None = None,
) -> Network:
    """The network with logits [B, C] = features(params, *inputs) @ head/kernel + head/bias.

    `features` defaults to `network.features`; its width is found by tracing it on
    `network.inputs`. The kernel [D, C] is drawn from N(0, 0.02^2), the bias [C] is zero. Raises
    InputError for fewer than two classes, features that are not [B, D], or a second head.

    >>> network = Network(lambda params, x: x @ params["w"], {"w": jnp.eye(3)}, config=None,
    ...                   inputs=(jax.ShapeDtypeStruct((2, 3), jnp.float32),))
    >>> headed = with_head(network, 4, jax.random.key(0), features=network.apply)
    >>> headed.apply(headed.params, jnp.ones((5, 3))).shape
    (5, 4)
    """
    read = features or network.features
    if read is None:
        raise InputError("this network names no features; give with_head(..., features=...)")
    if classes < 2:
        raise InputError(f"a head tells at least 2 classes apart, got classes={classes}")
    if "head" in network.params:
        raise InputError("the network has a parameter 'head' already; give the one before it")
    kernel = _DEVIATION * jax.random.normal(key, (_width(read, network), classes), jnp.float32)

    def apply(params: dict[str, Any], *inputs: Any, **named: Any) -> jax.Array:
        """`inputs` as the network's -> float32 logits [B, C]."""
        body = {name: value for name, value in params.items() if name != "head"}
        head, x = params["head"], read(body, *inputs, **named)
        logits = x @ head["kernel"].astype(x.dtype)
        return logits.astype(jnp.float32) + jax.lax.broadcast(head["bias"], logits.shape[:-1])

    head = {"kernel": kernel, "bias": jnp.zeros((classes,), jnp.float32)}
    return dataclasses.replace(network, apply=apply, params={**network.params, "head": head})


def _width(features: Callable[..., Any], network: Network) -> int:
    if not network.inputs:
        raise InputError("this network has no example inputs; set Network.inputs to trace it on")
    shape = jax.eval_shape(features, network.params, *network.inputs).shape
    if len(shape) != 2:
        raise InputError(f"a head reads features [B, D], these are {list(shape)}; pool them first")
    return shape[1]
