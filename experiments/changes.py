"""What a run does beside plain steps: the functions that `config.dynamics` may name."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

import lora_jax as lj
import lora_jax.lora_drop
from lora_jax import dynamics
from lora_jax.dynamics import Dynamics
from lora_jax.errors import InputError
from lora_jax.train import Optimizer

__all__ = ["adalora", "auto", "delta_lora", "lora_drop", "none", "relora"]


def _same(*given: Any) -> Any:
    return given[0] if len(given) == 1 else given


@dataclass(frozen=True)
class Change:
    """The places in a run where something may change; by default nothing does."""

    suits: Callable[[Iterable[lj.Method]], None] = lambda methods: None
    """Raises InputError for methods that it cannot go with, before a model is loaded."""
    rules: Callable[..., Any] = lambda rules, **run: rules
    """The rules to attach instead, given `key, task, sites, steps`."""
    dynamics: Callable[[int], Dynamics | None] = lambda steps: None
    """Around every step, given how many there are."""
    optimizer: Callable[[Optimizer], Optimizer] = _same
    """The optimizer to use instead."""
    between: Callable[[jax.Array, Any], Any] | None = None
    """From a key and the gradient transformation, the hook that `train.fit` calls between steps."""
    finish: Callable[[Any, Any], tuple[Any, Any]] = _same
    """The adapter to keep, from `frozen, trained` at the end."""


def auto() -> Change:
    """What the method needs: the change of its own name, if there is one."""
    return Change()


def none() -> Change:
    """Plain steps."""
    return Change()


def adalora(
    target_rank: int = 8,
    start: int | None = None,
    end: int | None = None,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    gamma: float = 0.5,
    penalty: str = "peft",
    sensitivity: str = "reference",
) -> Change:
    """`lora_jax.dynamics.adalora` over the whole run; what it masked is left out of the adapter."""
    options: Any = dict(locals())

    def suits(methods: Iterable[lj.Method]) -> None:
        ranks = [m.hyper["rank"] for m in methods if m.name == "adalora"]
        if not ranks:
            raise InputError("adalora shrinks the ranks of the method adalora; give method.name")
        if target_rank > max(ranks):
            raise InputError(
                f"adalora(target_rank={target_rank}) is above the rank {max(ranks)} to start with, "
                "and a budget only shrinks; give a lower dynamics.target_rank or a higher "
                "method.rank"
            )

    return Change(
        suits,
        dynamics=lambda steps: dynamics.adalora(steps=steps, **options),
        finish=dynamics.pruned,
    )


def delta_lora(start: int = 500, ratio: float | None = None) -> Change:
    """`lora_jax.dynamics.delta_lora`: the kernels move from step `start` on."""
    return Change(dynamics=lambda steps: dynamics.delta_lora(start=start, ratio=ratio))


def lora_drop(
    fraction: float = 0.1, threshold: float = 0.9, scope: str = "kind", epochs: int = 1
) -> Change:
    """`lora_jax.lora_drop` on the first `fraction` of the run's batches: then train who is left."""

    def rules(rules: Any, *, key: jax.Array, task: Any, sites: lj.Sites, steps: int) -> Any:
        batches = [task.batches(i) for i in range(max(1, round(fraction * steps)))]
        options: Any = {"threshold": threshold, "scope": scope, "epochs": epochs}
        mask = (lambda batch: batch["mask"]) if "mask" in batches[0] else None
        found = lora_jax.lora_drop.lora_drop(
            key, task.loss, task.params, rules, sites, batches, mask=mask, **options
        )
        for path, shares in found.importance.items():
            print(f"importance of {path}: {', '.join(f'{x:.3f}' for x in shares.ravel())}")
        return found.rules

    return Change(rules=rules)


def relora(every: int = 100, prune: float = 0.99, warmup: int = 10) -> Change:
    """`lora_jax.dynamics.relora`: merge and start anew after every `every` steps.

    The sum of all updates has no low rank, so what is kept are the kernels themselves.
    """
    return Change(
        finish=_whole,
        optimizer=lambda optimizer: dynamics.rewarmed(optimizer, every=every, warmup=warmup),
        between=lambda key, transform: dynamics.relora(key, transform, every=every, prune=prune),
    )


def _whole(frozen: Any, trained: Any) -> tuple[Any, Any]:
    """The same model with every adapted parameter as one trained whole."""
    params = lj.merge(frozen, trained)
    leaves = lj.tree.flatten(params)
    paths = {path if path in leaves else path.rpartition("/")[0] for path in lj.adapted(frozen)}
    rules: Any = {re.escape(path): lj.full() for path in paths}
    return lj.attach(jax.random.key(0), params, rules, lj.Sites({}, {}))
