"""Delta-LoRA between steps: when the kernel begins to move, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, is_adapted, stacked
from lora_jax.dynamics.dynamics import Dynamics, under
from lora_jax.errors import InputError
from lora_jax.method import Method


def delta_lora(*, start: int = 500, ratio: float | None = None) -> Dynamics:
    """From step `start + 1` on, the kernels move by `ratio s` times each step's change of `a b`.

    It acts on all parameters under the method `delta_lora`. The snapshot `a_k, b_k` is what the
    first such step found, so the literal sum of changes and the difference from the snapshot are
    equal. With `start < 0` the kernels move from the first step on. `ratio` overrides that of the
    methods. The state holds as many numbers again as are trained.

    Raises InputError for a ratio below 0, and where no parameter is under `delta_lora`.

    Source: Zi et al. 2023, arXiv:2309.02411.
    """
    if ratio is not None and not 0 <= ratio < float("inf"):
        raise InputError(f"delta_lora(ratio={ratio!r}): give a number from 0 on, such as 0.5")

    def init(frozen: Any, trained: Trained) -> Any:
        nodes = under("delta_lora", frozen)
        if not nodes:
            raise InputError(
                "dynamics.delta_lora moves kernels under the method delta_lora, and there is none; "
                "attach delta_lora(rank=8), or leave the dynamics out"
            )
        snapshot = {path: jax.tree.map(jnp.copy, trained[path]) for path in nodes}
        ratios = {path: _ratios(node, ratio) for path, node in nodes.items()}
        return {"moving": jnp.zeros((), bool), "ratio": ratios, "snapshot": snapshot}

    def after(
        state: Any, step: jax.Array, grads: Trained, before: Trained, after: Trained
    ) -> tuple[Any, Trained]:
        begins = (step > start) & ~state["moving"]
        now = {path: before[path] for path in state["snapshot"]}
        kept = jax.tree.map(lambda new, old: jnp.where(begins, new, old), now, state["snapshot"])
        return {**state, "moving": state["moving"] | begins, "snapshot": kept}, after

    def given(state: Any, frozen: Any) -> Any:
        made = {}
        for path, node in under("delta_lora", frozen).items():
            running = jnp.where(state["moving"], state["ratio"][path], 0)
            snapshot = _over_layers(node, state["snapshot"][path])
            arrays = {"a_k": snapshot["a"], "b_k": snapshot["b"], "ratio": running}
            made[path] = replace(node, frozen=node.frozen | arrays)
        return tree.replace(frozen, made, is_adapted)

    return Dynamics("delta_lora", init, after, frozen=given)


def _ratios(node: Adapted, ratio: float | None) -> jax.Array:
    """The ratio of every matrix of a stack; 0 for layers without a method."""
    held = node.frozen["ratio"]

    def one(method: Method | None) -> float:
        if method is None:
            return 0.0
        return method.innermost.hyper["ratio"] if ratio is None else ratio

    if isinstance(node.methods, Method):
        return jnp.full(held.shape, one(node.methods), held.dtype)
    return jnp.asarray([one(method) for method in node.methods], held.dtype).reshape(held.shape)


def _over_layers(node: Adapted, arrays: dict[str, Any]) -> dict[str, Any]:
    """Trained arrays of one node over its stack, also where every layer has its own ranks."""
    if isinstance(node.methods, Method):
        return arrays
    assert node.site is not None
    own = node.frozen["idle"] | arrays
    return stacked([own[str(i)] for i in range(len(node.methods))], node.site.stack)
