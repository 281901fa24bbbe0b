"""Adapters in PEFT's format, both ways: a folder that peft loads, and folders that peft saved.

A folder holds adapter_config.json, adapter_model.safetensors, README.md (the model card) and, when
we wrote it, lora_jax.json: the exact methods by path, and which base they belong to.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, for safetensors)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lora_jax import tree
from lora_jax.adapter import Trained, adapted, is_adapted
from lora_jax.errors import InputError
from lora_jax.io.card import Card, model_card
from lora_jax.io.folder import read_json
from lora_jax.io.peft import fill, keys, notes
from lora_jax.io.peft.config import check_config, methods_of
from lora_jax.io.peft.keys import Module
from lora_jax.io.peft.plan import config_of
from lora_jax.io.swap import swap_folder
from lora_jax.method import Method
from lora_jax.sites import Sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTES, README = "lora_jax.json", "README.md"


def save_peft(
    folder: str | Path,
    frozen: Any,
    trained: Trained,
    *,
    base_name: str,
    card: Card | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter so that peft (0.21) and `load_peft` read it; returns the folder.

    `base_name` is what PEFT calls the base (`owner/name` on the hub); `card` holds further facts
    for README.md; `provenance` is kept in lora_jax.json, its `source` and `fingerprint` (sha256 of
    the base's weights) also on the card. lora with a frozen `a` becomes ordinary LoRA there, full()
    over a whole module becomes modules_to_save. The same adapter gives the same bytes.

    The folder appears whole or not at all, and replaces an adapter of the same name. Raises
    InputError for an adapter that PEFT's LoRA format cannot hold, before anything is written.
    """
    modules, methods = _adapter_modules(frozen, trained)
    host = jax.device_get(trained)
    tensors = fill.tensors_of(adapted(frozen), host, modules, methods)
    config = config_of(methods, _with_containers(modules), base_name)
    known = notes.notes_of(adapted(frozen), provenance or {}, _version("lora-jax"))
    files = {
        CONFIG: _json(config),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        NOTES: _json(known),
        README: model_card(
            base_name, notes.rows(adapted(frozen)), _facts(frozen, trained, card, provenance)
        ).encode(),
    }
    return swap_folder(folder, files)


def load_peft(
    folder: str | Path, params: Any, sites: Sites, *, base_fingerprint: str | None = None
) -> tuple[Any, Trained]:
    """Read an adapter that peft or `save_peft` wrote onto `params` -> (frozen, trained).

    `sites` are those of the model's function, as for `attach`. Everything in the files must mean
    something here: raises InputError for an option that is not supported, and for tensors that are
    missing, surplus or of another shape, listing them. With `base_fingerprint`, the sha256 of the
    base's weights, an adapter that says it was trained on another base is refused.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    known = read_json(folder / NOTES) if (folder / NOTES).exists() else {}
    notes.check_base(known, base_fingerprint, str(folder))
    leaves = tree.flatten(params)
    modules = keys.modules_of({path: leaf.shape for path, leaf in leaves.items()})
    methods = _methods(config, modules, str(folder / CONFIG))
    tensors = fill.without_base_copies(tensors, modules, methods, leaves)
    wanted = {
        key: shape
        for name, method in methods.items()
        for key, shape in keys.expected(modules[name], method).items()
    }
    keys.check_tensors(wanted, tensors, str(folder))
    choices = fill.by_path(modules, methods)
    choices = notes.recorded(known, choices, str(folder))
    return fill.attached(params, sites, choices, modules, tensors)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}'; give a folder that holds {CONFIG}")
    config = read_json(folder / CONFIG)
    check_config(config, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        old = folder / "adapter_model.bin"
        hint = (
            f"; {old.name} is a pickle and is not read: load it with peft and save it again, which "
            "writes safetensors"
        )
        raise InputError(f"no {WEIGHTS} in '{folder}'{hint if old.exists() else ''}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as fault:
        message = f"{folder / WEIGHTS} is not a whole safetensors file ({fault}); copy it again"
        raise InputError(message) from None
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise InputError(
            f"{folder / WEIGHTS}: '{broken[0]}' holds numbers that are not finite; the training "
            "that made it had failed, so use an earlier adapter"
        )
    return config, keys.plain_names(tensors, str(folder / WEIGHTS))


def _methods(config: Mapping[str, Any], modules: Mapping[str, Module], place: str) -> dict:
    linear = [name for name, module in modules.items() if module.kind == "linear"]
    others = [name for name in modules if modules[name].kind != "linear"]
    methods = methods_of(config, linear, others)
    if all(method.name == "full" for method in methods.values()):
        shown = config.get("target_modules")
        known = f"; its modules are called like {linear[0]!r}" if linear else ""
        raise InputError(f"{place}: target_modules={shown!r} finds no module in this base{known}")
    for name, method in methods.items():
        _check_kind(modules[name], method)
    return methods


def _check_kind(module: Module, method: Method) -> None:
    if module.kind == "tied":
        raise InputError(
            f"{method.name} on {module.name!r}, which is also this base's output head (tied): PEFT "
            "adapts the two uses apart, this library adapts the one parameter; untie them first"
        )
    if module.kind == "norm" and method.name != "full":
        raise InputError(
            f"{method.name} on {module.name!r}, which is a norm without a matrix; adapt it whole, "
            "by modules_to_save or full()"
        )


def _adapter_modules(frozen: Any, trained: Trained) -> tuple[dict[str, Module], dict[str, Method]]:
    """All modules of the base, and the methods of the adapted ones by name."""
    nodes = adapted(frozen)
    if set(nodes) != set(trained):
        wrong = sorted(set(nodes) ^ set(trained))
        raise InputError(
            f"trained does not belong to frozen: they differ in {wrong[:3]}; take both from one "
            "attach"
        )
    leaves = tree.flatten(frozen, is_adapted)
    shapes = {path: fill.shape_of(leaf, trained.get(path, {})) for path, leaf in leaves.items()}
    modules = keys.modules_of(shapes)
    methods = fill.by_module(modules, nodes)
    for name, method in methods.items():
        _check_kind(modules[name], method)
    return modules, methods


def _with_containers(modules: Mapping[str, Module]) -> list[str]:
    """The modules and all that hold them (`model.layers.0.mlp`): PEFT matches those names too."""
    parts = [name.split(".") for name in modules]
    return sorted({".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)})


def _facts(
    frozen: Any, trained: Trained, card: Card | None, provenance: Mapping[str, Any] | None
) -> Card:
    """The card with what is known here; what the caller gave wins."""
    provenance = provenance or {}
    ours = tree.count(trained)
    nodes = adapted(frozen)
    plain = [leaf for path, leaf in tree.flatten(frozen, is_adapted).items() if path not in nodes]
    base = tree.count(plain) + sum(tree.count(node.frozen.get("w", ())) for node in nodes.values())
    versions = {"lora_jax": _version("lora-jax"), "jax": _version("jax")}
    known = {
        "base": provenance.get("source"),
        "base_sha256": provenance.get("fingerprint"),
        "trainable": ours,
        "total": base + ours,
        "versions": {name: version for name, version in versions.items() if version},
    }
    facts = {name: value for name, value in known.items() if value is not None}
    return cast(Card, {**facts, **(card or {})})


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
