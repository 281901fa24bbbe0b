"""The tensors of adapter_model.safetensors: their names, their shapes, and ours in their place.

PEFT stores factors transposed: `lora_A.weight` [r, d_in] is our `a` [d_in, r], `lora_B.weight`
[d_out, r] is our `b` [r, d_out]. A module is named as in the base's checkpoint.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io import names
from lora_jax.method import Method

PREFIX = "base_model.model."
Tensors = Mapping[str, np.ndarray]
Factors = dict[str, np.ndarray]

_TABLE, _HEAD = "embed/embedding", "lm_head/kernel"

_INFIX = (  # an adapter's own name inside a key, as older files and raw state dicts have it
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"\.(lora_embedding_[AB])\.[^.]+$"), r".\1"),
    (re.compile(r"\.(lora_magnitude_vector)(\.[^.]+){1,2}$"), r".\1"),
    (re.compile(r"\.modules_to_save\.[^.]+\.([^.]+)$"), r".\1"),
)


@dataclass(frozen=True)
class Module:
    """A module of the base: its leaves by attribute (`weight`, `bias`), and its kind.

    `kind` is linear, head (the linear that makes the logits), embedding, tied (an embedding that is
    the head too) or norm. `shapes` are those of one layer's leaves, ours.
    """

    name: str
    layer: int | None
    kind: str
    leaves: dict[str, str] = field(default_factory=dict)  # attribute -> path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def modules_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
    """Every module of a base by its Hugging Face name; `shapes` are the leaves' by path.

    >>> found = modules_of({"layers/attn/q_proj/kernel": (2, 16, 8), "norm/scale": (16,)})
    >>> {name: (module.kind, module.shapes["weight"]) for name, module in found.items()}
    {'model.layers.0.self_attn.q_proj': ('linear', (16, 8)), \
'model.layers.1.self_attn.q_proj': ('linear', (16, 8)), 'model.norm': ('norm', (16,))}
    """
    found: dict[str, Module] = {}
    for path, shape in shapes.items():
        stacked = names.is_stacked(path)
        for layer in range(shape[0]) if stacked else (None,):
            name, _, attribute = names.to_hf(path, layer).rpartition(".")
            module = found.setdefault(name, Module(name, layer, _kind(path, shapes)))
            module.leaves[attribute] = path
            module.shapes[attribute] = tuple(shape[1:] if stacked else shape)
    return found


def _kind(path: str, paths: Collection[str]) -> str:
    if path == _TABLE:
        return "embedding" if _HEAD in paths else "tied"
    if path == _HEAD:
        return "head"
    return "norm" if path.endswith("/scale") else "linear"


def expected(module: Module, method: Method) -> dict[str, tuple[int, ...]]:
    """The keys that PEFT writes for a method on a module, with the shapes that they must have.

    >>> from lora_jax.methods.lora import lora
    >>> q = Module("q", None, "linear", {"weight": "q/kernel"}, {"weight": (16, 8)})
    >>> expected(q, lora(rank=4, alpha=8))
    {'base_model.model.q.lora_A.weight': (4, 16), 'base_model.model.q.lora_B.weight': (8, 4)}
    """
    stem = PREFIX + module.name
    if method.name == "full":
        shapes = {attribute: _theirs(module, attribute) for attribute in module.leaves}
        return {f"{stem}.{attribute}": shape for attribute, shape in shapes.items()}
    (d_in, d_out), rank = module.shapes["weight"], method.hyper["rank"]
    shapes = {"a": (rank, d_in), "b": (d_out, rank), "magnitude": (d_out,)}
    return {f"{stem}.{end}": shapes[part] for part, end in _ends(module, method).items()}


def _theirs(module: Module, attribute: str) -> tuple[int, ...]:
    shape = module.shapes[attribute]
    return shape[::-1] if names.is_transposed(module.leaves[attribute]) else shape


def _ends(module: Module, method: Method) -> dict[str, str]:
    ends = {"a": "lora_A.weight", "b": "lora_B.weight"}
    if module.kind == "embedding":
        ends = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    if method.name == "dora":
        ends["magnitude"] = "lora_magnitude_vector"
    return ends


def to_tensors(module: Module, method: Method, factors: Mapping[str, np.ndarray]) -> Factors:
    """PEFT's tensors of one module from our `a`, `b` and `magnitude`, in float32."""
    stem = PREFIX + module.name
    ends = _ends(module, method)
    return {f"{stem}.{end}": _float32(np.asarray(factors[part]).T) for part, end in ends.items()}


def from_tensors(module: Module, method: Method, tensors: Tensors) -> Factors:
    """Our `a`, `b` and `magnitude` of one module from PEFT's tensors, in float32."""
    stem, ends = PREFIX + module.name, _ends(module, method)
    return {part: _float32(tensors[f"{stem}.{end}"].T) for part, end in ends.items()}


def whole_to_tensor(path: str, layer: int | None, leaf: np.ndarray) -> Factors:
    """A leaf that is trained itself (modules_to_save) under its name in PEFT's file, in float32."""
    value = np.asarray(leaf)
    value = value.T if names.is_transposed(path) else value
    return {PREFIX + names.to_hf(path, layer): _float32(value)}


def whole_from_tensors(path: str, layer: int | None, tensors: Tensors) -> np.ndarray:
    """The inverse of `whole_to_tensor`."""
    value = tensors[PREFIX + names.to_hf(path, layer)]
    return _float32(value.T if names.is_transposed(path) else value)


def _float32(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value, dtype=np.float32)


def plain_names(tensors: Tensors, place: str) -> dict[str, np.ndarray]:
    """The tensors under the names that PEFT writes today, without an adapter's name inside.

    >>> list(plain_names({"m.q.lora_A.default.weight": np.zeros(1)}, "file"))
    ['m.q.lora_A.weight']
    """
    found: dict[str, str] = {}
    for key in tensors:
        plain = key
        for pattern, new in _INFIX:
            plain = pattern.sub(new, plain)
        if plain in found:
            raise InputError(
                f"{place} holds two adapters: {found[plain]!r} and {key!r} name one tensor; "
                "save each adapter to its own folder"
            )
        found[plain] = key
    return {plain: tensors[key] for plain, key in found.items()}


def check_tensors(wanted: Mapping[str, tuple[int, ...]], tensors: Tensors, place: str) -> None:
    """Raise InputError that lists what is missing, surplus or of another shape in a file."""
    missing = [key for key in wanted if key not in tensors]
    surplus = [key for key in tensors if key not in wanted]
    wrong = [
        f"{key} is {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "of another shape": wrong}
    if found := [f"{kind} {_first(keys)}" for kind, keys in kinds.items() if keys]:
        raise InputError(
            f"{place} does not fit this base and its adapter_config.json: {'; '.join(found)}. "
            "Load it onto the base that it was trained on"
        )


def _first(keys: Collection[str]) -> str:
    shown = [key.removeprefix(PREFIX) for key in sorted(keys, key=_natural)[:4]]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return f"({len(keys)}): {', '.join(shown)}{more}"


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in key.split(".")]
