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

from lora_jax import methods, quant, tree
from lora_jax.adapter import Adapted, Trained, adapted, start_of
from lora_jax.attachment import skeleton
from lora_jax.errors import InputError
from lora_jax.io.folder import read_json
from lora_jax.io.peft.notes import check_base
from lora_jax.io.swap import swap_folder
from lora_jax.method import Method
from lora_jax.operands import lifted
from lora_jax.quant import Storage
from lora_jax.sites import Sites

WEIGHTS, NOTES = "adapter.safetensors", "lora_jax.json"
_FORMAT = 1
_RECORDS = (Method, Storage)
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
    arrays = {name: np.asarray(value) for name, value in _parts(nodes, trained).items()}
    notes = {
        "format": _FORMAT,
        "library": "lora_jax",
        "version": _version(),
        "adapted": {
            path: {"method": _written(node.methods), "shape": _shape(node, _seen(node, trained))}
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
    known = _known() | dict(factories or {})
    rules = {re.escape(p): _rebuilt(r["method"], known, place) for p, r in records.items()}
    shapes, trained = skeleton(params, rules, sites) if rules else (params, {})
    nodes = adapted(shapes)
    wanted = _parts(nodes, trained)
    _check(place, {name: x.shape for name, x in wanted.items()}, arrays, "arrays")
    read = {name: jnp.asarray(arrays[name], x.dtype) for name, x in wanted.items()}
    filled = {path: _filled(path, node, leaves[path], read) for path, node in nodes.items()}
    for owner in trained:
        own = _read_for(owner, "trained", trained[owner], read)
        trained[owner] = own
    return tree.replace(sites.taken_apart(params), filled), trained


def _shape(node: Adapted, trained: dict[str, Any]) -> list[int]:
    """The parameter's own shape."""
    if node.site is not None:
        return list(node.site.view.shape)
    assert node.method.weight is not None
    return list(jax.eval_shape(node.method.weight, node.frozen, trained).shape)


def _seen(node: Adapted, trained: Trained) -> dict[str, Any]:
    """A node's trained arrays, its own and those that it shares."""
    return trained.get(node.pool, {}) | trained[node.path]


def _parts(nodes: Mapping[str, Adapted], trained: Trained) -> dict[str, Any]:
    """All arrays of an adapter that the base does not have, by name."""
    frozen = {path: _own(node) for path, node in nodes.items()}
    pools = {node.pool: node.common for node in nodes.values() if node.common}
    parts = {(owner, "frozen"): arrays for owner, arrays in (frozen | pools).items()}
    parts |= {(owner, "trained"): arrays for owner, arrays in trained.items()}
    return {
        f"{owner}::{kind}/{name}": array
        for (owner, kind), arrays in parts.items()
        for name, array in tree.flatten(arrays).items()
    }


def _read_for(owner: str, kind: str, shapes: Any, read: Mapping[str, Any]) -> Any:
    """The arrays of one owner in place of their shapes."""
    names = tree.flatten(shapes)
    return tree.replace(shapes, {name: read[f"{owner}::{kind}/{name}"] for name in names})


def _filled(path: str, node: Adapted, leaf: Any, read: Mapping[str, Any]) -> Adapted:
    """A node with the arrays that were read, and those that follow from the base."""
    own = _read_for(path, "frozen", _own(node), read)
    common = _read_for(node.pool, "frozen", node.common, read)
    return replace(node, frozen=own | _from_base(node, leaf, own), common=common)


def _from_base(node: Adapted, leaf: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The frozen arrays that are not in the file: the kernel, or what the method makes of it."""
    site, rebuild = node.site, node.method.rebuild
    if rebuild is None:
        return {name: leaf for name in node.frozen if name not in own}
    arrays = {name: x for name, x in own.items() if name != "idle"}
    if site is None:
        return rebuild(leaf, arrays)
    made = lifted(rebuild, site.stack)(site.view.matrix(leaf), arrays)
    return {n: site.view.leaf(x) if n == "w" else x for n, x in made.items()}


def _own(node: Adapted) -> dict[str, Any]:
    """A node's frozen arrays without those that follow from the base."""
    rebuild = node.method.rebuild
    if rebuild is None:
        drop = "w" in node.frozen and _keeps_kernel(node)
        return {name: x for name, x in node.frozen.items() if not (drop and name == "w")}
    stack = node.site.stack if node.site else ()
    single = {
        name: jax.ShapeDtypeStruct(x.shape[len(stack) :], x.dtype)
        for name, x in node.frozen.items()
        if name not in ("idle", "w")
    }
    made = jax.eval_shape(rebuild, _kernel(node), single)
    return {name: x for name, x in node.frozen.items() if name not in made}


def _kernel(node: Adapted) -> jax.ShapeDtypeStruct:
    """The kernel as the method sees it."""
    if node.site is None:
        return jax.ShapeDtypeStruct(node.frozen["w"].shape, node.frozen["w"].dtype)
    return jax.ShapeDtypeStruct((node.site.d_in, node.site.d_out), node.site.dtype)


def _keeps_kernel(node: Adapted) -> bool:
    """Whether the method freezes the very kernel that it was given, not a residual of it."""
    start = start_of(node.method, node.site) if node.site else node.method.init
    traced, shapes = jax.make_jaxpr(start, return_shape=True)(jax.random.key(0), _kernel(node))
    outputs = jax.tree.unflatten(jax.tree.structure(shapes), traced.jaxpr.outvars)
    return outputs[0]["w"] is traced.jaxpr.invars[-1]


def _known() -> dict[str, Callable[..., Any]]:
    """Our factories of methods and storages, by name."""
    return {name: getattr(place, name) for place in (methods, quant) for name in place.__all__}


def _written(choice: Any) -> Any:
    if isinstance(choice, _RECORDS):
        hyper = {n: _written(v) if isinstance(v, _RECORDS) else v for n, v in choice.hyper.items()}
        return {"name": choice.name, **hyper}
    return [method and _written(method) for method in choice]


def _rebuilt(written: Any, known: Mapping[str, Callable[..., Method]], place: str) -> Any:
    if isinstance(written, list):
        return [method and _rebuilt(method, known, place) for method in written]
    try:
        hyper: dict[str, Any] = {
            n: _rebuilt(v, known, place) if isinstance(v, dict) and "name" in v else v
            for n, v in written.items()
        }
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
