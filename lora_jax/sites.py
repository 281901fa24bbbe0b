"""Where a model uses its parameters: one trace, no list of architectures.

A *site* is a parameter that the model's function consumes as the kernel of a product. Tracing the
function once tells, for any model, which parameters those are and which of their axes are input,
output and stack.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.errors import InputError
from lora_jax.fused import Fused
from lora_jax.recorder import Part, Recorder, Seen, cut, flipped, resized
from lora_jax.table import sites_table
from lora_jax.tracing import axes
from lora_jax.tracing.axes import Dims, View, Window
from lora_jax.tracing.rewrite import rewrite, split_arrays
from lora_jax.tracing.tracked import Tracked
from lora_jax.tree import Rule

__all__ = ["Part", "Site", "Sites", "find_sites", "flipped"]


@dataclass(frozen=True)
class Site:
    """A parameter used as a kernel: its path, how to read it as matrices, and its uses.

    `view.stack_shape` are the stack axes and `stacks` what each is: `layers` of a loop, `batch`
    axes of a product, `experts` of a ragged one, `groups` of a convolution. `d_in` and `d_out` are
    the two sides of each matrix; a convolution's window belongs to `d_in`. `uses` names the
    operations in the order of the trace: `dense` (a matrix product), `lookup` (an embedding),
    `conv`, `ragged`, each with `, transposed` when it runs from `d_out` to `d_in`; `count` says in
    how many places of the model. `others` are operations on the parameter that are no products
    with it. `router` is the kernel that chooses among experts: called router or gate, with as many
    outputs as the model has experts. `role` is `recurrent` or `input` for the kernels of a
    recurrent cell. `spatial` are the atoms of a convolution's input channels and of each axis of
    its window.
    """

    path: str
    dtype: Any
    view: View
    uses: tuple[str, ...]
    stacks: tuple[str, ...] = ()
    count: int = 1
    others: tuple[str, ...] = ()
    router: bool = False
    role: str = ""
    spatial: Dims = ()

    @property
    def window(self) -> Window | None:
        """A convolution's window and input channels, None for other kernels."""
        return Window(self.view.ins, self.spatial[0], self.spatial[1:]) if self.spatial else None

    @property
    def d_in(self) -> int:
        """Input features of one matrix."""
        return self.view.d_in

    @property
    def d_out(self) -> int:
        """Output features of one matrix."""
        return self.view.d_out

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.view.stack_shape

    @property
    def lookup(self) -> bool:
        """Whether rows of the parameter are looked up by index, as in an embedding."""
        return "lookup" in self.uses

    @property
    def experts(self) -> bool:
        """Whether one product runs over several matrices, each with its own rows."""
        return "experts" in self.stacks or "batch" in self.stacks


class Sites(Mapping[str, Site]):
    """The sites of a model by path. Prints as a table.

    `others` tells for every remaining parameter the operations that consume it, () if none does.
    `parts` are the parameters that are adapted in parts, each a site (or not) of its own.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        others: Mapping[str, tuple[str, ...]],
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self._sites, self.others, self.parts = dict(sites), dict(others), dict(parts or {})

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return self.table()

    def table(self, rules: Mapping[Rule, Any] | None = None) -> str:
        """The sites as text, one a line; `rules`, as `attach` takes them, fill `adapted by`.

        Where several rules match a path, the first wins and the line says which came too late.
        """
        return sites_table(self, rules)

    def split(
        self,
        pattern: Rule,
        parts: Mapping[str, int] | Sequence[str],
        axis: int | None = None,
    ) -> Sites:
        """With a fused kernel's parts as sites of their own, `path/name` for each name.

        `parts` gives each part's size along `axis` of the parameter, or only names for equal sizes;
        `axis` is by default the last one that holds outputs. One kernel for q, k and v:
        `sites.split(".*/qkv/kernel", {"q": 64, "k": 16, "v": 16})`. Raises InputError when the
        sizes do not add up or the axis is not whole in the model's products.
        """
        chosen = tree.first_match({pattern: True}, self._sites)
        sites, cuts = dict(self._sites), dict(self.parts)
        for path in chosen:
            site = sites.pop(path)
            for name, part in _cut(site, parts, axis).items():
                cuts[f"{path}/{name}"] = part
                view, spatial = resized(site.view, part), cut(site.spatial, site.view.shape, part)
                sites[f"{path}/{name}"] = replace(
                    site, path=f"{path}/{name}", view=view, spatial=spatial
                )
        return Sites(sites, self.others, cuts)

    def taken_apart(self, params: Any) -> Any:
        """The parameters with a `Fused` node for each one that is adapted in parts."""
        for leaf in dict.fromkeys(part.leaf for part in self.parts.values()):
            whole = tree.flatten(params)[leaf]
            own = [(path, part) for path, part in self.parts.items() if part.leaf == leaf]
            parts = {
                path.removeprefix(f"{leaf}/"): jax.lax.slice_in_dim(
                    whole, part.start, part.stop, axis=part.axis
                )
                for path, part in sorted(own, key=lambda item: item[1].start)
            }
            params = tree.replace(params, {leaf: Fused(parts, own[0][1].axis)})
        return params


_ROUTER = re.compile(r"(^|[/_.])(router|gate|gating)([/_.]|$)")


def find_sites(apply: Callable[..., Any], params: Any, *inputs: Any, **keywords: Any) -> Sites:
    """Trace `apply(params, *inputs)` once and tell which parameters are kernels, and how.

    Only shapes matter: `params` and `inputs` may be arrays or `jax.ShapeDtypeStruct`s. Arguments
    that are not arrays (flags, functions) reach `apply` as they are. A parameter that the model
    itself takes apart along an axis (`jnp.split` of one kernel for q, k and v) has a site for each
    part, `path/0:64` and so on. Raises InputError when one parameter is read as two different
    matrices, and when the function never reads the parameters it is given.

    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["up"]) @ params["down"].T + params["bias"]
    >>> params = {"up": jnp.ones((3, 7)), "down": jnp.ones((2, 7)), "bias": jnp.ones(2)}
    >>> find_sites(apply, params, jnp.ones((5, 3)))
    path  operation  in x out  stack  uses  parameters
    ----  ---------  --------  -----  ----  ----------
    down  dense      7 x 2     -      1     14
    up    dense      3 x 7     -      1     21
    and 1 parameter that is no kernel (sites.others)
    """
    flat = tree.flatten(params)
    _check_plain(flat)
    kernels = {path: leaf for path, leaf in flat.items() if _watched(leaf)}
    recorder = Recorder({path: tuple(leaf.shape) for path, leaf in kernels.items()})

    def watch(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        return Tracked(leaf, (), path, axes.whole(leaf.shape), None, leaf.dtype)

    def record(flat: dict[str, Any], inputs: Any, keywords: Any) -> None:
        values = {path: watch(path, leaf) for path, leaf in flat.items()}
        rewrite(apply, tree.replace(params, values), inputs, keywords, recorder, consts)

    consts: list[Any] = []
    split = split_arrays((flat, inputs, keywords))
    jax.eval_shape(lambda arrays: record(*split.join(arrays)), split.arrays)
    _check_read(consts, flat, bool(recorder.uses or recorder.others))
    recorder.settle({path for path, leaf in kernels.items() if not _is_kernel_like(leaf)})
    parts = _covered(recorder)
    dtypes = {path: kernels[part.leaf].dtype for path, part in parts.items()}
    dtypes |= {path: leaf.dtype for path, leaf in kernels.items()}
    order = {path: i for i, path in enumerate(flat)}  # a model's own, not the alphabet's
    found = sorted(
        recorder.uses, key=lambda p: (order[parts[p].leaf if p in parts else p], p not in parts)
    )
    sites = _marked(recorder, {path: _site(recorder, path, dtypes[path]) for path in found})
    taken = {part.leaf for part in parts.values()}
    rest = [path for path in flat if path not in sites and path not in taken]
    others = {path: _others(recorder, path, flat[path]) for path in rest}
    return Sites(sites, others, parts)


def _site(recorder: Recorder, path: str, dtype: Any) -> Site:
    view, found = recorder.seen(path)
    named: dict[Any, str] = {}
    for seen in found:
        named = seen.stacks | named
    stacks = tuple(named.get(atom, "layers") for atom in view.stack)
    names = tuple(dict.fromkeys(_name(seen, view) for seen in found))
    others = tuple(recorder.others.get(path, ()))
    spatial = next((seen.window for seen in found if seen.window), ())
    return Site(path, dtype, view, names, stacks, len(found), others, spatial=spatial)


def _others(recorder: Recorder, path: str, leaf: Any) -> tuple[str, ...]:
    if _watched(leaf):
        return tuple(recorder.others.get(path, ()))
    return (f"{leaf.dtype} array" if hasattr(leaf, "dtype") else type(leaf).__name__,)


def _marked(recorder: Recorder, sites: dict[str, Site]) -> dict[str, Site]:
    """With the routers marked, and the kernels of recurrent cells."""
    counts = {n for site in sites.values() if site.experts for n in site.stack}

    def router(site: Site) -> bool:
        named = _ROUTER.search(site.path.lower())
        if named is None or site.experts:
            return False
        # Experts in a loop that is written out are taken from their stack one by one.
        beside = [other for p, other in sites.items() if p.startswith(site.path[: named.start()])]
        own = Counter(site.stack)
        return site.d_out in counts or any(
            site.d_out in Counter(other.stack) - own for other in beside if other is not site
        )

    used = {path: list(recorder.uses[path].values()) for path in sites}
    cells = {k for uses in used.values() for seen in uses for k in seen.states}

    def role(path: str) -> str:
        if any(seen.states for seen in used[path]):
            return "recurrent"
        return "input" if any(seen.cells & cells for seen in used[path]) else ""

    return {
        path: replace(site, router=router(site), role=role(path)) for path, site in sites.items()
    }


def _name(seen: Seen, view: View) -> str:
    return seen.kind if seen.view == view else f"{seen.kind}, transposed"


def _covered(recorder: Recorder) -> dict[str, Part]:
    """The parts that the model takes of parameters, with unnamed rest parts between them."""
    covered: dict[str, Part] = {}
    for leaf in dict.fromkeys(part.leaf for part in recorder.parts.values()):
        own = [part for part in recorder.parts.values() if part.leaf == leaf]
        size = recorder.shapes[leaf][own[0].axis]
        marks = sorted({0, size, *(part.start for part in own), *(part.stop for part in own)})
        runs = [Part(leaf, own[0].axis, low, high) for low, high in pairwise(marks)]
        if len({part.axis for part in own}) > 1 or not set(own) <= set(runs):
            raise InputError(
                f"the model takes overlapping parts of '{leaf}' of shape {recorder.shapes[leaf]}; "
                "give each part its own parameter, or leave this path out"
            )
        covered |= {f"{leaf}/{run.start}:{run.stop}": run for run in runs}
    return covered


def _cut(site: Site, parts: Mapping[str, int] | Sequence[str], axis: int | None) -> dict[str, Part]:
    shape = site.view.shape
    if axis is None:
        axis = max((atom.axis for atom in site.view.outs), default=len(shape) - 1)
    if not -len(shape) <= axis < len(shape):
        raise InputError(f"'{site.path}' has {len(shape)} axes; there is no axis {axis} to split")
    size = shape[axis]
    if not isinstance(parts, Mapping):
        parts = dict.fromkeys(parts, size // max(len(parts), 1))
    if sum(parts.values()) != size or min(parts.values(), default=0) < 1:
        raise InputError(
            f"parts {dict(parts)} do not add up to the {size} of axis {axis} of '{site.path}' "
            f"{shape}; give each part's size"
        )
    ends = pairwise([0, *accumulate(parts.values())])
    return {
        name: Part(site.path, axis % len(shape), *end)
        for name, end in zip(parts, ends, strict=True)
    }


def _watched(leaf: Any) -> bool:
    """Whether a parameter is followed at all, if only to say what uses it."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _check_plain(flat: Mapping[str, Any]) -> None:
    for path in flat:
        if path.endswith(("/frozen/w", "/trained/a", "/trained/b")):
            raise InputError(
                f"params is adapted already (it has '{path}'); find the sites of the base's "
                "parameters, before attach"
            )


def _check_read(consts: Sequence[Any], flat: Mapping[str, Any], used: bool) -> None:
    """Refuse a function that reads arrays of its own where its first argument should serve."""
    own = {id(leaf): path for path, leaf in flat.items()}
    remedy = "make them that argument, apply(params, ...): nothing else can be adapted or trained"
    for const in consts:
        if id(const) in own and jnp.ndim(const) >= 1:
            raise InputError(
                f"apply closes over '{own[id(const)]}' and does not read it from its first "
                f"argument; {remedy}"
            )
    big = [c for c in consts if jnp.ndim(c) >= 2 and _watched(c)]
    if big and not used:
        raise InputError(
            f"apply closes over its parameters ({len(big)} arrays, such as one of shape "
            f"{jnp.shape(big[0])}) and never reads its first argument; {remedy}"
        )


def _is_kernel_like(leaf: Any) -> bool:
    """A real array with two axes or more: a vector has no low rank to train."""
    real = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return real and leaf.ndim >= 2
