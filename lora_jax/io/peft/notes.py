"""lora_jax.json: what PEFT's own files cannot say, the exact methods by path and the base."""

from collections.abc import Mapping
from typing import Any

from lora_jax.adapter import Adapted
from lora_jax.attachment import Choice
from lora_jax.errors import InputError
from lora_jax.io.peft.kinds import TABLE
from lora_jax.io.peft.kinds.lora import scale
from lora_jax.io.peft.plan import same_function
from lora_jax.method import Method
from lora_jax.methods.ia3 import ia3_bias

_FORMAT = 1
_FACTORIES: dict[str, Any] = {
    name: factory for kind in TABLE.values() for name, factory in kind.factories.items()
} | {"ia3_bias": ia3_bias}
# Starts that need nothing but the kernel; how an adapter started is no matter for the rest.
_STARTS = ("kaiming", "gaussian", "orthogonal", "mica")


def notes_of(
    nodes: Mapping[str, Adapted], provenance: Mapping[str, Any], version: str | None
) -> dict[str, Any]:
    """The content of lora_jax.json: the methods by path, the base, the library's version."""
    methods = {path: _written(node.methods) for path, node in nodes.items()}
    notes = {"format": _FORMAT, "library": "lora_jax", "version": version, "methods": methods}
    return notes | {"provenance": dict(provenance)}


def _written(choice: Any) -> Any:
    if isinstance(choice, Method):
        hyper = dict(choice.hyper)
        if choice.name in ("lora", "dora") and hyper["init"] not in _STARTS:
            hyper["init"] = "kaiming"
        return {"name": choice.name, **hyper}
    return [method and _written(method) for method in choice]


def _rebuilt(written: Any, place: str) -> Any:
    if isinstance(written, list):
        return [method and _rebuilt(method, place) for method in written]
    try:
        hyper = dict(written)
        return _FACTORIES[hyper.pop("name")](**hyper)
    except (KeyError, TypeError, ValueError) as fault:
        raise InputError(
            f"{place}/lora_jax.json: {written!r} is no method that this version knows ({fault}); "
            "delete lora_jax.json to load what adapter_config.json says"
        ) from None


def recorded(
    notes: Mapping[str, Any], choices: Mapping[str, Choice], place: str
) -> dict[str, Choice]:
    """The choices as lora_jax.json has them: with dropout, init and frozen factors as trained.

    Without the file, what adapter_config.json says. Raises InputError where the two disagree.
    """
    if "methods" not in notes:
        return dict(choices)
    found = {path: _rebuilt(written, place) for path, written in notes["methods"].items()}
    wrong = sorted(set(found) ^ set(choices))
    wrong = wrong or [path for path in found if not _agree(found[path], choices[path])]
    if wrong:
        raise InputError(
            f"{place}: adapter_config.json and lora_jax.json disagree about '{wrong[0]}' "
            f"({choices.get(wrong[0])!r} and {found.get(wrong[0])!r}); delete lora_jax.json to "
            "load what adapter_config.json says"
        )
    return found


def _agree(x: Any, y: Any) -> bool:
    if isinstance(x, Method) and isinstance(y, Method):
        return same_function(x, y)
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        return all(
            bool(a) == bool(b) and (not a or _agree(a, b)) for a, b in zip(x, y, strict=True)
        )
    if isinstance(x, list) and isinstance(y, Method):  # layers that differ in training only
        return all(a and same_function(a, y) for a in x)
    return False


def check_base(notes: Mapping[str, Any], fingerprint: str | None, place: str) -> None:
    """Raise InputError when the notes name another base than the one with this fingerprint."""
    provenance = notes.get("provenance") or {}
    theirs = provenance.get("fingerprint")
    if fingerprint and theirs and theirs != fingerprint:
        source = provenance.get("source", "another base")
        raise InputError(
            f"'{place}' is an adapter for {source} (weights {theirs[:12]}...), not for this base "
            f"(weights {fingerprint[:12]}...); load the base that it names"
        )


def rows(nodes: Mapping[str, Adapted]) -> list[tuple[str, str]]:
    """For the model card: what is adapted, and how, in words."""
    return [(path.removesuffix("/kernel"), _words(node.methods)) for path, node in nodes.items()]


def _words(choice: Any) -> str:
    if isinstance(choice, Method):
        return describe(choice)
    layers: dict[str, list[str]] = {}
    for layer, method in enumerate(choice):
        if method:
            layers.setdefault(describe(method), []).append(str(layer))
    return "; ".join(
        f"layer{'s' * (len(at) > 1)} {', '.join(at)}: {words}" for words, at in layers.items()
    )


def describe(method: Method) -> str:
    """A method in words.

    >>> from lora_jax.methods import hra, lora
    >>> describe(lora(rank=4, alpha=8, dropout=0.1)), describe(hra(rank=4))
    ('lora, rank 4, alpha 8, scale 2, dropout 0.1', 'hra, rank 4')
    """
    if method.name == "full":
        return "trained whole"
    hyper = method.hyper
    if method.name not in ("lora", "dora") or "rank" not in hyper:
        return ", ".join([method.name, *_settings(method)])
    words = [
        method.name,
        f"rank {hyper['rank']}",
        f"alpha {hyper['alpha']:g}",
        f"scale {scale(method):.6g}" + " (rsLoRA)" * hyper["rslora"],
        f"dropout {hyper['dropout']:g}" if hyper["dropout"] else "",
        "a frozen" if hyper.get("freeze_a") else "",
    ]
    return ", ".join(word for word in words if word)


def _settings(method: Method) -> list[str]:
    """The arguments of a method that are not left at nothing, in words."""
    shown = {name: value for name, value in method.hyper.items() if value not in (None, False, "")}
    return [
        f"{name.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else name.replace("_", " ")
        if value is True
        else f"{name.replace('_', ' ')} {value}"
        for name, value in shown.items()
    ]
