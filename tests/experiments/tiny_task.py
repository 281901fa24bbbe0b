"""A task that is no language model: points on a plane, told apart by a frozen layer and a head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from experiments.tasks.task import Measured, Task, check_positive, compiled, draw_rows
from lora_jax.errors import InputError
from lora_jax.evaluate import Accuracy
from lora_jax.io.sources import Source

LOADED = []
"""One entry a call of make."""


@dataclass(frozen=True)
class Data:
    """How many points."""

    points: int = 40
    kinds: tuple[str, ...] = ("near", "far")

    def __post_init__(self):
        check_positive("data", self, "points")


@dataclass(frozen=True)
class ModelSettings:
    """How wide the base is."""

    width: int = 6


def apply(params, x):
    hidden = jnp.tanh(x @ params["body"]["kernel"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, batch):
    scores = jax.nn.log_softmax(apply(params, batch["x"]))
    return -jnp.take_along_axis(scores, batch["y"][:, None], 1).sum(), jnp.float32(len(batch["y"]))


def make(settings):
    LOADED.append(settings)
    if settings.data.points == 13:
        raise InputError("config.data.points is 13; superstition")
    width, count = settings.model.width, settings.data.points
    rng = np.random.default_rng(settings.seed)
    x = rng.normal(size=(2 * count, 3)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int32)
    body = jax.random.normal(jax.random.key(0), (3, width))
    head = {"kernel": jnp.zeros((width, 2)) + 0.01, "bias": jnp.zeros(2)}
    scores = compiled(apply)

    def batches(step):
        rows = draw_rows(count, settings.train.batch, settings.seed, step)
        return {"x": x[rows], "y": y[rows]}

    def measure(frozen, trained):
        chosen = np.asarray(scores(frozen, trained, x[count:])).argmax(1)
        return Measured(Accuracy.of(int((chosen == y[count:]).sum()), count))

    return Task(
        apply=apply,
        params={"body": {"kernel": body}, "head": head},
        inputs=(jax.ShapeDtypeStruct((5, 3), jnp.float32),),
        loss=loss,
        batches=batches,
        measure=measure,
        about=f"{count} points to train, {count} to test; 2 kinds",
        fresh={"head/.*": lj.full()},
        source=Source("nowhere", "plane", path=None, fingerprint="f" * 64),
    )
