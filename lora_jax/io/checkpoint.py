"""What every weight file gives once opened, and how it becomes a parameter tree."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.names import from_hf, is_stacked, is_transposed, to_hf

_LISTED = 4
"""How many names of a kind an error lists before it only counts the rest."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint under Hugging Face's names, nothing read from it yet but its header."""

    where: str
    """The file or folder, for messages."""
    config: Mapping[str, Any]
    """What its config.json says, or would say."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor, as stored for torch: kernels [d_out, d_in]."""
    read: Callable[[str], np.ndarray]
    """Reads one tensor."""
    fingerprint: Callable[[], str]
    """sha256 of the weight files' bytes."""


@dataclass(frozen=True)
class Names:
    """How an architecture's parameters are called in its checkpoints."""

    kind: str
    """The architecture, for messages."""
    to_hf: Callable[[str, int | None], str]
    """The tensor name of a path, of one layer if the path is stacked."""
    ignored: Callable[[str, Checkpoint, int], bool] = lambda name, checkpoint, depth: False
    """Whether a tensor outside a model of so many layers is rightly left out."""


def assemble(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    names: Names | None = None,
) -> dict[str, np.ndarray]:
    """Reads the parameters with these paths and shapes, layers stacked, kernels [d_in, d_out].

    `names` are a Llama's unless given. Strict: raises InputError that lists missing and surplus
    tensors and wrong shapes. A Llama's layers from the stack's height on are left out, so that it
    can be cut to its first ones.
    """
    names = names or LLAMA
    _check(checkpoint, shapes, names)
    return {
        path: _read_path(checkpoint, path, shape, dtype, names.to_hf)
        for path, shape in shapes.items()
    }


def _read_path(
    checkpoint: Checkpoint,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    to_hf: Callable[[str, int | None], str],
) -> np.ndarray:
    if not is_stacked(path):
        return _oriented(checkpoint.read(to_hf(path, None)), path).astype(dtype, order="C")
    # Filled in place, so that no second copy of the stack ever stands beside the first.
    stack = np.empty(shape, dtype)
    for layer in range(shape[0]):
        stack[layer] = _oriented(checkpoint.read(to_hf(path, layer)), path)
    return stack


def _oriented(tensor: np.ndarray, path: str) -> np.ndarray:
    return tensor.T if is_transposed(path) else tensor


def _expected(
    shapes: Mapping[str, tuple[int, ...]], to_hf: Callable[[str, int | None], str]
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        layers = range(shape[0]) if is_stacked(path) else [None]
        single = shape[1:] if is_stacked(path) else shape
        stored = single[::-1] if is_transposed(path) else single
        expected.update({to_hf(path, layer): stored for layer in layers})
    return expected


def _check(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], names: Names) -> None:
    expected, found = _expected(shapes, names.to_hf), checkpoint.shapes
    depth = next(shape[0] for path, shape in shapes.items() if is_stacked(path))
    wrong = [
        f"{name} is {list(found[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    surplus = [
        name
        for name in found
        if name not in expected and not names.ignored(name, checkpoint, depth)
    ]
    faults = {
        "missing": [name for name in expected if name not in found],
        "surplus": surplus,
        "wrong shape": wrong,
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_some(at)}" for fault, at in faults.items() if at)
        raise InputError(
            f"{checkpoint.where} does not hold what its configuration says.\n{listed}.\n"
            f"Use a whole, unmodified checkpoint of a {names.kind} model."
        )


def _ignored(name: str, checkpoint: Checkpoint, depth: int) -> bool:
    # Old checkpoints store rotary frequencies, which follow from the configuration.
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    # Some tied checkpoints repeat the table as the head; it is surplus only if it differs.
    if name == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
        table = checkpoint.read(to_hf("embed/embedding", None))
        return np.array_equal(checkpoint.read(name), table)
    try:
        layer = from_hf(name)[1]
    except InputError:
        return False
    return layer is not None and depth <= layer < checkpoint.config["num_hidden_layers"]


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


LLAMA = Names("Llama", to_hf, _ignored)
