"""Operations that only change how a parameter lies: it is followed through them.

Every rule takes the equation and returns what its outputs are, None where the parameter cannot be
followed further (mixing parts of an axis, repeating it inside one, cutting between two ends).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing._compat import run
from lora_jax.tracing.joined import Joined
from lora_jax.tracing.tracked import Equation, Followed, Handler, Tracked, company

Moved = list[Any] | None


def _same(at: Equation, handler: Handler) -> Moved:
    return list(at.values)


def _cast(at: Equation, handler: Handler) -> Moved:
    return [at.values[0].cast(at.params["new_dtype"])]


def _stop_gradient(at: Equation, handler: Handler) -> Moved:
    return [at.values[0].stopped()]


def _transpose(at: Equation, handler: Handler) -> Moved:
    return [at.values[0].transposed(at.params["permutation"])]


def _reshape(at: Equation, handler: Handler) -> Moved:
    if at.params["dimensions"] is not None:
        return None
    return _one(at.values[0].reshaped(at.params["new_sizes"]))


def _squeeze(at: Equation, handler: Handler) -> Moved:
    return [at.values[0].squeezed(at.params["dimensions"])]


def _broadcast(at: Equation, handler: Handler) -> Moved:
    return _one(at.values[0].expanded(at.params["shape"], at.params["broadcast_dimensions"]))


def _reverse(at: Equation, handler: Handler) -> Moved:
    return _one(at.values[0].flipped(at.params["dimensions"]))


def _slice(at: Equation, handler: Handler) -> Moved:
    """One layer of a stack by an index known to the program, or a part of an axis."""
    node, starts, strides = at.values[0], at.params["start_indices"], at.params["strides"]
    if strides is not None and any(stride != 1 for stride in strides):
        return None
    sizes = [b - a for a, b in zip(starts, at.params["limit_indices"], strict=True)]
    return _one(_cut(node, handler, starts, sizes))


def _dynamic_slice(at: Equation, handler: Handler) -> Moved:
    """One layer of a stack by an index that only the run knows."""
    node, starts = at.values[0], at.values[1:]
    return _one(_cut(node, handler, starts, at.params["slice_sizes"]))


def _split(at: Equation, handler: Handler) -> Moved:
    node, axis, start, outs = at.values[0], at.params["axis"], 0, []
    for size in map(int, at.params["sizes"]):
        outs.append(_window(node, handler, axis, start, start + size))
        start += size
    return None if any(out is None for out in outs) else outs


def _concatenate(at: Equation, handler: Handler) -> Moved:
    if not handler.joins(at):
        return None
    axis = at.params["dimension"]
    parts: list[Any] = []
    for value in at.values:
        node: Any = value if isinstance(value, Followed) else company(value)
        flat = isinstance(node, Joined) and node.axis == axis
        parts.extend(node.parts if flat else [node])
    return [Joined(tuple(parts), axis)]


def _pad(at: Equation, handler: Handler) -> Moved:
    """A parameter with constant rows or columns beside it."""
    node, value = at.values
    if isinstance(value, Followed):
        return None
    for axis, (low, high, between) in enumerate(at.params["padding_config"]):
        if between or low < 0 or high < 0:
            return None
        parts = [_constant(node, axis, low, value), node, _constant(node, axis, high, value)]
        parts = [part for part in parts if part.shape[axis] or part is node]
        node = node if len(parts) == 1 else Joined(tuple(parts), axis)
    return [node]


def _constant(node: Any, axis: int, size: int, value: Any) -> Tracked:
    shape = (*node.shape[:axis], size, *node.shape[axis + 1 :])
    return company(jnp.full(shape, value, node.dtype))


def _stack(at: Equation, handler: Handler) -> Moved:
    if not handler.joins(at):
        return None
    axis = at.params["axis"]
    nodes: list[Any] = [v if isinstance(v, Followed) else company(v) for v in at.values]
    shape = list(nodes[0].shape)
    kept = [i for i in range(len(shape) + 1) if i != axis]
    shape.insert(axis, 1)
    parts = [node.expanded(shape, kept) for node in nodes]
    return None if any(part is None for part in parts) else [Joined(tuple(parts), axis)]


def _unstack(at: Equation, handler: Handler) -> Moved:
    node, axis = at.values[0], at.params["axis"]
    parts = [node.indexed(axis, i) for i in range(node.shape[axis])]
    return None if any(part is None for part in parts) else [p.squeezed((axis,)) for p in parts]


def _varying(at: Equation, handler: Handler) -> Moved:
    """Inside a `shard_map`: an array that is the same on all devices counts as differing."""
    return [jax.tree.map(lambda x: run(at.jaxpr, at.eqn, [x])[0], value) for value in at.values]


def _select(at: Equation, handler: Handler) -> Moved:
    """A choice between a parameter and itself, as `vmap` over a branch makes it."""
    which, *cases = at.values
    last: Any = cases[-1]
    same = isinstance(last, Followed) and all(last.alike(case) for case in cases)
    return [last] if same and not isinstance(which, Followed) else None


def _barrier(at: Equation, handler: Handler) -> Moved:
    """A barrier over parameters and arrays together: the arrays still pass through one."""
    plain = [value for value in at.values if not isinstance(value, Followed)]
    held = iter(jax.lax.optimization_barrier(plain) if plain else ())
    return [value if isinstance(value, Followed) else next(held) for value in at.values]


def _one(node: Any) -> Moved:
    return None if node is None else [node]


def _cut(node: Any, handler: Handler, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
    cut = [i for i, size in enumerate(sizes) if size != node.shape[i]]
    cut = cut or [i for i, size in enumerate(sizes) if size == 1][:1]
    if len(cut) != 1:
        return node if not cut else None
    (axis,) = cut
    start, size = starts[axis], sizes[axis]
    indexed = node.indexed(axis, start) if size == 1 else None
    if indexed is not None or not isinstance(start, int):
        return indexed
    return _window(node, handler, axis, start, start + size)


def _window(node: Any, handler: Handler, axis: int, start: int, stop: int) -> Any:
    if (start, stop) == (0, node.shape[axis]):
        return node
    if isinstance(node, Tracked):
        return handler.window(node, axis, start, stop)
    if axis == node.axis:
        return node.window(start, stop)
    parts = [_window(part, handler, axis, start, stop) for part in node.parts]
    if any(part is None for part in parts):
        return None
    return replace(node, parts=tuple(parts))


FIRST = {
    "convert_element_type": _cast,
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "rev": _reverse,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "split": _split,
    "unstack": _unstack,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,  # the factors go where the compiler puts them
}
"""Rules for operations on one parameter, which is their first input."""

ANY = {
    "concatenate": _concatenate,
    "stack": _stack,
    "select_n": _select,
    "optimization_barrier": _barrier,
    "device_put": _same,
    "pvary": _varying,
    "pcast": _varying,
}
"""Rules for operations whose every input may be one."""


def moves(at: Equation) -> bool:
    """Whether an operation is a change of layout."""
    return at.name in ANY or at.name in FIRST


def follow(at: Equation, handler: Handler) -> Moved:
    """The outputs of a change of layout, None where a parameter cannot be followed further."""
    if at.name in ANY:
        return ANY[at.name](at, handler)
    return FIRST[at.name](at, handler) if isinstance(at.values[0], Followed) else None
