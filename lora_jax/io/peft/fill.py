"""Between one method a module, as PEFT has it, and one stack of layers a path, as we have it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, is_adapted
from lora_jax.attachment import Choice, attach
from lora_jax.errors import InputError
from lora_jax.io import names
from lora_jax.io.peft import keys
from lora_jax.io.peft.keys import PREFIX, Module, Tensors
from lora_jax.method import Method

Modules = Mapping[str, Module]
Choices = dict[str, Choice]


def shape_of(leaf: Any, trained: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a parameter of a frozen tree, adapted or not."""
    if isinstance(leaf, Adapted):
        leaf = leaf.frozen["w"] if "w" in leaf.frozen else trained["w"]
    return tuple(leaf.shape)


def method_at(node: Adapted | None, layer: int | None) -> Method | None:
    """The method of one layer of an adapted parameter, None where there is none."""
    if node is None or isinstance(node.methods, Method):
        return node and node.method
    return node.methods[layer or 0]


def by_module(modules: Modules, nodes: Mapping[str, Adapted]) -> dict[str, Method]:
    """The method of every adapted module. Raises InputError where its parts are trained unalike."""
    found = {}
    for name, module in modules.items():
        parts = {a: method_at(nodes.get(path), module.layer) for a, path in module.leaves.items()}
        present = {attribute: method.name for attribute, method in parts.items() if method}
        if not present:
            continue
        whole = set(present.values()) == {"full"} and len(present) == len(parts)
        if not whole and (set(present) != {"weight"} or "full" in present.values()):
            raise InputError(
                f"PEFT trains a module's kernel by LoRA, or all of the module; {name!r} has "
                f"{present} of {sorted(parts)}. Adapt the kernel alone, or put full() on all"
            )
        found[name] = parts["weight"]
    return found


def by_path(modules: Modules, methods: Mapping[str, Method]) -> Choices:
    """The choices for `attach`: one method a path, or one (or None) a layer where they differ."""
    rows: dict[str, list[Method | None]] = {}
    for name, module in modules.items():
        method = methods.get(name)
        for attribute, path in module.leaves.items():
            takes = method if method and (attribute == "weight" or method.name == "full") else None
            rows.setdefault(path, []).append(takes)
    return {path: _choice(path, row) for path, row in rows.items() if any(row)}


def _choice(path: str, row: Sequence[Method | None]) -> Choice:
    if all(method == row[0] for method in row):
        return row[0]
    if any(method and method.name == "full" for method in row):
        raise InputError(
            f"modules_to_save names some layers of '{path}' only, but the layers are one stack "
            "here; name the module in all layers, or in none"
        )
    return list(row)


def tensors_of(
    nodes: Mapping[str, Adapted], trained: Trained, modules: Modules, methods: Mapping[str, Method]
) -> dict[str, np.ndarray]:
    """PEFT's tensors of an adapter whose trained arrays are on the host."""
    found: dict[str, np.ndarray] = {}
    for name, method in methods.items():
        module = modules[name]
        if method.name == "full":
            for path in module.leaves.values():
                leaf = (
                    trained[path]["w"] if module.layer is None else trained[path]["w"][module.layer]
                )
                found |= keys.whole_to_tensor(path, module.layer, leaf)
        else:
            path = module.leaves["weight"]
            factors = _factors(nodes[path], trained[path], module.layer, method)
            found |= keys.to_tensors(module, method, factors)
    return dict(sorted(found.items()))


def _factors(
    node: Adapted, trained: dict[str, Any], layer: int | None, method: Method
) -> dict[str, np.ndarray]:
    """One layer's `a`, `b` and `magnitude`, wherever `a` is kept."""
    if layer is None:
        own, fixed = trained, node.frozen
    else:
        own = trained[str(layer)] if _listed(node) else {k: v[layer] for k, v in trained.items()}
        fixed = {k: v[layer] for k, v in node.frozen.items() if k == "a"}
    if "a" not in own:  # layers of unequal rank are padded with zeros to the largest
        own = own | {"a": fixed["a"][:, : method.hyper["rank"]]}
    return own


def _listed(node: Adapted) -> bool:
    return not isinstance(node.methods, Method)


def without_base_copies(
    tensors: Tensors, modules: Modules, methods: Mapping[str, Method], leaves: Mapping[str, Any]
) -> Tensors:
    """The tensors without the plain weights that PEFT adds for an adapted embedding or head.

    Raises InputError where those are not the base's own: the adapter then needs another base.
    """
    copies = {f"{PREFIX}{name}.base_layer.weight": name for name in methods}
    for key in [key for key in copies if key in tensors]:
        path = modules[copies[key]].leaves["weight"]
        ours = np.asarray(leaves[path]).T if names.is_transposed(path) else np.asarray(leaves[path])
        if not np.array_equal(ours, tensors[key].astype(ours.dtype)):
            raise InputError(
                f"the adapter brings its own base weights, {key}, which differ from this base's "
                "(a resized vocabulary, or another base); load it onto the base it was saved with"
            )
    return {key: value for key, value in tensors.items() if key not in copies}


def attached(
    params: Any, sites: Any, choices: Choices, modules: Modules, tensors: Tensors
) -> tuple[Any, Trained]:
    """Attach the choices, then put the file's tensors in place of the fresh arrays."""
    rules: dict[tree.Rule, Choice] = {re.escape(path): choice for path, choice in choices.items()}
    frozen, trained = attach(jax.random.key(0), params, rules, sites)
    rows: dict[str, list[Module]] = {path: [] for path in choices}
    for module in modules.values():
        for path in set(module.leaves.values()) & set(choices):
            rows[path].append(module)
    nodes = {}
    for path, node in adapted(frozen).items():
        nodes[path], trained[path] = _filled(node, trained[path], rows[path], tensors)
    return tree.replace(frozen, nodes, is_adapted), trained


def _filled(
    node: Adapted, fresh: dict[str, Any], row: Sequence[Module], tensors: Tensors
) -> tuple[Adapted, dict[str, Any]]:
    if node.method.name == "full":
        return node, _whole(node.path, fresh, row, tensors)
    parts = {
        module.layer or 0: keys.from_tensors(module, method, tensors)
        for module in row
        if (method := method_at(node, module.layer))
    }
    if "a" in node.frozen:
        node = replace(node, frozen=node.frozen | {"a": _fixed(node.frozen["a"], parts)})
    if _listed(node):
        return node, {i: _like(fresh[i], parts[int(i)]) for i in fresh}
    if node.site and node.site.stack:
        return node, _like(fresh, {k: np.stack([p[k] for p in parts.values()]) for k in parts[0]})
    return node, _like(fresh, parts[0])


def _whole(path: str, fresh: dict[str, Any], row: Sequence[Module], tensors: Tensors) -> dict:
    leaves = [keys.whole_from_tensors(path, module.layer, tensors) for module in row]
    return _like(fresh, {"w": np.stack(leaves) if names.is_stacked(path) else leaves[0]})


def _fixed(a: jax.Array, parts: Mapping[int, Mapping[str, np.ndarray]]) -> jax.Array:
    """The frozen `a` of the file in the place of a fresh one, `[*stack, d_in, rank]`."""
    value = np.array(a)
    for layer, part in parts.items():
        matrix = value if value.ndim == 2 else value[layer]
        matrix[:] = 0.0
        matrix[:, : part["a"].shape[1]] = part["a"]
    return jnp.asarray(value)


def _like(fresh: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The values under the names and in the dtypes of fresh arrays."""
    return {name: jnp.asarray(values[name], array.dtype) for name, array in fresh.items()}
