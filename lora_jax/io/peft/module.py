"""The modules of a base as PEFT sees them: torch names for our paths, one module a layer."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_jax.io import names

PREFIX = "base_model.model."
Shape = tuple[int, ...]
Naming = Mapping[str, str] | Callable[[str, int | None], str]

_TABLE, _HEAD = "embed/embedding", "lm_head/kernel"
_HEADS = ("lm_head", "score", "classifier")  # PEFT's all-linear leaves these out


@dataclass(frozen=True)
class Module:
    """A module of the base: its leaves by attribute (`weight`, `bias`), and its kind.

    `kind` is linear, head (the linear that makes the logits), embedding, tied (an embedding that is
    the head too), conv, experts (one parameter of a module that holds a matrix for each expert),
    norm, or other. `shapes` are those of one layer's leaves, ours. `stem` is how its keys in PEFT's
    file begin.
    """

    name: str
    layer: int | None
    kind: str
    leaves: dict[str, str] = field(default_factory=dict)  # attribute -> path
    shapes: dict[str, Shape] = field(default_factory=dict)
    stem: str = ""


def modules_of(shapes: Mapping[str, Shape], naming: Naming | None = None) -> dict[str, Module]:
    """Every module of a base by its torch name; `shapes` are the leaves' by path.

    `naming` maps a path to the tensor's name, with `{}` for the layer of a stack: a table, or a
    function of path and layer (None outside `layers/`). Without it the names are a Llama's; paths
    that a table leaves out have no module. Experts' parameters of one module stand in the table in
    the order in which torch has them.

    >>> found = modules_of({"layers/attn/q_proj/kernel": (2, 16, 8), "norm/scale": (16,)})
    >>> {name: (module.kind, module.shapes["weight"]) for name, module in found.items()}
    {'model.layers.0.self_attn.q_proj': ('linear', (16, 8)), \
'model.layers.1.self_attn.q_proj': ('linear', (16, 8)), 'model.norm': ('norm', (16,))}
    >>> list(modules_of({"dense": (3, 4)}, {"dense": "fc.weight"}))
    ['fc']
    """
    found: dict[str, Module] = {}
    for path in naming if isinstance(naming, Mapping) else shapes:
        if path not in shapes:
            continue
        shape = shapes[path]
        stacked = _is_stacked(path, naming)
        for layer in range(shape[0]) if stacked else (None,):
            own = tuple(shape[1:] if stacked else shape)
            name, attribute = _parts(_named(path, layer, naming))
            kind = _kind(name, attribute, own, shapes)
            if attribute not in ("weight", "bias"):  # an array beside others of one module
                name, attribute = f"{name}.{attribute}", "weight"
            module = found.setdefault(name, Module(name, layer, kind, stem=PREFIX + name))
            if attribute == "weight":
                module = found[name] = replace(module, kind=kind)
            module.leaves[attribute] = path
            module.shapes[attribute] = own
    return found


def _is_stacked(path: str, naming: Naming | None) -> bool:
    return "{}" in naming[path] if isinstance(naming, Mapping) else names.is_stacked(path)


def _named(path: str, layer: int | None, naming: Naming | None) -> str:
    if isinstance(naming, Mapping):
        return naming[path].format(layer)
    return (naming or names.to_hf)(path, layer)


def _parts(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return module, attribute


def _kind(name: str, attribute: str, shape: Shape, paths: Mapping[str, Any]) -> str:
    short = name.rpartition(".")[-1]
    if attribute == "bias" or (attribute == "weight" and len(shape) < 2):
        return "norm"
    if attribute != "weight":
        return "experts" if len(shape) == 3 else "other"
    if "embed" in short:
        tied = name == "model.embed_tokens" and _TABLE in paths and _HEAD not in paths
        return "tied" if tied else "embedding"
    if len(shape) > 2:
        return "conv"
    return "head" if short in _HEADS else "linear"


def order_of(module: Module, attribute: str) -> Shape:
    """The order of our leaf's axes in PEFT's file: kernels stand there with their outputs first.

    >>> conv = Module("c", None, "conv", {"weight": "c"}, {"weight": (3, 3, 2, 8)})
    >>> order_of(conv, "weight")
    (3, 2, 0, 1)
    """
    rank = len(module.shapes[attribute])
    if attribute == "weight" and module.kind in ("linear", "head", "conv"):
        return (rank - 1, rank - 2, *range(rank - 2))
    return tuple(range(rank))


def nested(modules: Mapping[str, Module], adapted: Mapping[str, Any]) -> dict[str, Module]:
    """The modules with the stems that experts have in PEFT's file.

    Several adapted parameters of one module stand there within each other: the last one outermost,
    each earlier one a `base_layer` further in.
    """
    depth: dict[str, int] = {}
    found = dict(modules)
    for name in reversed([name for name in modules if name in adapted]):
        module = modules[name]
        if module.kind == "experts":
            holder = name.rpartition(".")[0]
            stem = PREFIX + holder + ".base_layer" * depth.get(holder, 0)
            depth[holder] = depth.get(holder, 0) + 1
            found[name] = replace(module, stem=stem)
    return found


def layers_in(modules: Mapping[str, Module]) -> int:
    """How many layers the base has, by the numbers in its modules' names."""
    numbers = [int(n) for name in modules for n in re.findall(r"\.(\d+)\.", name)[:1]]
    return max(numbers, default=-1) + 1
