"""The base of the task "ratings": a factorisation, pretrained in seconds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.task import check_positive, shuffled
from lora_jax.data.ratings import Ratings
from lora_jax.errors import InputError
from lora_jax.models.network import Network
from lora_jax.models.recommender import RecommenderConfig, initialise_recommender

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class ModelSettings:
    """The factorisation and its pretraining, which takes the place of a download."""

    source: str = ""
    """Always empty: the base is trained here, in seconds."""
    width: int = 16
    epochs: int = 15
    batch: int = 1024
    learning_rate: float = 1e-2
    penalty: float = 0.05
    """Weight of |p|^2 + |q|^2, the vectors of a rating's user and item, in the pretraining loss."""

    def __post_init__(self) -> None:
        check_positive("model", self, "width", "epochs", "batch")
        if self.source:
            raise InputError(
                f"config.model.source is {self.source!r}, but the base of this task is pretrained "
                "on its own data; leave it empty"
            )


def squared_loss(network: Network) -> Loss:
    """Make `loss(params, batch) -> (sum of squared errors, sum of weights)`."""

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        errors = network.apply(params, batch["users"], batch["items"]) - batch["targets"]
        return jnp.sum(batch["weights"] * jnp.square(errors)), jnp.sum(batch["weights"])

    return loss


def pretrain(known: Ratings, options: ModelSettings, seed: int) -> Network:
    """Fit a factorisation to the ratings by Adam under a cosine; seconds for 66,000.

    It minimises mean((r - rating(u, i))^2 + penalty (|p_u|^2 + |q_i|^2)). Users and items without a
    rating get the mean vector of those with one. The same bits for the same ratings, options and
    seed, on one machine.
    """
    config = RecommenderConfig(len(known.user_names), len(known.item_names), options.width)
    network = initialise_recommender(config, jax.random.key(seed))
    size = min(options.batch, len(known))
    steps = len(known) // size
    rate = optax.cosine_decay_schedule(options.learning_rate, steps * options.epochs)
    optimizer = optax.adam(rate)
    epoch = jax.jit(_epoch(_penalised(squared_loss(network), options.penalty), optimizer))
    params = network.params | {"mean": jnp.asarray(known.values.mean())}
    started, held = time.perf_counter(), (params, optimizer.init(params))
    for number in range(options.epochs):
        rows = known.take(shuffled(len(known), seed, number)[: steps * size]).batch()
        held = epoch(held, {name: x.reshape(steps, size) for name, x in rows.items()})
    params = jax.block_until_ready(_with_mean_rows(held[0], known))
    if not np.isfinite(params["items"]["embedding"]).all():
        raise InputError("pretraining: the loss is not finite; lower config.model.learning_rate")
    seconds = time.perf_counter() - started
    print(f"pretrained on {len(known)} ratings in {seconds:.1f} s", flush=True)
    return replace(network, params=params)


def _penalised(loss: Loss, penalty: float) -> Callable[[Any, Batch], jax.Array]:
    """The mean loss of a batch, and the penalty on the vectors it looks up."""

    def total(params: Any, batch: Batch) -> jax.Array:
        errors, count = loss(params, batch)
        vectors = [params[name]["embedding"][batch[name]] for name in ("users", "items")]
        return (errors + penalty * sum(jnp.sum(jnp.square(rows)) for rows in vectors)) / count

    return total


def _epoch(
    loss: Callable[[Any, Batch], jax.Array], optimizer: optax.GradientTransformation
) -> Callable[[Any, Batch], Any]:
    """Make `epoch((params, state), batches)`: one step after another over batches [S, B]."""

    def update(held: Any, batch: Batch) -> tuple[Any, None]:
        params, state = held
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return lambda held, batches: jax.lax.scan(update, held, batches)[0]


def _with_mean_rows(params: Any, known: Ratings) -> Any:
    """Give rows that no rating has reached the mean of the others."""
    filled = dict(params)
    for name, numbers in (("users", known.users), ("items", known.items)):
        table, reached = params[name]["embedding"], np.unique(numbers)
        mean = table[reached].mean(axis=0)
        rows = jnp.broadcast_to(mean, table.shape).at[reached].set(table[reached])
        filled[name] = {"embedding": rows}
    return filled
