"""The base of the task "sequences": an LSTM over characters, pretrained once and then kept."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from experiments.choices import check_choice
from experiments.settings import in_config
from experiments.tasks.task import check_positive, draw_rows
from lora_jax.data.domains import DOMAINS
from lora_jax.data.sequences import VOCABULARY
from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of
from lora_jax.io.packages import cache_folder
from lora_jax.io.sources import Source
from lora_jax.models.lstm import RecurrentConfig, initialise_recurrent
from lora_jax.models.network import Network
from lora_jax.train import adamw, adapter_loss, fit, init_state, make_step
from lora_jax.train.report import live_line

Batch = Mapping[str, Any]
Losses = Callable[[Any, Batch], jax.Array]


@dataclass(frozen=True)
class ModelSettings:
    """The LSTM and its pretraining, which takes the place of a download."""

    source: str = ""
    """Always empty: the base is trained here once, and then kept in the cache folder."""
    domains: tuple[str, ...] = ("movie", "amazon", "nyt")
    d_in: int = 64
    width: int = 192
    steps: int = 800
    batch: int = 64
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        check_positive("model", self, "d_in", "width", "batch")
        if self.source:
            raise InputError(
                f"config.model.source is {self.source!r}, but the base of this task is pretrained "
                "on config.model.domains; leave it empty"
            )
        for domain in self.domains:
            check_choice("model.domains", domain, DOMAINS)


def losses(network: Network) -> Losses:
    """Make `losses(params, batch) -> [B]`: -log p of each row's targets in nats, summed."""

    def each(params: Any, batch: Batch) -> jax.Array:
        table = jax.nn.log_softmax(network.apply(params, batch["ids"]))
        chosen = jnp.take_along_axis(table, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch["mask"], axis=-1)

    return each


def summed(each: Losses) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Make `loss(params, batch) -> (sum of losses, count of characters)`."""
    return lambda params, batch: (jnp.sum(each(params, batch)), jnp.sum(batch["mask"] * 1.0))


def drawn(rows: Batch, size: int, seed: int) -> Callable[[int], Batch]:
    """Make `batches(step)`: epochs of all rows one after another, each shuffled."""

    def batches(step: int) -> Batch:
        numbers = draw_rows(len(rows["ids"]), size, seed, step)
        return {name: array[numbers] for name, array in rows.items()}

    return batches


def pretrained(rows: Batch, options: ModelSettings, seed: int) -> Network:
    """The LSTM after `pretrain`, which runs once for its settings, seed and texts."""
    config = RecurrentConfig(VOCABULARY, options.d_in, options.width)
    network = initialise_recurrent(config, jax.random.key(seed))
    settings = json.dumps([asdict(options), seed, rows["ids"].shape]).encode()
    key = hashlib.sha256(settings + rows["ids"].tobytes()).hexdigest()[:16]
    path = cache_folder() / "pretrained" / f"lstm-{key}.safetensors"
    if not path.is_file():
        params = pretrain(network, rows, options, seed)
        _save(path, {name: np.asarray(leaf) for name, leaf in lj.tree.flatten(params).items()})
    try:
        params = lj.tree.replace(network.params, jax.tree.map(jnp.asarray, load_file(path)))
    except SafetensorError as error:
        raise InputError(f"{path} is no whole file ({error}); delete it and run again") from error
    source = Source(str(path), "characters", path, sha256_of([path]))
    return replace(network, params=params, source=source)


def pretrain(network: Network, rows: Batch, options: ModelSettings, seed: int) -> Any:
    """Train all parameters of a fresh model: AdamW, a tenth of warm-up, a cosine."""
    print(f"pretraining the base on {len(rows['ids'])} texts, once", flush=True)
    sites = lj.find_sites(network.apply, network.params, *network.inputs)
    frozen, trained = lj.attach(jax.random.key(seed), network.params, {".*": lj.full()}, sites)
    with in_config("model."):
        steps, rate = options.steps, options.learning_rate
        optimizer = adamw(steps=steps, learning_rate=rate, warmup=options.steps // 10)
    step = make_step(adapter_loss(summed(losses(network))), optimizer.transform)
    with live_line() as show:
        outcome = fit(
            step,
            init_state(trained, optimizer.transform),
            frozen,
            drawn(rows, options.batch, seed),
            steps=steps,
            schedule=optimizer.schedule,
            observers=(show,),
        )
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.stopped:
        raise InputError(f"pretraining: {outcome.stopped}; lower config.model.learning_rate")
    return lj.merge(frozen, outcome.trained)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        save_file(dict(arrays), Path(scratch) / path.name)
        (Path(scratch) / path.name).replace(path)
