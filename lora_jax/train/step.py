"""One update of the trained values, as a pure function compiled once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter import bind
from lora_jax.dynamics import Dynamics
from lora_jax.errors import InputError
from lora_jax.transform import factored

Batch = Mapping[str, Any]
Loss = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """What the next step needs: the count of steps, the trained values, the optimizer's moments.

    `dynamics` is what the run's `Dynamics` keep, () without any.
    """

    step: jax.Array
    trained: Any
    opt_state: Any
    dynamics: Any = ()


class StepInfo(NamedTuple):
    """For observers: mean loss per scored token, gradient norm, whether the update was applied."""

    loss: jax.Array
    grad_norm: jax.Array
    applied: jax.Array


def init_state(
    trained: Any,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Any = None,
    dynamics: Dynamics | None = None,
) -> TrainState:
    """Start at step 0 with fresh moments; `dynamics` start from `frozen` too.

    The values are copied: the step gives its state's buffers away.
    """
    trained = jax.tree.map(jnp.copy, trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    return state._replace(dynamics=dynamics.init(frozen, trained)) if dynamics else state


def adapter_loss(
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]], *, dropout: bool = False
) -> Loss:
    """Lift `loss(params, batch)` of a plain model to `loss(trained, frozen, batch, key)`.

    The adapters act factored; `key` reaches their dropout, if they have any.
    """
    forward = factored(loss)

    def lifted(
        trained: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return forward(bind(frozen, trained, key if dropout else None), batch)

    return lifted


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    seed: int = 0,
    dynamics: Dynamics | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, StepInfo]]:
    """Compile `step(state, frozen, batch) -> (state, info)`; it gives the old state's buffers away.

    The batch's B rows go through in `accumulate` micro-batches of B / accumulate rows under a scan.
    Losses are sums over tokens and the total is divided by the total weight, so one batch of B and
    k micro-batches of B / k are the same update to rounding, however uneven the answers' lengths.
    Dropout keys are folded from (seed, step, micro-batch). A step whose loss or gradient is not
    finite changes nothing but the count, and says so in `info.applied`.

    `clip` bounds the global norm of the gradient, for the optimizer and the dynamics alike (None or
    0: no bound); `info.grad_norm` is that before. `dynamics` (given to `init_state` too) act once a
    step, on the accumulated mean gradient; their penalty is part of that gradient and its norm, not
    of `info.loss`.
    """
    if accumulate < 1:
        raise InputError(f"accumulate={accumulate} must be at least 1")
    if clip is not None and not clip >= 0:
        raise InputError(f"clip={clip}: give a bound on the gradient's norm, or 0 for none")

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepInfo]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        frozen = dynamics.frozen(state.dynamics, frozen) if dynamics else frozen
        total, weight, grads = _accumulated(loss, state.trained, frozen, batch, key, accumulate)
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g * scale, grads)
        if dynamics and dynamics.penalty:
            pull = jax.grad(dynamics.penalty, argnums=1)(state.dynamics, state.trained)
            grads = jax.tree.map(jnp.add, grads, pull)
        norm = _norm(grads)
        applied = jnp.isfinite(total) & jnp.isfinite(norm)
        if clip:
            shrink = jnp.minimum(1.0, clip / norm)
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)

        def update(before: Any, opt_state: Any, kept: Any) -> tuple[Any, Any, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, before)
            trained: Any = optax.apply_updates(before, updates)
            if dynamics:
                kept, trained = dynamics.after(kept, state.step, grads, before, trained)
            return trained, opt_state, kept

        held = state[1:]
        held = jax.lax.cond(applied, update, lambda *held: held, *held)
        return TrainState(state.step + 1, *held), StepInfo(total * scale, norm, applied)

    return jax.jit(step, donate_argnums=0)


def _accumulated(
    loss: Loss, trained: Any, frozen: Any, batch: Batch, key: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, Any]:
    """Sum loss, weight and gradient over `count` micro-batches."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        (total, weight), grads = gradient(trained, frozen, batch, jax.random.fold_in(key, 0))
        return total, weight, grads

    def body(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        rows, index = part
        (total, weight), grads = gradient(trained, frozen, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, trained))
    sums, _ = jax.lax.scan(body, start, (_micro_batches(batch, count), jnp.arange(count)))
    return sums


def _norm(grads: Any) -> jax.Array:
    """Length of all gradients together, as one vector."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Reshape every [B, ...] to [count, B / count, ...]."""
    rows = {len(x) for x in batch.values()}
    if any(n % count for n in rows):
        raise InputError(
            f"a batch of {max(rows)} rows does not split into accumulate={count} equal "
            "micro-batches; make the batch size a multiple of it"
        )
    return {name: x.reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}
