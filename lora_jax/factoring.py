"""Each use of an adapted kernel by its method: what `factored` does where the trace meets one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
from jax.sharding import PartitionSpec

from lora_jax.adapter import Adapted, formed
from lora_jax.errors import InputError
from lora_jax.fused import Fused, is_fused
from lora_jax.method import Method, sides
from lora_jax.operands import PRODUCTS, Operand, Product
from lora_jax.recorder import flipped
from lora_jax.sites import Site
from lora_jax.tracing import axes
from lora_jax.tracing._compat import at_source, source_line
from lora_jax.tracing.axes import View
from lora_jax.tracing.joined import Joined, leaves
from lora_jax.tracing.tracked import Equation, Followed, Tracked, Use, company


@dataclass(frozen=True)
class Label:
    """What a tracked parameter carries along: its method, its view, its node in the tree.

    `spread` are the mesh axes over which devices hold parts of its input axis.
    """

    method: Method
    site: Site
    view: View
    spread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Factored:
    """Computes each use of a tracked kernel by its method's `apply`."""

    differentiates: bool = True

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        """The method on the product's operand, with the scope and the line of the model."""
        label: Label | None = tracked.label
        if label is None:
            return at.plain()
        view = label.view
        transposed = (use.ins, use.outs) == (view.outs, view.ins)
        view = flipped(view) if transposed else view
        matches = (use.ins, use.outs) == (view.ins, view.outs)
        if not matches or set(use.stack) != set(tracked.stack or ()):
            return self.other(at)
        if transposed and use.kind != "dense":
            return self.other(at)
        product = PRODUCTS[use.kind](at, use.position, tracked, view, label.spread)
        known = tracked.value is not None and label.method.apply is not None and not transposed
        base = product.base() if known else None
        with at_source(at.eqn), jax.named_scope(label.method.name), _precision(at):
            return [product.result(_compute(label, tracked, product, transposed, base))]

    def other(self, at: Equation) -> list[Any]:
        """Refuse an operation without a rule."""
        labelled = [t for node in at.followed for t in leaves(node) if t.label is not None]
        if not labelled:
            return at.plain()
        where = source_line(at.eqn)
        return refuse(labelled[0], f"uses it in '{at.name}'{' at ' + where if where else ''}")

    def output(self, tracked: Any) -> Any:
        """Refuse to hand out a kernel that was never formed."""
        for leaf in leaves(tracked):
            if leaf.label is not None:
                refuse(leaf, "returns it from itself, a branch or a loop")
        return tracked.read()

    def joins(self, at: Equation) -> bool:
        """A kernel set beside others is part of a larger one."""
        return True

    def window(self, tracked: Tracked, axis: int, start: int, stop: int) -> Tracked | None:
        """Some layers of a stack; a part of a matrix only where it is a site of its own."""
        if tracked.label is not None:
            return tracked.layers(axis, start, stop)
        return company(jax.lax.slice_in_dim(tracked.read(), start, stop, axis=axis))

    def alone(self, at: Equation, position: int) -> Equation | None:
        """The other operand must be no adapted kernel."""
        values = list(at.values)
        for i, value in enumerate(values):
            if isinstance(value, Followed) and i != position:
                if any(leaf.label is not None for leaf in leaves(value)):
                    return None
                values[i] = value.read()
        return at._replace(values=values)

    def given(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs as they are."""
        return list(inputs)

    def loop(self, xs: Sequence[Any]) -> None:
        """Which arrays depend on a loop's state makes no difference."""

    def inside(self, loop: int) -> contextlib.AbstractContextManager[None]:
        """Nothing to note."""
        return contextlib.nullcontext()

    def weight(self, node: Any) -> Any:
        """The adapted array in the layout it has here."""
        if isinstance(node, Joined):
            return jax.numpy.concatenate([self.weight(part) for part in node.parts], node.axis)
        tracked: Tracked = node
        if tracked.label is None:
            return tracked.read()
        label: Label = tracked.label
        stack = tracked.stack or ()
        kernel = (*((atom,) for atom in stack), label.view.ins, label.view.outs)
        frozen = dict(tracked.riders["frozen"])
        if tracked.value is not None:
            frozen["w"] = axes.regroup(tracked.value, tracked.held, kernel)
        sizes = [atom.size for atom in stack]
        trained, dtype = tracked.riders["trained"], label.site.dtype
        weight = formed(label.method, sizes, frozen, trained).astype(dtype)
        return tracked.dressed(axes.regroup(weight, kernel, tracked.held))

    def shard(self, tracked: Tracked, shards: Any) -> tuple[Any, Any]:
        """A device's part of the view, and of each rider: its axes follow from the kernel's."""
        label: Label | None = tracked.label
        if label is None:
            return None, ()
        view = label.view
        names = {"in": shards.names(view.ins), "out": shards.names(view.outs), None: ()}
        for side, word in (("in", "input"), ("out", "output")):
            if names[side] and side not in label.method.splits:
                refuse(tracked, f"splits its {word} axis over the mesh axes {names[side]}")
        stack = [shards.names((atom,)) for atom in tracked.stack or ()]

        def spec(array: Any, own: Sequence[str | None]) -> PartitionSpec:
            leading = [n if array.shape[i] > 1 else () for i, n in enumerate(stack)]
            return PartitionSpec(*(n or None for n in (*leading, *(names[side] for side in own))))

        frozen, trained = sides(label.method, label.site.lookup)
        given = tracked.riders
        riders = {
            "frozen": {n: spec(x, frozen.get(n, ())) for n, x in given["frozen"].items()},
            "trained": {n: spec(x, trained.get(n, ())) for n, x in given["trained"].items()},
            "key": None if given["key"] is None else PartitionSpec(*(n or None for n in stack)),
        }
        local = View(view.shape, *(tuple(shards.cut(atom) for atom in side) for side in view[1:]))
        return replace(label, view=local, spread=(*label.spread, *names["in"])), riders


def track(node: Adapted) -> Tracked:
    """A node of a bound tree as a tracked parameter."""
    assert node.site is not None
    site = node.site
    frozen = {name: v for name, v in node.frozen.items() if name not in ("w", "idle")}
    riders = {"frozen": frozen, "trained": node.trained, "key": node.key}
    return Tracked(
        value=node.frozen.get("w"),
        riders=riders,
        path=node.path,
        dims=axes.whole(site.view.shape),
        stack=site.view.stack,
        dtype=site.dtype,
        label=Label(node.method, site, site.view),
    )


def joined_parts(node: Any) -> Any:
    """A fused parameter with tracked parts as one joined parameter."""
    if not is_fused(node):
        return node
    fused: Fused = node
    parts = [joined_parts(part) for part in fused.parts.values()]
    if not any(isinstance(part, Followed) for part in parts):
        return fused.whole()
    parts = [part if isinstance(part, Followed) else company(part) for part in parts]
    return Joined(tuple(parts), fused.axis)


def refuse(tracked: Tracked, deed: str) -> NoReturn:
    """Raise the error for what cannot be factored, with the ways out."""
    raise InputError(
        f"'{tracked.path}' is adapted by {tracked.label.method!r}, but the model {deed}; that has "
        f"no factored rule: pass materialise='{tracked.path}' to factored, or leave this path out "
        "of the rules"
    )


def _compute(
    label: Label, tracked: Tracked, product: Product, transposed: bool, base: Any
) -> jax.Array:
    """The method on the canonical operand, over the stack."""
    method, riders = label.method, dict(tracked.riders)
    if tracked.value is not None:
        target = (*product.stack_dims, label.view.ins, label.view.outs)
        riders["w"] = {"w": axes.regroup(tracked.value, tracked.held, target)}
    apply = method.apply or _formed(method)
    if transposed and method.weight is None:
        refuse(tracked, "multiplies by its transpose, and a method without a matrix has none")

    def single(riders: dict[str, Any], array: jax.Array, base: Any) -> jax.Array:
        frozen, trained = riders["frozen"] | riders.get("w", {}), riders["trained"]
        if transposed:
            return product.transposed(lambda x: apply(frozen, trained, x), array)
        known = (frozen.get("w"), base)
        return apply(frozen, trained, Operand(product, array, riders["key"], known))

    return product.over_stack(single, riders, base)


def _formed(method: Method) -> Any:
    weight = method.weight
    assert weight is not None
    return lambda frozen, trained, x: x @ weight(frozen, trained)


def _precision(at: Equation) -> Any:
    """The product's own precision for the adapter's products too."""
    precision = at.params.get("precision")
    first = precision[0] if isinstance(precision, tuple) else precision
    if not isinstance(first, jax.lax.Precision):
        return contextlib.nullcontext()
    return jax.default_matmul_precision(first.name.lower())
