"""The products: which axes of a parameter an operation contracts, keeps, and runs over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.lax import GatherScatterMode

from lora_jax.tracing import axes
from lora_jax.tracing.axes import Atom, Dims
from lora_jax.tracing.tracked import Tracked, Use


def _dot_general(eqn: Any, position: int, tracked: Tracked) -> Use | None:
    """A matrix product; its batch axes are a stack, but one that only repeats the kernel is not."""
    dims = tracked.dims
    contract, batch = (sides[position] for sides in eqn.params["dimension_numbers"])
    free = [i for i in range(len(dims)) if i not in contract and i not in batch]
    if any(_repeats(dims[i]) for i in (*contract, *free)):
        return None
    if tracked.flips & {atom for i in batch for atom in dims[i]}:
        return None
    stack = tuple(atom for i in batch for atom in axes.real(dims[i]))
    return Use("dense", stack, _atoms(dims, contract), _atoms(dims, free), position)


def _gather(eqn: Any, position: int, tracked: Tracked) -> Use | None:
    """Rows of a table by index: one of one axis, and all of the others."""
    dims = tracked.dims
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = [i for i, axis in enumerate(dims) if sizes[i] != axes.size_of(axis)]
    rows = cut or list(numbers.start_index_map)
    if position != 0 or len(rows) != 1 or sizes[rows[0]] != 1 or tracked.held != dims:
        return None
    if numbers.operand_batching_dims or tracked.flips or rows[0] not in numbers.start_index_map:
        return None
    if len(numbers.start_index_map) > 1 and eqn.params["mode"] not in _CLAMPED:
        return None  # an index of another axis could be out of range, and so blank a row
    others = [i for i in range(len(dims)) if i != rows[0]]
    return Use("lookup", (), _atoms(dims, rows), _atoms(dims, others), 0)


_CLAMPED = (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


def _convolution(eqn: Any, position: int, tracked: Tracked) -> Use | None:
    """A convolution: the window and the input channels go in; groups are a stack."""
    dims, params = tracked.dims, eqn.params
    out, *ins = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"]
    if position != 1 or params["batch_group_count"] != 1 or tracked.held != dims:
        return None
    if not tracked.flips <= {atom for i in ins for atom in dims[i]}:
        return None
    parts = axes.halved(dims[out], groups)
    if parts is None:
        return None
    stack, outs = parts
    window = tuple(dims[i] for i in ins)
    return Use("conv", stack, _atoms(dims, ins), axes.in_order(outs), 1, window)


def _ragged_dot(eqn: Any, position: int, tracked: Tracked) -> Use | None:
    """A product in which every group of rows has its own matrix: experts after sorting tokens."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    if position != 1 or len(numbers.rhs_group_dimensions) != 1 or batch[0] or tracked.flips:
        return None
    dims, (group,) = tracked.dims, numbers.rhs_group_dimensions
    if len(contract[0]) != 1 or tracked.held != dims or len(dims) != 3:
        return None
    free = [i for i in range(3) if i not in (group, *contract[1])]
    return Use("ragged", dims[group], _atoms(dims, contract[1]), _atoms(dims, free), 1)


def _atoms(dims: Dims, where: Sequence[int]) -> tuple[Atom, ...]:
    return axes.in_order([atom for i in where for atom in dims[i] if atom.size > 1])


def _repeats(axis: tuple[Atom, ...]) -> bool:
    return len(axes.real(axis)) < len(axis)


USES: dict[str, Callable[[Any, int, Tracked], Use | None]] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
}
