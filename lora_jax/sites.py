"""Where a model uses its parameters: one trace, no list of architectures.

A *site* is a parameter that the model's function consumes as the kernel of a product. Tracing the
function once tells, for any model, which parameters those are and which of their axes are input,
output and stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import axes, tree
from lora_jax.axes import View
from lora_jax.errors import InputError
from lora_jax.trace import rewrite, split_arrays
from lora_jax.tracked import Equation, Tracked, Use


@dataclass(frozen=True)
class Site:
    """A parameter used as a kernel: its path, how to read it as matrices, and its uses.

    `view.stack_shape` are the stack axes (scanned layers, experts), `d_in` and `d_out` the two
    sides of each matrix. `uses` names the operations in the order of the trace: `dense` (a matrix
    product), `lookup` (an embedding), each with `, transposed` when it runs from `d_out` to `d_in`.
    """

    path: str
    dtype: Any
    view: View
    uses: tuple[str, ...]

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


class Sites(Mapping[str, Site]):
    """The sites of a model by path. Prints as a table.

    `others` tells for every remaining parameter the operations that consume it, () if none does.
    """

    def __init__(self, sites: Mapping[str, Site], others: Mapping[str, tuple[str, ...]]) -> None:
        self._sites, self.others = dict(sites), dict(others)

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return self.table()

    def table(self, notes: Mapping[str, str] | None = None) -> str:
        """The sites as text, one a line; `notes` fills a column `adapted by`."""
        head = ["path", "use", "in x out", "stack", "parameters"]
        rows = [_row(site) for site in self.values()]
        if notes is not None:
            head.append("adapted by")
            rows = [[*row, notes.get(row[0], "-")] for row in rows]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, ["-" * width for width in widths], *rows)
        ]
        return "\n".join(lines)


def find_sites(apply: Callable[..., Any], params: Any, *inputs: Any, **keywords: Any) -> Sites:
    """Trace `apply(params, *inputs)` once and tell which parameters are kernels, and how.

    Only shapes matter: `params` and `inputs` may be arrays or `jax.ShapeDtypeStruct`s. Arguments
    that are not arrays (flags, functions) reach `apply` as they are. Raises InputError when one
    parameter is read as two different matrices.

    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["up"]) @ params["down"].T + params["bias"]
    >>> params = {"up": jnp.ones((3, 7)), "down": jnp.ones((2, 7)), "bias": jnp.ones(2)}
    >>> find_sites(apply, params, jnp.ones((5, 3)))
    path  use    in x out  stack  parameters
    ----  -----  --------  -----  ----------
    down  dense  7 x 2     -      14
    up    dense  3 x 7     -      21
    """
    flat = tree.flatten(params)
    recorder = _Recorder()

    def watch(path: str, leaf: Any) -> Any:
        if not _is_kernel_like(leaf):
            return leaf
        return Tracked(leaf, (), path, axes.whole(leaf.shape), None, leaf.dtype)

    def record(flat: dict[str, Any], inputs: Any, keywords: Any) -> None:
        values = {path: watch(path, leaf) for path, leaf in flat.items()}
        rewrite(apply, tree.replace(params, values), inputs, keywords, recorder)

    split = split_arrays((flat, inputs, keywords))
    jax.eval_shape(lambda arrays: record(*split.join(arrays)), split.arrays)
    sites = {p: recorder.site(p, leaf) for p, leaf in flat.items() if p in recorder.uses}
    others = {p: tuple(recorder.others.get(p, ())) for p in flat if p not in sites}
    return Sites(sites, others)


def all_linear(site: Site) -> bool:
    """Every kernel that matrix products alone use, an untied output head among them.

    Embeddings are left out, tied ones too. PEFT's `all-linear` also leaves out the output head;
    for that put `{"lm_head/kernel": None}` before this rule.
    """
    return not site.lookup


@dataclass
class _Recorder:
    """Notes every use of every parameter, computing what the function computes."""

    uses: dict[str, dict[Any, tuple[Use, Tracked]]] = field(default_factory=dict)
    others: dict[str, dict[str, None]] = field(default_factory=dict)

    def use(self, at: Equation, use: Use, tracked: Tracked) -> list[Any]:
        self.uses.setdefault(tracked.path, {})[id(at.eqn)] = (use, tracked)
        return at.plain()

    def other(self, at: Equation) -> list[Any]:
        for tracked in at.tracked:
            self.others.setdefault(tracked.path, {})[at.name] = None
        return at.plain()

    def output(self, tracked: Tracked) -> Any:
        self.others.setdefault(tracked.path, {})["output"] = None
        return tracked.read()

    def site(self, path: str, leaf: Any) -> Site:
        """The one matrix view that all uses share; a lookup sets the direction, else the first."""
        found = list(self.uses[path].values())
        views = [_view(leaf.shape, use, tracked) for use, tracked in found]
        lead = next(
            (v for v, (use, _) in zip(views, found, strict=True) if use.kind == "lookup"), views[0]
        )
        for view, (use, _) in zip(views, found, strict=True):
            if view != lead and view != flipped(lead):
                raise InputError(
                    f"parameter '{path}' of shape {leaf.shape} is read as two different matrices: "
                    f"{_spell(lead)} and, by a {use.kind} product, {_spell(view)}; give each use "
                    "its own parameter, or leave this path out"
                )
        names = [
            use.kind if view == lead else f"{use.kind}, transposed"
            for view, (use, _) in zip(views, found, strict=True)
        ]
        return Site(path, leaf.dtype, lead, tuple(dict.fromkeys(names)))


def flipped(view: View) -> View:
    """The view of the transposed matrix."""
    return view._replace(ins=view.outs, outs=view.ins)


def _view(shape: tuple[int, ...], use: Use, tracked: Tracked) -> View:
    stack = sorted((*tracked.gone, *use.stack), key=lambda atom: (atom.axis, -atom.stride))
    return View(tuple(shape), tuple(stack), use.ins, use.outs)


def _row(site: Site) -> list[str]:
    stack = " x ".join(map(str, site.stack)) or "-"
    size = tree.count(jax.ShapeDtypeStruct(site.view.shape, site.dtype))
    return [site.path, "; ".join(site.uses), f"{site.d_in} x {site.d_out}", stack, f"{size:,}"]


def _spell(view: View) -> str:
    sides = [[atom.axis for atom in side] for side in (view.stack, view.ins, view.outs)]
    return "stack {} in {} out {}".format(*sides)


def _is_kernel_like(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
