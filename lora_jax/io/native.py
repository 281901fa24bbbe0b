"""Any adapter on any model in a folder: adapter.safetensors and lora_jax.json.

PEFT's format (`lora_jax.io.peft`) is for models that peft knows and for what peft can hold. This
one holds every method's arrays as they are, named "path::trained/name" and "path::frozen/name".
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, for safetensors)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lora_jax import methods, tree
from lora_jax.adapter import Adapted, Trained, adapted, attach
from lora_jax.errors import InputError
from lora_jax.io.folder import read_json
from lora_jax.io.peft.notes import check_base
from lora_jax.io.swap import swap_folder
from lora_jax.method import Method
from lora_jax.sites import Sites

WEIGHTS, NOTES = "adapter.safetensors", "lora_jax.json"
_FORMAT = 1
_LISTED = 4


def save_adapter(
    folder: str | Path,
    frozen: Any,
    trained: Trained,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter so that `load_adapter` gives the same bits; returns the folder.

    Written are the trained arrays, the frozen ones that the base does not have, and for every
    adapted path its method and the parameter's shape. `provenance` is kept: the `source` and
    `fingerprint` (sha256 of the weights) of the base. The folder appears whole or not at all.
    """
    nodes = adapted(frozen)
    arrays = {
        f"{path}::{name}": np.asarray(value)
        for path, node in nodes.items()
        for name, value in _parts(node, trained[path]).items()
    }
    notes = {
        "format": _FORMAT,
        "library": "lora_jax",
        "version": _version(),
        "adapted": {
            path: {"method": _written(node.methods), "shape": _shape(node, trained[path])}
            for path, node in nodes.items()
        },
        "provenance": dict(provenance or {}),
    }
    text = json.dumps(notes, indent=2, sort_keys=True) + "\n"
    return swap_folder(folder, {WEIGHTS: save(arrays), NOTES: text.encode()})


def load_adapter(
    folder: str | Path,
    params: Any,
    sites: Sites,
    *,
    base_fingerprint: str | None = None,
    factories: Mapping[str, Callable[..., Method]] | None = None,
) -> tuple[Any, Trained]:
    """Read an adapter that `save_adapter` wrote onto `params` -> (frozen, trained).

    `sites` are those of the model's function, as for `attach`; `factories` make the methods that
    are not ours, by name. Raises InputError that lists what is missing, surplus or of another
    shape, and for another base than the adapter was trained on, where both fingerprints are known.
    """
    place = str(folder)
    notes, arrays = _read(Path(folder))
    check_base(notes, base_fingerprint, place)
    records = notes["adapted"]
    leaves = tree.flatten(sites.taken_apart(params))
    _check(place, {p: r["shape"] for p, r in records.items()}, leaves, "parameters", subset=True)
    known = {name: getattr(methods, name) for name in methods.__all__} | dict(factories or {})
    rules = {re.escape(p): _rebuilt(r["method"], known, place) for p, r in records.items()}
    frozen, trained = attach(jax.random.key(0), params, rules, sites) if rules else (params, {})
    nodes = adapted(frozen)
    fresh = {path: _parts(node, trained[path]) for path, node in nodes.items()}
    wanted = {f"{path}::{name}": x.shape for path in fresh for name, x in fresh[path].items()}
    _check(place, wanted, arrays, "arrays")
    for path, parts in fresh.items():
        read = {name: jnp.asarray(arrays[f"{path}::{name}"]) for name in parts}
        nodes[path], trained[path] = _filled(nodes[path], trained[path], read)
    return tree.replace(frozen, nodes, lambda x: isinstance(x, Adapted)), trained


def _shape(node: Adapted, trained: dict[str, Any]) -> list[int]:
    """The parameter's own shape."""
    if node.site is not None:
        return list(node.site.view.shape)
    return list(jax.eval_shape(node.method.weight, node.frozen, trained).shape)


def _parts(node: Adapted, trained: dict[str, Any]) -> dict[str, Any]:
    """The arrays of one parameter that the base does not have, by name."""
    return tree.flatten({"frozen": _own(node), "trained": trained})


def _filled(
    node: Adapted, trained: dict[str, Any], values: Mapping[str, Any]
) -> tuple[Adapted, dict[str, Any]]:
    parts = tree.replace({"frozen": _own(node), "trained": trained}, values)
    return replace(node, frozen=node.frozen | parts["frozen"]), parts["trained"]


def _own(node: Adapted) -> dict[str, Any]:
    """A node's frozen arrays without the kernel, where that is the base's own."""
    drop = "w" in node.frozen and _keeps_kernel(node)
    return {name: x for name, x in node.frozen.items() if not (drop and name == "w")}


def _keeps_kernel(node: Adapted) -> bool:
    """Whether the method freezes the very kernel that it was given, not a residual of it."""
    assert node.site is not None
    lookup = node.site.lookup and node.method.lookup_init
    w = jax.ShapeDtypeStruct((node.site.d_in, node.site.d_out), node.site.dtype)
    start = lookup or node.method.init
    traced, shapes = jax.make_jaxpr(start, return_shape=True)(jax.random.key(0), w)
    outputs = jax.tree.unflatten(jax.tree.structure(shapes), traced.jaxpr.outvars)
    return outputs[0]["w"] is traced.jaxpr.invars[-1]


def _written(choice: Any) -> Any:
    if isinstance(choice, Method):
        return {"name": choice.name, **choice.hyper}
    return [method and _written(method) for method in choice]


def _rebuilt(written: Any, known: Mapping[str, Callable[..., Method]], place: str) -> Any:
    if isinstance(written, list):
        return [method and _rebuilt(method, known, place) for method in written]
    try:
        hyper = dict(written)
        return known[hyper.pop("name")](**hyper)
    except (KeyError, TypeError, ValueError) as fault:
        raise InputError(
            f"{place}/{NOTES}: {written!r} is no method that is known here ({fault}); give its "
            "factory in factories={name: function}, or use the version that wrote it"
        ) from None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not (folder / WEIGHTS).is_file():
        peft = (folder / "adapter_config.json").exists()
        hint = "it is in PEFT's format: use load_peft" if peft else "give a folder that holds one"
        raise InputError(f"no {WEIGHTS} in '{folder}'; {hint}")
    notes = read_json(folder / NOTES)
    if notes.get("format") != _FORMAT or "adapted" not in notes:
        raise InputError(
            f"{folder / NOTES} has format {notes.get('format')!r}; this version reads {_FORMAT}"
        )
    try:
        arrays = load_file(folder / WEIGHTS)
    except SafetensorError as fault:
        message = f"{folder / WEIGHTS} is not a whole safetensors file ({fault}); copy it again"
        raise InputError(message) from None
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise InputError(
            f"{folder / WEIGHTS}: '{broken[0]}' holds numbers that are not finite; the training "
            "that made it had failed, so use an earlier adapter"
        )
    return notes, arrays


def _check(
    place: str,
    wanted: Mapping[str, Iterable[int]],
    found: Mapping[str, Any],
    what: str,
    subset: bool = False,
) -> None:
    """Raise InputError that lists how the names and shapes found differ from those wanted."""
    shapes = {name: tuple(shape) for name, shape in wanted.items()}
    faults = {
        "missing": [name for name in shapes if name not in found],
        "surplus": [] if subset else [name for name in found if name not in shapes],
        "wrong shape": [
            f"{name} is {list(found[name].shape)}, should be {list(shape)}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        where = "this base does not have the" if subset else "the file does not hold the"
        raise InputError(f"'{place}': {where} {what} that {NOTES} says.\n{listed}")


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _version() -> str | None:
    try:
        return metadata.version("lora-jax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
