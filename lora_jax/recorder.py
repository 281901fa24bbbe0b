"""What a trace tells of every parameter: the products that use it, and everything else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_jax.errors import InputError
from lora_jax.tracing import axes
from lora_jax.tracing._compat import source_line
from lora_jax.tracing.axes import Atom, Dims, View
from lora_jax.tracing.joined import leaves
from lora_jax.tracing.tracked import Equation, Followed, Tracked, Use, stateful

STACKS = {"dense": "batch", "ragged": "experts", "conv": "groups", "lookup": ""}
"""What a stack axis that comes from a product is called, by the product."""


INPUT = -1
"""The mark of arrays that depend on the inputs; loops count from 0."""

_ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "clamp"),
    *("pow", "integer_pow", "square", "sqrt", "rsqrt", "exp", "log", "tanh", "logistic"),
    *("select_n", "round", "floor", "ceil", "reduce_precision"),
}


class Part(NamedTuple):
    """Indices `start` to `stop` along one axis of a parameter."""

    leaf: str
    axis: int
    start: int
    stop: int


class Seen(NamedTuple):
    """A use of a parameter, read as matrices."""

    kind: str
    view: View
    stacks: dict[Atom, str]
    line: str
    cells: frozenset[int]  # loops in which the same kernel is used at every round
    states: frozenset[int]  # those of them on whose state the operand depends
    window: Dims = ()  # of a convolution: the input channels, and each axis of its window


@dataclass
class Recorder:
    """Notes every use of every parameter, computing what the function computes."""

    shapes: dict[str, tuple[int, ...]]
    uses: dict[str, dict[Any, Seen]] = field(default_factory=dict)
    others: dict[str, dict[str, None]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    sliced: list[set[str]] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    differentiates: bool = False

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        """Note a product with the parameter."""
        if tracked.path not in self.shapes:  # an array that only keeps a parameter company
            return at.plain()
        if tracked.label is not None:  # inside a shard_map: a device's part of the parameter
            stack, ins, outs = (tuple(map(tracked.label.grown, side)) for side in use[1:4])
            window = tuple(tuple(map(tracked.label.grown, axis)) for axis in use.window)
            use = Use(use.kind, stack, ins, outs, use.position, window)
        ordered = sorted((*tracked.gone, *use.stack), key=lambda atom: (atom.axis, -atom.stride))
        view = View(self.shapes[tracked.path], tuple(ordered), use.ins, use.outs)
        stacks = dict.fromkeys(tracked.gone, "layers") | dict.fromkeys(use.stack, STACKS[use.kind])
        cells = frozenset(k for k in self.active if tracked.path not in self.sliced[k])
        line, states = source_line(at.eqn), cells & at.loops
        seen = Seen(use.kind, view, stacks, line, cells, states, use.window)
        self.uses.setdefault(tracked.path, {})[id(at.eqn), use.position] = seen
        return at.plain()

    def other(self, at: Equation) -> list[Any]:
        """Note an operation that is no product with a kernel."""
        for node in at.followed:
            for tracked in leaves(node):
                self.others.setdefault(tracked.path, {})[at.name] = None
        outs, node = at.plain(), at.followed[-1]
        of_params = at.name in _ELEMENTWISE and INPUT not in at.loops
        if not of_params or not isinstance(node, Tracked) or outs[0].shape != node.shape:
            return outs
        if node.held != node.dims:
            return outs
        # Masked, scaled or normalised, it is no kernel to factor but one to materialise.
        return [replace(node, value=outs[0], dtype=outs[0].dtype, casts=(), flips=frozenset())]

    def given(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs marked, so that what depends on them is told from what parameters alone make."""
        return stateful(inputs, frozenset({INPUT}))

    def output(self, tracked: Any) -> Any:
        """Note a parameter that the function returns."""
        for leaf in leaves(tracked):
            self.others.setdefault(leaf.path, {})["output"] = None
        return tracked.read()

    def joins(self, at: Equation) -> bool:
        """Parameters alone are joined; beside an activation a parameter is one too (a token)."""
        return len(at.followed) == len(at.values)

    def window(self, tracked: Tracked, axis: int, start: int, stop: int) -> Tracked | None:
        """A part that the model itself takes of a parameter is followed as one of its own."""
        if tracked.path in self.parts or len(tracked.dims[axis]) != 1:
            return None
        (atom,) = tracked.dims[axis]
        shape = self.shapes[tracked.path]
        if atom != Atom(atom.axis, 1, shape[atom.axis]):
            return None
        path = f"{tracked.path}/{start}:{stop}"
        self.parts[path] = Part(tracked.path, atom.axis, start, stop)
        size = stop - start
        self.shapes[path] = (*shape[: atom.axis], size, *shape[atom.axis + 1 :])
        small = Atom(atom.axis, 1, size)
        dims = (*tracked.dims[:axis], (small,), *tracked.dims[axis + 1 :])
        value = tracked.value[(slice(None),) * axis + (slice(start, stop),)]
        return replace(tracked, path=path, dims=dims, value=value)

    def alone(self, at: Equation, position: int) -> Equation:
        """A product of two parameters: the right one is the kernel, the left is read."""
        values = list(at.values)
        for i, value in enumerate(values):
            if isinstance(value, Followed) and i != position:
                for leaf in leaves(value):
                    self.others.setdefault(leaf.path, {})[at.name] = None
                values[i] = value.read()
        return at._replace(values=values)

    def loop(self, xs: Sequence[Any]) -> int:
        """A loop's number is its place in the list of what each one slices."""
        nodes = [leaf for x in xs if isinstance(x, Followed) for leaf in leaves(x)]
        self.sliced.append({leaf.path for leaf in nodes})
        return len(self.sliced) - 1

    @contextmanager
    def inside(self, loop: int) -> Iterator[None]:
        """While the body of a loop is evaluated."""
        self.active.append(loop)
        try:
            yield
        finally:
            self.active.pop()

    def weight(self, node: Any) -> Any:
        """Never asked for: nothing is differentiated."""
        return node.read()

    def shard(self, tracked: Tracked, shards: Any) -> tuple[Any, Any]:
        """Nothing rides along; the label makes whole atoms of a device's."""
        return shards, ()

    def settle(self, vectors: Collection[str]) -> None:
        """Bring the uses of parts and wholes together, and set aside those of vectors.

        Some layers of a stack are no sites of their own; where parts of a matrix are, they take
        over the uses of the whole.
        """
        small = {path: path for path in vectors}
        small |= {path: part.leaf for path, part in self.parts.items() if part.leaf in vectors}
        for path, leaf in small.items():
            kinds = dict.fromkeys(seen.kind for seen in self.uses.pop(path, {}).values())
            self.others.setdefault(leaf, {}).update(kinds)
            self.parts.pop(path, None)
        for path, part in list(self.parts.items()):
            uses = self.uses.get(path, {})
            if all(any(a.axis == part.axis for a in seen.view.stack) for seen in uses.values()):
                del self.parts[path]
                wholes = {key: self._on_whole(part, seen) for key, seen in uses.items()}
                self.uses.setdefault(part.leaf, {}).update(wholes)
                self.uses.pop(path, None)
        for path, part in self.parts.items():
            for key, seen in self.uses.get(part.leaf, {}).items():
                view, window = resized(seen.view, part), cut(seen.window, seen.view.shape, part)
                self.uses.setdefault(path, {})[key] = seen._replace(view=view, window=window)
        for leaf in {part.leaf for part in self.parts.values()}:
            self.uses.pop(leaf, None)
        self.uses = {path: uses for path, uses in self.uses.items() if uses}

    def _on_whole(self, part: Part, seen: Seen) -> Seen:
        shape = self.shapes[part.leaf]
        small = Atom(part.axis, 1, part.stop - part.start)
        grow = {small: Atom(part.axis, 1, shape[part.axis])}
        stack = tuple(grow.get(atom, atom) for atom in seen.view.stack)
        stacks = {grow.get(atom, atom): kind for atom, kind in seen.stacks.items()}
        return seen._replace(view=seen.view._replace(shape=shape, stack=stack), stacks=stacks)

    def seen(self, path: str) -> tuple[View, list[Seen]]:
        """The one matrix view that all uses share; a lookup sets the direction, else the first."""
        found = list(self.uses[path].values())
        lead = next((seen for seen in found if seen.kind == "lookup"), found[0])
        for seen in found:
            if seen.view not in (lead.view, flipped(lead.view)):
                raise InputError(
                    f"parameter '{path}' of shape {self.shapes[path]} is read as two different "
                    f"matrices: {_spell(lead)} and {_spell(seen)}; give each use its own "
                    "parameter, or leave this path out"
                )
        return lead.view, found


def flipped(view: View) -> View:
    """The view of the transposed matrix."""
    return view._replace(ins=view.outs, outs=view.ins)


def resized(view: View, part: Part) -> View:
    """The view of a part of a parameter; the cut axis is one whole atom of the view."""
    size = part.stop - part.start
    shape = (*view.shape[: part.axis], size, *view.shape[part.axis + 1 :])
    small = View(shape, *cut(view[1:], view.shape, part))
    held = [atom for side in small[1:] for atom in side if atom.axis == part.axis]
    if axes.size_of(held) != size:
        raise InputError(
            f"'{part.leaf}' cannot be cut along axis {part.axis} of its shape {view.shape}: the "
            "model splits that axis itself; cut another one"
        )
    return small


def cut(dims: Dims, shape: Sequence[int], part: Part) -> Dims:
    """Atoms of a parameter of this shape as those of its part."""
    large = Atom(part.axis, 1, shape[part.axis])
    small = large._replace(size=part.stop - part.start)
    return tuple(tuple(small if atom == large else atom for atom in axis) for axis in dims)


def _spell(seen: Seen) -> str:
    view = seen.view
    sides = [[atom.axis for atom in side] for side in (view.stack, view.ins, view.outs)]
    where = f" at {seen.line}" if seen.line else ""
    return "stack {} in {} out {}".format(*sides) + f" by a {seen.kind} product{where}"
