"""How the frozen kernels of a run are kept: the functions that `config.quantize` may name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lora_jax as lj
from lora_jax import methods, quant
from lora_jax.method import Method
from lora_jax.quant import Storage
from lora_jax.tree import matches

__all__ = ["int8", "nf4", "none"]


@dataclass(frozen=True)
class Base:
    """A storage (None: as they are) for adapted kernels and for all others that `targets` names."""

    storage: Storage | None = None
    targets: str = ""


def none() -> Base:
    """Kernels in the base's own dtype."""
    return Base()


def nf4(block: int = 64, double: bool = True, targets: str = "all_linear") -> Base:
    """`lora_jax.quant.nf4`: four bits a weight and its share of the scales."""
    return Base(quant.nf4(block=block, double=double), targets)


def int8(targets: str = "all_linear") -> Base:
    """`lora_jax.quant.int8`: eight bits a weight, a scale for each output unit."""
    return Base(quant.int8(), targets)


def stored(base: Base, target: Any, rules: Mapping[Any, Any], sites: lj.Sites) -> dict[Any, Any]:
    """The rules with every method over a quantised kernel, and fixed ones for the other targets."""
    storage = base.storage
    if storage is None:
        return dict(rules)

    def over(choice: Any) -> Any:
        if isinstance(choice, list | tuple):
            return [over(method or methods.fixed()) for method in choice]
        if not isinstance(choice, Method):
            return quant.quantized(methods.fixed(), storage)
        return choice if choice.anywhere else quant.quantized(choice, storage)

    taken = {p for p, site in sites.items() for rule in rules if matches(rule, p, site)}
    rest = [p for p, site in sites.items() if p not in taken and matches(target, p, site)]
    fixed = {re.escape(path): quant.quantized(methods.fixed(), storage) for path in rest}
    return {rule: over(choice) for rule, choice in rules.items()} | fixed
