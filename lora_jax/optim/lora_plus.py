"""LoRA+: the factor that makes the output learns faster than the one that meets the input."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.errors import InputError
from lora_jax.optim.roles import ROLES

Rate = float | optax.Schedule


def lora_plus(
    learning_rate: Rate,
    roles: Any,
    *,
    ratio: float = 16.0,
    embedding_rate: Rate = 1e-6,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW with a rate for each role: `lr_a = learning_rate`, `lr_b = ratio * learning_rate`.

    `roles` is the tree that `lora_jax.optim.roles(frozen, trained)` gives. The factors of an
    embedding learn at `embedding_rate`, whatever `learning_rate` is; biases and norms at `lr_b`
    without `weight_decay`. Rates may be schedules. Clip the gradient before it:
    `optax.chain(optax.clip_by_global_norm(1.0), lora_plus(...))`.

    With `ratio = 1` and no embedding it is plain AdamW. InputError for a ratio that is not
    positive and for a role that is none.

    Source: Hayou et al. 2024, arXiv:2402.12354 (the authors advise a ratio of about 16, and a
    `learning_rate` half as large as LoRA's on hard tasks).

    >>> optimizer = lora_plus(1e-3, {"w": {"a": "a", "b": "b"}}, ratio=16)
    >>> params = {"w": {"a": jax.numpy.ones((3, 2)), "b": jax.numpy.ones((2, 5))}}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> [float(f"{updates['w'][name][0, 0]:.4f}") for name in ("a", "b")]
    [-0.001, -0.016]
    """
    if not 0 < ratio < float("inf"):
        raise InputError(f"lora_plus(ratio={ratio!r}): b learns at ratio times a's rate; give > 0")
    if unknown := sorted(set(jax.tree.leaves(roles)) - set(ROLES)):
        raise InputError(
            f"lora_plus(roles=...): {unknown[0]!r} is no role; known: {', '.join(ROLES)}"
        )

    def adamw(rate: Rate, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)

    faster = _times(learning_rate, ratio)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "a": adamw(learning_rate, weight_decay),
        "b": adamw(faster, weight_decay),
        "b_no_decay": adamw(faster, 0.0),
        "embedding": adamw(embedding_rate, weight_decay),
    }
    return optax.multi_transform(groups, roles)


def _times(rate: Rate, factor: float) -> Rate:
    """A rate, or every value of a schedule, times a factor."""
    if isinstance(rate, int | float):
        return factor * rate
    return lambda step: factor * jnp.asarray(rate(step))
