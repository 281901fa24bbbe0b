"""Optimizer moments in host memory, brought to the device for the update alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def in_host_memory(
    optimizer: optax.GradientTransformation, *, smallest: int = 100_000
) -> optax.GradientTransformation:
    """The same optimizer with the large arrays of its state in pinned host memory.

    Arrays of `smallest` numbers or more rest in host memory between steps; `update` brings them to
    the device, runs the optimizer as it is, and takes them back, inside `jit` or outside. The
    arithmetic is unchanged, so the trajectory is the same bit for bit. `host_bytes` of the state
    is what moves each way at every step. Works inside `make_step`. A device without a memory of
    its own (a CPU) keeps them under the kind `pinned_host` all the same.

    The idea is that of paged optimizers: Dettmers et al. 2023, arXiv:2305.14314, section 3, with
    the same size of 100,000 from which on arrays leave the device.

    >>> optimizer = in_host_memory(optax.adam(1e-3), smallest=4)
    >>> state = optimizer.init({"a": jax.numpy.ones((2, 3)), "b": jax.numpy.ones(2)})
    >>> host_bytes(state)
    48
    """

    def move(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if large(x) else x, state)

    def large(x: Any) -> bool:
        return x.ndim > 0 and math.prod(x.shape) >= smallest

    def init(params: Any) -> Any:
        return move(optimizer.init(params), HOST)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, move(state, DEVICE), params)
        return updates, move(state, HOST)

    return optax.GradientTransformation(init, update)


def host_bytes(state: Any) -> int:
    """The bytes of a state that rest in host memory: a step moves them there and back once.

    >>> host_bytes({"m": jax.device_put(jax.numpy.ones((3, 4)), HOST), "n": jax.numpy.ones(5)})
    48
    """
    held = [x for x in jax.tree.leaves(state) if _kind(x) == "pinned_host"]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in held)


def _kind(x: Any) -> str | None:
    return getattr(getattr(x, "sharding", None), "memory_kind", None)
