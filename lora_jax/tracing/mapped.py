"""`shard_map`: inside it every device holds its part of a parameter, and of what rides along."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from lora_jax.tracing._compat import shard_map_parts
from lora_jax.tracing.axes import Atom, Dims
from lora_jax.tracing.tracked import Equation, Followed, Handler, Tracked

Body = Callable[..., Callable[..., list[Any]]]


def shard_map(at: Equation, handler: Handler, body: Body) -> list[Any] | None:
    """The same `shard_map` over the parts of each parameter's arrays that its spec gives a device.

    An axis is cut as the parameter's spec says; `handler.shard` says what follows for the riders.
    """
    parts = shard_map_parts(at.eqn)
    specs, makers = [], []
    for value, spec in zip(at.values, parts.in_specs, strict=True):
        if not isinstance(value, Followed):
            specs.append(spec)
            makers.append(lambda x: x)
            continue
        if not isinstance(value, Tracked):
            return None
        shards = _shards(value, spec, parts.mesh)
        if shards is None:
            return None
        local, value_spec = _localised(value, shards), jax.sharding.PartitionSpec(*spec)
        label, riders = handler.shard(value, shards)
        specs.append(replace(value, value=value_spec, riders=riders))
        dims, stack, gone = local
        changes = {"dims": dims, "stack": stack, "gone": gone, "label": label}
        makers.append(lambda x, changes=changes: replace(x, **changes))
    run = body(parts.body)

    def mapped(*values: Any) -> list[Any]:
        outs = run(*(make(x) for make, x in zip(makers, values, strict=True)))
        return [handler.output(x) if isinstance(x, Followed) else x for x in outs]

    options = {"in_specs": tuple(specs), "out_specs": list(parts.out_specs), **parts.options}
    return jax.shard_map(mapped, mesh=parts.mesh, **options)(*at.values)


class Shards(dict[Atom, tuple[tuple[str, ...], int]]):
    """Which atoms of a parameter are cut: the mesh axes that cut each, and into how many parts."""

    def cut(self, atom: Atom) -> Atom | None:
        """A device's part of an atom; None where that is no single run of indices."""
        for whole, (_, count) in self.items():
            if whole.axis != atom.axis or not _overlap(whole, atom):
                continue
            if whole.stride * whole.size != atom.stride * atom.size or whole.stride < atom.stride:
                return None
            return Atom(atom.axis, atom.stride, atom.size // count)
        return atom

    def grown(self, atom: Atom) -> Atom:
        """The whole of which an atom is a device's part: the inverse of `cut`."""
        for whole, (_, count) in self.items():
            grown = Atom(atom.axis, atom.stride, atom.size * count)
            if _overlap(whole, atom) and whole.stride * whole.size == grown.stride * grown.size:
                return grown
        return atom

    def names(self, atoms: tuple[Atom, ...]) -> tuple[str, ...]:
        """The mesh axes that cut any of some atoms."""
        cut = [
            names for whole, (names, _) in self.items() if any(_overlap(whole, a) for a in atoms)
        ]
        return tuple(name for names in cut for name in names)


def _shards(tracked: Tracked, spec: Any, mesh: Any) -> Shards | None:
    shards = Shards()
    for axis, entry in zip(tracked.dims, spec, strict=False):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        count = math.prod(mesh.shape[name] for name in names)
        if count == 1:
            continue
        if len(axis) != 1:
            return None
        shards[axis[0]] = tuple(names), count
    atoms = {*(tracked.stack or ()), *(atom for axis in tracked.dims for atom in axis)}
    return None if any(shards.cut(atom) is None for atom in atoms) else shards


def _localised(tracked: Tracked, shards: Shards) -> tuple[Dims, Any, Any]:
    def cut(atoms: Any) -> Any:
        return None if atoms is None else tuple(shards.cut(atom) for atom in atoms)

    return tuple(cut(axis) for axis in tracked.dims), cut(tracked.stack), tracked.gone


def _overlap(left: Atom, right: Atom) -> bool:
    """Whether two atoms share an axis and begin within each other; an atom may have size one."""
    first, second = sorted((left, right), key=lambda atom: atom.stride)
    within = second.stride < first.stride * first.size or first.stride == second.stride
    return left.axis == right.axis and within
