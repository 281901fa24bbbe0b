"""The tensors of adapter_model.safetensors: which there must be, and what is wrong with a file.

PEFT stores factors transposed: `lora_A.weight` [r, d_in] is our `a` [d_in, r], `lora_B.weight`
[d_out, r] is our `b` [r, d_out]. A module is named as in the base's checkpoint.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import Kind, Methods, Modules, Part, Tensors
from lora_jax.io.peft.match import Config, saved_whole
from lora_jax.io.peft.module import PREFIX, Module, Shape, order_of

_OWN = (  # further types' arrays, by name
    r"vera_lambda_[bd]|vera_[AB]|hada_w\d_[ab]|(?:hada|lokr)_t\d|lokr_w\d(?:_[ab])?|ia3_l|vblora_\w+|randlora_\w+|"
    r"miss_block|fourierft_spectrum|hra_u|boft_[Rs]|lora_E"
)
_INFIX = (  # an adapter's own name inside a key, as older files and raw state dicts have it
    (re.compile(r"\.(lora_[AB]|oft_R)\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"\.(lora_embedding_[AB])\.[^.]+$"), r".\1"),
    (re.compile(r"\.(lora_magnitude_vector)(\.[^.]+){1,2}$"), r".\1"),
    (re.compile(r"\.(modules_to_save)\.[^.]+\.([^.]+)$"), r".\2"),
    (re.compile(rf"\.({_OWN}|lora_[AB])\.(?!weight$)[^.]+$"), r".\1"),
)


def stem_of(kind: Kind, config: Config, name: str, module: Module) -> str:
    """What the tensors of a module that is trained whole begin with."""
    targeted = kind.whole and not saved_whole(config, name)
    return f"{module.stem}.{kind.whole if targeted else ''}"


def whole_part(module: Module, attribute: str) -> Part:
    """A leaf that is trained itself, as it lies in PEFT's file."""
    shape, axes = module.shapes[attribute], order_of(module, attribute)
    return Part(attribute, "w", shape, shape, axes, tuple(shape[i] for i in axes))


def bias_key(module: Module, methods: Methods) -> str:
    """The key of a bias that is trained beside an adapter, on this module or on others."""
    adapted = module.name in methods and methods[module.name].name != "full"
    return f"{module.stem}.{'base_layer.' if adapted else ''}bias"


def entries(
    kind: Kind, config: Config, modules: Modules, methods: Methods, biases: Iterable[str]
) -> dict[str, tuple[str, Part]]:
    """Every tensor of an adapter by key: the path of ours, and how it is turned.

    >>> from lora_jax.io.peft.kinds import TABLE
    >>> from lora_jax.methods import lora
    >>> q = Module("q", None, "linear", {"weight": "q/kernel"}, {"weight": (16, 8)}, PREFIX + "q")
    >>> found = entries(TABLE["LORA"], {}, {"q": q}, {"q": lora(rank=4)}, [])
    >>> {key: part.theirs for key, (_, part) in found.items()}
    {'base_model.model.q.lora_A.weight': (4, 16), 'base_model.model.q.lora_B.weight': (8, 4)}
    """
    found: dict[str, tuple[str, Part]] = {}
    for name, method in methods.items():
        module = modules[name]
        if method.name == "full":
            stem = stem_of(kind, config, name, module)
            for attribute, path in module.leaves.items():
                found[stem + attribute] = path, whole_part(module, attribute)
        else:
            path = module.leaves["weight"]
            for part in kind.parts(module, method):
                found[f"{module.stem}.{part.end}"] = path, part
    for name in biases:
        module = modules[name]
        found[bias_key(module, methods)] = module.leaves["bias"], whole_part(module, "bias")
    return found


def shared_parts(kind: Kind, modules: Modules, methods: Methods) -> dict[str, Part]:
    """The tensors that stand in the file once for all modules, by key."""
    own = {name: method for name, method in methods.items() if method.name != "full"}
    return {part.end: part for part in kind.shared(modules, own)} if own else {}


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


def check_tensors(wanted: Mapping[str, Shape], tensors: Tensors, place: str) -> None:
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
