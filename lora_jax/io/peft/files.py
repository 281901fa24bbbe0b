"""Adapters in PEFT's format, both ways: a folder that peft loads, and folders that peft saved.

A folder holds adapter_config.json, adapter_model.safetensors, README.md (the model card) and, when
we wrote it, lora_jax.json: the exact methods by path, and which base they belong to.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, for safetensors)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, is_adapted
from lora_jax.errors import InputError
from lora_jax.io.card import Card, model_card, versions
from lora_jax.io.folder import read_json
from lora_jax.io.peft import fill, keys, notes
from lora_jax.io.peft.config import check_config, check_module, kind_of, methods_in
from lora_jax.io.peft.convert import held
from lora_jax.io.peft.kind import Kind
from lora_jax.io.peft.module import Module, Naming, layers_in, modules_of, nested
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
    names: Naming | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Write an adapter so that peft (0.21) and `load_peft` read it; returns the folder.

    `base_name` is what PEFT calls the base (`owner/name` on the hub); `card` holds further facts
    for README.md; `provenance` is kept in lora_jax.json, its `source` and `fingerprint` (sha256 of
    the base's weights) also on the card. The same adapter gives the same bytes.

    The peft_type follows from the methods. lora with a frozen `a` becomes ordinary LoRA, full()
    over whole modules becomes modules_to_save (LN_TUNING where nothing else is adapted), and over
    biases the option `bias`. What PEFT has no type for is written as plain LoRA where its update is
    a product: Delta-LoRA, starts that rewrite the base (PiSSA and its like, at twice the rank),
    shared factors, mixtures of types. `names` are the modules' in torch, for other models than
    Llamas: path -> tensor name with `{}` for the layer, as a table or a function of path and layer.

    The folder appears whole or not at all, and replaces an adapter of the same name. Raises
    InputError for an adapter that PEFT's format cannot hold, before anything is written.
    """
    nodes, arrays, kind = _held(frozen, trained)
    modules, methods, biases = _adapter_modules(frozen, trained, nodes, kind, names)
    bias = fill.bias_option(kind, modules, methods, biases)
    host = jax.device_get(arrays)
    tensors = fill.tensors_of(kind, {}, nodes, host, modules, methods, biases)
    experts = [name for name, module in modules.items() if module.kind == "experts"]
    config = config_of(
        kind,
        methods,
        _with_containers(set(modules) - set(experts)),
        base_name,
        parameters=experts,
        shapes={n: m.shapes["weight"] for n, m in modules.items() if "weight" in m.shapes},
        bias=bias,
        tied=any(modules[name].kind == "tied" for name in methods),
        task_type=task_type,
        tensors=tensors,
    )
    known = notes.notes_of(nodes, provenance or {}, versions().get("lora_jax"))
    rows, facts = notes.rows(nodes), _facts(frozen, trained, card, provenance)
    used = {method.name for method in methods.values()} - {"full"}
    facts["tags"] = [*facts.get("tags", ()), kind.peft_type.lower(), *used]
    files = {
        CONFIG: _json(config),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        NOTES: _json(known),
        README: model_card(base_name, rows, facts, task_type=task_type).encode(),
    }
    return swap_folder(folder, files)


def load_peft(
    folder: str | Path,
    params: Any,
    sites: Sites,
    *,
    base_fingerprint: str | None = None,
    names: Naming | None = None,
    adapter: str = "default",
) -> tuple[Any, Trained]:
    """Read an adapter that peft or `save_peft` wrote onto `params` -> (frozen, trained).

    `sites` are those of the model's function, as for `attach`. Everything in the files must mean
    something here: raises InputError for an option that is not supported, and for tensors that are
    missing, surplus or of another shape, listing them. With `base_fingerprint`, the sha256 of the
    base's weights, an adapter that says it was trained on another base is refused.

    Of a folder with several adapters `adapter` names the one to read; PEFT has the default one in
    the folder itself and others in folders of their name. `names` as for `save_peft`. PiSSA and
    OLoRA files hold the factors alone; their start is computed anew from the base.
    """
    folder = _folder_of(Path(folder), adapter)
    config, tensors = _read(folder)
    place = str(folder / CONFIG)
    known = read_json(folder / NOTES) if (folder / NOTES).exists() else {}
    notes.check_base(known, base_fingerprint, str(folder))
    leaves = tree.flatten(params)
    modules = modules_of({path: leaf.shape for path, leaf in leaves.items()}, names)
    _check_replicated(config, modules, place)
    kind, methods = kind_of(config, place), methods_in(config, modules, place)
    modules = nested(modules, methods)
    biases = fill.biases_of(config.get("bias"), modules, methods)
    tensors = kind.read(config, tensors, modules, methods)
    tensors = fill.without_base_copies(tensors, modules, methods, leaves)
    entries = keys.entries(kind, config, modules, methods, biases)
    shared = keys.shared_parts(kind, modules, methods)
    wanted = {key: part.theirs for key, (_, part) in entries.items()}
    wanted |= {key: part.theirs for key, part in shared.items()}
    keys.check_tensors(wanted, tensors, str(folder))
    choices = notes.recorded(known, fill.by_path(modules, methods, biases), str(folder))
    return fill.attached(kind, params, sites, choices, entries, shared, modules, tensors)


def _folder_of(folder: Path, adapter: str) -> Path:
    """The folder of one adapter among several."""
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}'; give a folder that holds {CONFIG}")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if adapter != "default" and adapter not in inside:
        found = ", ".join(map(repr, ["default", *inside]))
        raise InputError(f"'{folder}' has no adapter {adapter!r}; it has {found}")
    if adapter == "default" and not (folder / CONFIG).exists() and inside:
        found = ", ".join(map(repr, inside))
        raise InputError(f"'{folder}' holds adapters by name; give adapter= one of {found}")
    return folder if adapter == "default" else folder / adapter


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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


def _check_replicated(config: Mapping[str, Any], modules: Mapping[str, Module], place: str) -> None:
    """Raise InputError where PEFT repeats layers of the base and this base has not that many."""
    ranges = config.get("layer_replication")
    if not ranges:
        return
    needed, found = sum(stop - start for start, stop in ranges), layers_in(modules)
    if needed != found:
        raise InputError(
            f"{place}: layer_replication={ranges!r} makes a base of {needed} layers out of the "
            f"original's, and this base has {found}; give a base with its layers repeated so"
        )


def _held(frozen: Any, trained: Trained) -> tuple[dict[str, Adapted], Trained, Kind]:
    """What PEFT can hold of an adapter, once frozen and trained are seen to belong together."""
    nodes = adapted(frozen)
    expected = set(nodes) | {node.pool for node in nodes.values()} & set(trained)
    if expected != set(trained):
        wrong = sorted(expected ^ set(trained))
        raise InputError(
            f"trained does not belong to frozen: they differ in {wrong[:3]}; take both from one "
            "attach"
        )
    return held(frozen, trained)


def _adapter_modules(
    frozen: Any,
    trained: Trained,
    nodes: Mapping[str, Adapted],
    kind: Kind,
    names: Naming | None,
) -> tuple[dict[str, Module], dict[str, Method], set[str]]:
    """All modules of the base, the methods of the adapted ones by name, and trained biases."""
    leaves = tree.flatten(frozen, is_adapted)
    shapes = {path: fill.shape_of(leaf, trained.get(path, {})) for path, leaf in leaves.items()}
    modules = modules_of(shapes, names)
    known = {path for module in modules.values() for path in module.leaves.values()}
    if unnamed := sorted(set(nodes) - known):
        raise InputError(
            f"'{unnamed[0]}' is adapted, but names= has no torch name for it; name it there"
        )
    methods, biases = fill.by_module(modules, nodes)
    for name, method in methods.items():
        check_module(modules[name], method, kind)
    return nested(modules, methods), methods, biases


def _with_containers(modules: Iterable[str]) -> list[str]:
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
    known = {
        "base": provenance.get("source"),
        "base_sha256": provenance.get("fingerprint"),
        "trainable": ours,
        "total": base + ours,
        "versions": versions(),
    }
    facts = {name: value for name, value in known.items() if value is not None}
    return cast(Card, {**facts, **(card or {})})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
