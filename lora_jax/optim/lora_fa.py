"""LoRA-FA's optimizer: with `a` frozen, the step of `b` that is nearest to the whole gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter import Adapted, adapted
from lora_jax.errors import InputError
from lora_jax.method import Method


class LoraFaState(NamedTuple):
    """The count of steps, both moments, and `(1 / s^2) (a^T a + delta I)^+` of every pair."""

    count: jax.Array
    mu: Any
    nu: Any
    inverse: dict[str, Any]


def lora_fa(
    learning_rate: float | optax.Schedule,
    frozen: Any,
    *,
    corrected: bool = True,
    delta: float = 1e-8,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """AdamW on the corrected gradient of `b`, for adapters by `lora(freeze_a=True)`.

    ```
    g' = (1 / s^2) (a^T a + delta I)^+ g_b        the g' with the least |s a g' - G|
    m = b1 m + (1 - b1) g';   v = b2 v + (1 - b2) g'^2
    b = b - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps);   b = b - lr weight_decay b
    ```

    `s a g'` is the projection of the kernel's gradient `G` onto the span of `a`, whatever the
    scale of `a` and of `s`. `a` is constant, so the pseudo-inverse is computed once, by `init`,
    for each layer of a stack with its own `s`, in float32 at least; experts that share one `b` add
    up. Trained arrays that are no such pair take the same AdamW uncorrected, as all do with
    `corrected=False` (the paper's first version). Adam is in its older form: `eps` is added
    before the bias correction, and the decay acts on what the step has already moved.

    `frozen` is the tree that `attach` gave. InputError for a rate or a decay below zero.

    Source: Zhang et al. 2023, arXiv:2308.03303; the correction is that of PEFT's LoraFAOptimizer.

    >>> import lora_jax as lj
    >>> params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    >>> sites = lj.find_sites(lambda p, x: x @ p["w"], params, x)
    >>> rules = {"w": lj.lora(rank=2, freeze_a=True)}
    >>> frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
    >>> lora_fa(1e-3, frozen).init(trained).inverse["w"]["b"].shape
    (2, 2)
    """
    if weight_decay < 0 or (not callable(learning_rate) and learning_rate < 0):
        raise InputError(
            f"lora_fa(learning_rate={learning_rate!r}, weight_decay={weight_decay!r}): neither may "
            "be below zero"
        )
    nodes = {path: node for path, node in adapted(frozen).items() if corrected and _frozen_a(node)}
    sources = {path: (node, node.frozen["a"], node.frozen["scale"]) for path, node in nodes.items()}

    def init(params: Any) -> LoraFaState:
        inverse = {
            path: _inverses(*source, params[path], delta) for path, source in sources.items()
        }
        zeros = jax.tree.map(jnp.zeros_like, params)
        again = jax.tree.map(jnp.zeros_like, params)  # a step gives buffers away, so none is shared
        return LoraFaState(jnp.zeros((), jnp.int32), zeros, again, inverse)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LoraFaState]:
        if params is None:
            raise InputError("lora_fa decays what it trains; give update(grads, state, trained)")
        grads = {path: _correct(g, state.inverse.get(path, {})) for path, g in updates.items()}
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        size = rate * jnp.sqrt(_seen(b2, count)) / _seen(b1, count)

        def step(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            move = -(size * m / (jnp.sqrt(v) + eps)).astype(p.dtype)
            return move - (rate * weight_decay * (p + move)).astype(p.dtype)

        return jax.tree.map(step, params, mu, nu), LoraFaState(count, mu, nu, state.inverse)

    return optax.GradientTransformation(init, update)


def _frozen_a(node: Adapted) -> bool:
    """Whether a parameter's update is `s a b` with `a` frozen."""
    return node.site is not None and {"a", "scale"} <= set(node.frozen)


def _inverses(
    node: Adapted, a: jax.Array, scale: jax.Array, trained: dict[str, Any], delta: float
) -> dict[str, Any]:
    """The matrix that corrects each `b`; layers of their own rank have one each."""
    if isinstance(node.methods, Method):
        return {"b": _inverse(a, scale, trained["b"], delta)} if "b" in trained else {}
    layers = {name: int(name) for name in trained}
    a, scale = a.reshape(-1, *a.shape[-2:]), scale.reshape(-1)
    return {
        name: {"b": _inverse(a[i, :, : part["b"].shape[0]], scale[i], part["b"], delta)}
        for (name, i), part in zip(layers.items(), trained.values(), strict=True)
        if "b" in part
    }


def _inverse(a: jax.Array, scale: jax.Array, b: jax.Array, delta: float) -> jax.Array:
    """`(sum s^2 (a^T a + delta I))^+`, the sum over the matrices that one `b` serves."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    a, scale = a.astype(dtype), scale.astype(dtype)
    rank = a.shape[-1]
    with jax.default_matmul_precision("highest"):
        gram = a.mT @ a + delta * jnp.eye(rank, dtype=dtype).reshape(*(1,) * (a.ndim - 2), rank, -1)
    gram = jnp.square(scale)[..., None, None] * gram
    joint = [i for i in range(gram.ndim - 2) if b.shape[i] == 1]
    gram = jnp.sum(gram, axis=joint, keepdims=True)
    return jnp.linalg.pinv(gram, rtol=rank * jnp.finfo(dtype).eps, hermitian=True)


def _seen(decay: float, count: jax.Array) -> jax.Array:
    """`1 - decay^count`, without the cancellation that costs float32 half its digits at first."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def _correct(grads: Any, inverse: Any) -> Any:
    """Gradients with the inverse applied where there is one."""
    if isinstance(inverse, dict):
        return {n: _correct(g, inverse[n]) if n in inverse else g for n, g in grads.items()}
    with jax.default_matmul_precision("highest"):
        return (inverse @ grads.astype(inverse.dtype)).astype(grads.dtype)
