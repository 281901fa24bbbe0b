"""Between one method a module, as PEFT has it, and one stack of layers a path, as we have it."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, is_adapted
from lora_jax.attachment import Choice, attach
from lora_jax.errors import InputError
from lora_jax.io.peft import keys
from lora_jax.io.peft.kind import Kind, Methods, Modules, Part, Tensors
from lora_jax.io.peft.match import Config
from lora_jax.io.peft.module import Module
from lora_jax.method import Method
from lora_jax.methods import full
from lora_jax.methods.ia3 import ia3_bias

Choices = dict[str, Choice]
Entries = Mapping[str, tuple[str, Part]]
Values = dict[str, np.ndarray]


def shape_of(leaf: Any, trained: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a parameter of a frozen tree, adapted or not."""
    if isinstance(leaf, Adapted):
        if leaf.site is not None:  # a quantised kernel has no such shape itself
            return tuple(leaf.site.view.shape)
        leaf = leaf.frozen["w"] if "w" in leaf.frozen else trained["w"]
    return tuple(leaf.shape)


def method_at(node: Adapted | None, module: Module) -> Method | None:
    """The method of one layer of an adapted parameter, None where there is none."""
    if node is None or isinstance(node.methods, Method):
        return node and node.method
    if module.kind == "experts":
        raise InputError(
            f"the layers of '{node.path}' have methods of their own, which PEFT has not for "
            "experts; give all of them one method"
        )
    return node.methods[module.layer or 0]


def by_module(modules: Modules, nodes: Mapping[str, Adapted]) -> tuple[dict[str, Method], set[str]]:
    """The method of every adapted module, and the modules whose bias is trained beside those.

    Raises InputError where a module's parts are trained in a way that PEFT has not.
    """
    methods, biases = {}, set()
    _check_groups(nodes)
    for name, module in modules.items():
        parts = {a: method_at(nodes.get(path), module) for a, path in module.leaves.items()}
        present = {attribute: method.name for attribute, method in parts.items() if method}
        if not present:
            continue
        _check_parts(name, module, parts, present)
        whole = set(present.values()) == {"full"} and len(present) == len(parts)
        if present.get("bias") == "full" and not whole:
            biases.add(name)
        if (method := parts.get("weight")) or whole:
            methods[name] = method or full()
    return methods, biases


def _check_groups(nodes: Mapping[str, Adapted]) -> None:
    """Raise InputError for convolutions in groups, which PEFT's adapters treat as one kernel."""
    for path, node in nodes.items():
        if node.site is not None and "groups" in node.site.stacks:
            raise InputError(
                f"{node.method!r} on '{path}', a convolution in groups: here each group has an "
                "adapter of its own, in PEFT's format all have one; use save_adapter, or leave it "
                "out"
            )


def _check_parts(
    name: str, module: Module, parts: Mapping[str, Method | None], present: Mapping[str, str]
) -> None:
    kernel = parts.get("weight")
    outputs = kernel is not None and kernel.name == "ia3" and not kernel.hyper["feedforward"]
    if outputs and "bias" in parts and present.get("bias") != "ia3_bias":
        raise InputError(
            f"PEFT's IA3 scales {name!r} with its bias, here the kernel alone is scaled; make the "
            "rules by ia3_rules, which takes biases along"
        )
    if present.get("weight") == "full" and len(present) < len(parts):
        raise InputError(
            f"PEFT trains a module's kernel by an adapter, or all of the module; {name!r} has "
            f"{dict(present)} of {sorted(parts)}. Put full() on all of it, or adapt the kernel"
        )


def bias_option(kind: Kind, modules: Modules, methods: Methods, biases: Collection[str]) -> str:
    """The option `bias` under which PEFT trains exactly these modules' biases."""
    if not biases:
        return "none"
    if "bias" not in kind.lacks and set(biases) == biases_of("lora_only", modules, methods):
        return f"{kind.peft_type.lower().removeprefix('ada')}_only"
    if "bias" not in kind.lacks and set(biases) == biases_of("all", modules, methods):
        return "all"
    raise InputError(
        f"PEFT trains the biases of the adapted modules, or all biases, and all of the module or "
        f"none for the rest; here that of {sorted(biases)[0]!r} is trained and not all others. "
        "Put full() on the biases of all adapted modules, or on all biases"
    )


def biases_of(bias: str | None, modules: Modules, methods: Methods) -> set[str]:
    """The modules whose biases are trained under an option `bias`."""
    if bias in (None, "none"):
        return set()
    own = {name for name in modules if "bias" in modules[name].leaves}
    whole = {name for name, method in methods.items() if method.name == "full"}
    return own - whole if bias == "all" else own & set(methods) - whole


def by_path(modules: Modules, methods: Methods, biases: Collection[str]) -> Choices:
    """The choices for `attach`: one method a path, or one (or None) a layer where they differ."""
    rows: dict[str, list[Method | None]] = {}
    for name, module in modules.items():
        for attribute, path in module.leaves.items():
            method = _of_leaf(attribute, module, methods.get(name), name in biases)
            rows.setdefault(path, []).append(method)
    experts = {m.leaves["weight"] for m in modules.values() if m.kind == "experts"}
    return {p: _choice(p, row, p in experts) for p, row in rows.items() if any(row)}


def _of_leaf(attribute: str, module: Module, method: Method | None, bias: bool) -> Method | None:
    """The method of one leaf of a module."""
    if attribute == "weight" or (method and method.name == "full"):
        return method
    if method and method.name == "ia3" and not method.hyper["feedforward"]:
        return ia3_bias(module.leaves["weight"])
    return full() if bias else None


def _choice(path: str, row: Sequence[Method | None], experts: bool) -> Choice:
    if all(method == row[0] for method in row):
        return row[0]
    if experts or any(method and method.anywhere for method in row):
        raise InputError(
            f"the adapter treats some layers of '{path}' only, or in another way, but the layers "
            "are one stack here; train the module in all layers, or in none"
        )
    return list(row)


def tensors_of(
    kind: Kind,
    config: Config,
    nodes: Mapping[str, Adapted],
    trained: Trained,
    modules: Modules,
    methods: Methods,
    biases: Collection[str],
) -> dict[str, np.ndarray]:
    """PEFT's tensors of an adapter whose trained arrays are on the host."""
    layers = {module.stem: module.layer for module in modules.values()}
    found: dict[str, np.ndarray] = {}
    for key, (path, part) in keys.entries(kind, config, modules, methods, biases).items():
        layer = layers[next(s for s in _stems(key) if s in layers)]
        found[key] = part.to_theirs(_array(nodes[path], trained[path], layer, part))
    pools = {n.pool: n.common | trained.get(n.pool, {}) for n in nodes.values() if n.common}
    pools |= {n.pool: trained[n.pool] for n in nodes.values() if n.pool in trained and not n.common}
    held: dict[str, Any] = {}
    for arrays in pools.values():
        held |= arrays
    for key, part in keys.shared_parts(kind, modules, methods).items():
        found[key] = part.to_theirs(held[part.name])
    return dict(sorted(kind.held(found, modules, methods).items()))


def _stems(key: str) -> list[str]:
    """A key's beginnings, the longest first."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _array(node: Adapted, trained: Mapping[str, Any], layer: int | None, part: Part) -> Any:
    """One array of one layer, wherever it is kept; frozen ones may be padded to the largest."""
    listed = layer is not None and not isinstance(node.methods, Method)
    own = trained[str(layer)] if listed else trained
    if part.name in own:
        return own[part.name] if listed or layer is None else own[part.name][layer]
    value = node.frozen[part.name]
    value = value if layer is None else value[layer]
    return value[tuple(slice(0, size) for size in part.ours)]


def without_base_copies(
    tensors: Tensors, modules: Modules, methods: Methods, leaves: Mapping[str, Any]
) -> Tensors:
    """The tensors without the plain weights that PEFT adds for an adapted embedding or head.

    Raises InputError where those are not the base's own: the adapter then needs another base.
    """
    copies = {f"{modules[name].stem}.base_layer.weight": name for name in methods}
    for key in [key for key in copies if key in tensors]:
        module = modules[copies[key]]
        ours = np.asarray(leaves[module.leaves["weight"]])
        theirs = tensors[key].astype(ours.dtype)
        if not np.array_equal(ours.transpose(keys.order_of(module, "weight")), theirs):
            raise InputError(
                f"the adapter brings its own base weights, {key}, which differ from this base's "
                "(a resized vocabulary, or another base); load it onto the base it was saved with"
            )
    return {key: value for key, value in tensors.items() if key not in copies}


def attached(
    kind: Kind,
    params: Any,
    sites: Any,
    choices: Choices,
    entries: Entries,
    shared: Mapping[str, Part],
    modules: Modules,
    tensors: Tensors,
) -> tuple[Any, Trained]:
    """Attach the choices, then put the file's tensors in place of the fresh arrays."""
    rules: dict[tree.Rule, Choice] = {re.escape(path): choice for path, choice in choices.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how they start, which is overwritten
        frozen, trained = attach(jax.random.key(0), params, rules, sites)
    _check_groups(adapted(frozen))
    layers = {module.stem: module.layer for module in modules.values()}
    read: dict[str, dict[int | None, Values]] = {path: {} for path in choices}
    for key, (path, part) in entries.items():
        layer = layers[next(s for s in _stems(key) if s in layers)]
        read[path].setdefault(layer, {})[part.name] = part.to_ours(tensors[key])
    held = {part.name: part.to_ours(tensors[key]) for key, part in shared.items()}
    nodes = {}
    for path, node in adapted(frozen).items():
        nodes[path], trained[path] = _filled(node, trained[path], read[path])
        nodes[path] = replace(nodes[path], common=_like(node.common, node.common | held))
    for pool in {node.pool for node in nodes.values()} & set(trained):
        if pool not in nodes:
            trained[pool] = _like(trained[pool], held)
    return tree.replace(frozen, nodes, is_adapted), trained


def _filled(
    node: Adapted, fresh: dict[str, Any], parts: Mapping[int | None, Values]
) -> tuple[Adapted, dict[str, Any]]:
    """A node and its trained arrays with the numbers of the file, one dict of arrays a layer."""
    listed = not isinstance(node.methods, Method)
    names = {name for part in parts.values() for name in part}
    inside = {name for own in fresh.values() for name in own} if listed else set(fresh)
    fixed = {name: _fixed(node.frozen[name], name, parts) for name in names - inside}
    node = replace(node, frozen=node.frozen | fixed)
    if listed:
        return node, {i: _like(own, parts[int(i)]) for i, own in fresh.items()}
    if None in parts:
        return node, _like(fresh, parts[None])
    rows = [parts[layer] for layer in sorted(layer for layer in parts if layer is not None)]
    return node, _like(fresh, {name: np.stack([row[name] for row in rows]) for name in fresh})


def _fixed(fresh: jax.Array, name: str, parts: Mapping[int | None, Values]) -> jax.Array:
    """A frozen array of the file in the place of a fresh one, padded as that is."""
    value = np.array(fresh)
    for layer, part in parts.items():
        matrix = value if layer is None else value[layer]
        matrix[:] = 0.0
        matrix[tuple(slice(0, size) for size in part[name].shape)] = part[name]
    return jnp.asarray(value)


def _like(fresh: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names and in the dtypes of fresh arrays."""
    return {name: jnp.asarray(values[name], array.dtype) for name, array in fresh.items()}
