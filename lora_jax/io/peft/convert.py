"""What PEFT has no format for, as plain LoRA on the base itself, where the update is a product."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_jax.adapter import Adapted, Trained, adapted, bind
from lora_jax.errors import InputError
from lora_jax.io.peft.kind import Kind
from lora_jax.io.peft.kinds import TABLE
from lora_jax.method import Method
from lora_jax.methods import lora
from lora_jax.operands import lifted

_BESIDE = ("full", "ia3_bias")  # what stands beside an adapter
_HOME: dict[str, Kind] = {
    name: kind for kind in TABLE.values() for name in kind.factories if name not in _BESIDE
}


def held(frozen: Any, trained: Trained) -> tuple[dict[str, Adapted], Trained, Kind]:
    """The nodes and trained arrays that one of PEFT's types can hold, and that type.

    Methods without a type of their own, starts that rewrite the base, factors that matrices share
    and mixtures of types become plain LoRA, of the rank of their update and with alpha = rank;
    `fixed` kernels are left out. Raises InputError for an update that is no product then.
    """
    nodes = {path: node for path, node in adapted(frozen).items() if node.method.name != "fixed"}
    strange = {path for path, node in nodes.items() if not _has_place(node)}
    kinds = {_HOME[node.method.name].peft_type for path, node in _own(nodes) if path not in strange}
    if len(kinds | ({"LORA"} if strange else set())) > 1:
        strange |= {
            path for path, node in _own(nodes) if _HOME.get(node.method.name) != TABLE["LORA"]
        }
        kinds = {"LORA"}
    if not strange:
        return nodes, trained, TABLE[next(iter(kinds), "LN_TUNING")]
    bound, trained = adapted(bind(frozen, trained)), dict(trained)
    for path in sorted(strange):
        nodes[path], trained[path] = _as_lora(nodes[path], bound.get(path))
    return nodes, trained, TABLE["LORA"]


def _own(nodes: Mapping[str, Adapted]) -> list[tuple[str, Adapted]]:
    return [(path, node) for path, node in nodes.items() if node.method.name not in _BESIDE]


def _has_place(node: Adapted) -> bool:
    """Whether PEFT has a type for this, on the base as it is."""
    each = [node.methods] if isinstance(node.methods, Method) else node.methods
    if node.method.name in _BESIDE:
        return True
    rewritten = "a_0" in node.frozen
    return not rewritten and all(
        method.name in _HOME and _HOME[method.name].holds(method) for method in each if method
    )


def _as_lora(node: Adapted, bound: Adapted | None) -> tuple[Adapted, dict[str, Any]]:
    """A node's update as the two factors of plain LoRA."""
    factors, site = node.method.factors, node.site
    if factors is None or site is None or bound is None:
        raise InputError(
            f"{node.method!r} on '{node.path}' has no place in PEFT's format here, and its update "
            "is no product of two matrices that plain LoRA could hold; merge it, or use "
            "save_adapter"
        )
    a, b = lifted(factors, site.stack)(*bound.matrices())
    rank = a.shape[-1]
    plain = lora(rank=rank, alpha=rank)
    kernel = {name: x for name, x in node.frozen.items() if name == "w"}
    node = replace(node, frozen=kernel, pool="", common={})
    if isinstance(node.methods, Method):
        return replace(node, methods=plain), {"a": a, "b": b}
    layers = tuple(method and plain for method in node.methods)
    a, b = (x.reshape(-1, *x.shape[len(site.stack) :]) for x in (a, b))
    trained = {str(i): {"a": a[i], "b": b[i]} for i, method in enumerate(layers) if method}
    return replace(node, methods=layers), trained
