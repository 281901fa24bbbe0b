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
Shapes = Mapping[str, jax.ShapeDtypeStruct]


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
    operation is; where a key is bound, `x.dropout(rate)` drops its entries, and `x.mask(rate,
    shape)` draws zeros and ones. `apply` is linear in `x` and may be left out: then the kernel is
    formed. A method without `weight` has no matrix (it is not linear in `x`): it runs factored
    only, and cannot be merged.

    `hyper` holds the arguments of `factory`, for printing and for files. The other fields say what
    a method is beyond one matrix:

    * `anywhere`: it treats every number alike, so biases and norms may take it, in their own shape.
    * `lookup_init` replaces `init` for embeddings.
    * `shared` names trained arrays that the experts of a site have in common.
    * `at` may choose another method for a site by what it is (fewer ranks where there are experts,
      another form where the kernel has a window).
    * `common(key, shapes) -> frozen, trained` makes arrays that all parameters of one `attach` have
      in common whose methods have this name and an equal `common`; `shapes` are those parameters'
      matrices by path. They are stored once and meet the functions among `frozen` and `trained`.
      Frozen arrays of this kind there may be one set of for a name.
    * `data` holds, by path, what `init` takes as third argument (gradients, say), stacked as the
      parameter is; {} says that it is wanted. Without that argument `init` gives the shapes alone.
    * `rebuild(w, frozen)` gives the frozen arrays that follow from the base's kernel `w`, which
      files leave out; without it that is the kernel, where `init` hands it on as it is.
    * `factors(frozen, trained) -> a, b` is the update as a product, `w' = base + a @ b`.
    * `splits`: which sides of the matrix, "in" and "out", a `shard_map` may split over devices.
      Over "out", columns of the result follow from the same columns of the arrays; over "in",
      `apply` on parts of that axis adds up to the whole, with sums over it through `x.total`.
    * `follows` is the path of another parameter, whose trained arrays (of its whole stack) the
      functions find among `trained`; such a method stands `anywhere` (a bias scaled as its kernel).

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
    init: Callable[..., tuple[Arrays, Arrays]]
    weight: Callable[[Arrays, Arrays], jax.Array] | None = None
    apply: Callable[[Arrays, Arrays, Any], jax.Array] | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    anywhere: bool = False
    lookup_init: Callable[..., tuple[Arrays, Arrays]] | None = None
    shared: tuple[str, ...] = ()
    at: Callable[[Any], Method] | None = None
    common: Callable[[jax.Array, Shapes], tuple[Arrays, Arrays]] | None = None
    data: Mapping[str, jax.Array] | None = None
    rebuild: Callable[[jax.Array, Arrays], Arrays] | None = None
    factors: Callable[[Arrays, Arrays], tuple[jax.Array, jax.Array]] | None = None
    splits: tuple[str, ...] = ()
    follows: str = ""
    factory: Callable[..., Method] | None = None

    @property
    def innermost(self) -> Method:
        """The method under all that wrap it (`quantized`, `tied`), as `hyper["method"]`."""
        inside = self.hyper.get("method")
        return inside.innermost if isinstance(inside, Method) else self

    @functools.cached_property
    def _identity(self) -> Any:
        starts = (self.init, self.lookup_init, self.at, self.common, self.data, self.rebuild)
        return self.forward, self.follows, tuple(identity(function) for function in starts)

    @functools.cached_property
    def forward(self) -> Any:
        """What a compiled program depends on: equal where methods differ in how they start only."""
        flags = self.anywhere, self.shared, self.splits
        return flags, tuple(identity(f) for f in (self.weight, self.apply, self.factors))

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


def sides(method: Method, lookup: bool) -> tuple[Any, Any]:
    """Which axes of a method's frozen and trained arrays run along the input and the output side.

    Two trees of tuples with "in", "out" or None an axis, found by asking `init` for two shapes;
    empty for a method that nobody may split, whose `init` may refuse these shapes.

    >>> from lora_jax import lora
    >>> sides(lora(rank=2), False)[1]["b"]
    (None, 'out')
    """
    if not method.splits:
        return {}, {}
    start = method.lookup_init if lookup and method.lookup_init else method.init
    key, common = jax.random.key(0), method.common

    def shapes(d_in: int, d_out: int) -> Any:
        w = jax.ShapeDtypeStruct((d_in, d_out), jax.numpy.float32)
        own = jax.eval_shape(start, key, w)
        if common is None:
            return own
        shared = jax.eval_shape(lambda key, made=common: made(key, {"": w}), key)
        return own[0] | shared[0], own[1] | shared[1]

    size = 4096  # above any rank or block: only shapes are made
    small, tall, broad = shapes(size, size), shapes(2 * size, size), shapes(size, 2 * size)

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
