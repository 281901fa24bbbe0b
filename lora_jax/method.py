"""A method of adaptation: pure functions on one matrix."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

Arrays = dict[str, jax.Array]


@dataclass(frozen=True, eq=False, repr=False)
class Method:
    """How one kernel is parameterised by a few trained numbers.

    ```
    init:   key, w             -> frozen, trained     with weight(frozen, trained) == w
    weight: frozen, trained    -> w'                  the definition, [d_in, d_out]
    apply:  frozen, trained, x -> x @ w'              the same, never forming w'
    ```

    `frozen` and `trained` are dicts of arrays; the frozen kernel itself goes by the name `w`. All
    functions see one matrix: stacks (scanned layers, experts) come by `vmap`. `x` is an
    `Operand`: `x @ m` is the site's own contraction with `m` in place of the kernel, whatever the
    operation is, and `x.dropout(rate)` drops its entries where a key is bound. `apply` is linear in
    `x` and may be left out: then the kernel is formed.

    `hyper` holds the arguments of `factory`, for printing and for files. `anywhere` marks a method
    that treats every number alike, so that biases and norms may take it: its functions get the
    parameter in its own shape. `lookup_init` replaces `init` for embeddings. `shared` names trained
    arrays that the experts of a site have in common. `at` may choose another method for a site by
    what it is (fewer ranks for each of many experts). `additive` says that `apply` on parts of the
    input axis, each with its rows of the factors, adds up to the whole, all sums over that axis
    going through `x.total`: then a `shard_map` may split that axis.

    Two methods are equal when their functions are: same code, same captured values. So equal
    configurations share one compilation, and an edited function never runs stale code.

    >>> def scaled(start: float = 1.0) -> Method:
    ...     def init(key, w):
    ...         return {"w": w}, {"c": jax.numpy.full(w.shape[1], start)}
    ...     def weight(frozen, trained):
    ...         return frozen["w"] * trained["c"]
    ...     def apply(frozen, trained, x):
    ...         return (x @ frozen["w"]) * trained["c"]
    ...     return Method("scaled", init, weight, apply, hyper={"start": start})
    >>> scaled(), scaled() == scaled(1.0), scaled() == scaled(2.0)
    (scaled(start=1.0), True, False)
    """

    name: str
    init: Callable[[jax.Array, jax.Array], tuple[Arrays, Arrays]]
    weight: Callable[[Arrays, Arrays], jax.Array]
    apply: Callable[[Arrays, Arrays, Any], jax.Array] | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    anywhere: bool = False
    lookup_init: Callable[[jax.Array, jax.Array], tuple[Arrays, Arrays]] | None = None
    shared: tuple[str, ...] = ()
    at: Callable[[Any], Method] | None = None
    additive: bool = False
    factory: Callable[..., Method] | None = None

    @functools.cached_property
    def _identity(self) -> Any:
        functions = (self.init, self.weight, self.apply, self.lookup_init, self.at)
        flags = self.name, self.anywhere, self.shared, self.additive
        return flags, tuple(identity(function) for function in functions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        """The factory's call, without the arguments that have their defaults but rank and alpha."""
        usual = inspect.signature(self.factory).parameters if self.factory else {}
        shown = {
            name: value
            for name, value in self.hyper.items()
            if name in ("rank", "alpha") or name not in usual or value != usual[name].default
        }
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def same_forward(self, other: Method) -> bool:
        """Whether both compute with their arrays alike, so that they may differ along a stack."""
        pairs = ((self.weight, other.weight), (self.apply, other.apply))
        return self.name == other.name and all(identity(a) == identity(b) for a, b in pairs)


def sides(method: Method, lookup: bool) -> tuple[Any, Any]:
    """Which axes of a method's frozen and trained arrays run along the input and the output side.

    Two trees of tuples with "in", "out" or None an axis, found by asking `init` for two shapes.

    >>> from lora_jax import lora
    >>> sides(lora(rank=2), False)[1]["b"]
    (None, 'out')
    """
    start = method.lookup_init if lookup and method.lookup_init else method.init
    key = jax.random.key(0)

    def shapes(d_in: int, d_out: int) -> Any:
        w = jax.ShapeDtypeStruct((d_in, d_out), jax.numpy.float32)
        return jax.eval_shape(start, key, w)

    small, tall, broad = shapes(64, 64), shapes(128, 64), shapes(64, 128)

    def names(small: Any, tall: Any, broad: Any) -> tuple[str | None, ...]:
        sizes = zip(small.shape, tall.shape, broad.shape, strict=True)
        return tuple("in" if t != s else "out" if b != s else None for s, t, b in sizes)

    return jax.tree.map(names, small, tall, broad)


def identity(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """A hashable key by which functions compare by code and captured values, not by address."""
    if id(value) in seen:
        return "itself"
    inside = functools.partial(identity, seen=(*seen, id(value)))
    if isinstance(value, types.FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, inside(captured), inside(value.__defaults__)
    if isinstance(value, functools.partial):
        return inside((value.func, value.args, value.keywords))
    if isinstance(value, tuple | list):
        return type(value), tuple(inside(item) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((key, inside(item)) for key, item in value.items())
    try:
        hash(value)
    except TypeError:
        return _ById(value)
    return type(value), value


class _ById:
    """Compares an unhashable object, such as an array, by identity and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
