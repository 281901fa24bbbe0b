"""The table between Hugging Face's ViT and DINOv2 names and our parameter paths.

Ours stack the layers, as for a Llama: `layers/attn/q_proj/kernel` [L, d_in, d_out] is, for every
layer, their `encoder.layer.N.attention.attention.query.weight` [d_out, d_in].
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.checkpoint import Checkpoint, Names
from lora_jax.io.onnx import Graph

_CLS, _POSITIONS = "embeddings.cls_token", "embeddings.position_embeddings"
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_OUTER = {
    "cls": _CLS,
    "positions": _POSITIONS,
    "patches/kernel": _PATCHES,
    "patches/bias": "embeddings.patch_embeddings.projection.bias",
    "norm/scale": "layernorm.weight",
    "norm/bias": "layernorm.bias",
}
_ATTENTION = {
    "layers/attn/q_proj": "attention.attention.query",
    "layers/attn/k_proj": "attention.attention.key",
    "layers/attn/v_proj": "attention.attention.value",
    "layers/attn/o_proj": "attention.output.dense",
}
_INNER = {
    "vit": {
        **_ATTENTION,
        "layers/attn_norm": "layernorm_before",
        "layers/mlp_norm": "layernorm_after",
        "layers/mlp/up_proj": "intermediate.dense",
        "layers/mlp/down_proj": "output.dense",
    },
    "dinov2": {
        **_ATTENTION,
        "layers/attn_norm": "norm1",
        "layers/mlp_norm": "norm2",
        "layers/mlp/up_proj": "mlp.fc1",
        "layers/mlp/down_proj": "mlp.fc2",
    },
}
_SCALES = {
    "layers/attn_scale": "layer_scale1.lambda1",
    "layers/mlp_scale": "layer_scale2.lambda1",
}
# Everything else is a head, or serves pretraining alone.
_BACKBONE = re.compile(r"(embeddings|encoder|layernorm)\.(?!mask_token).*")

_HEAD = 64
"""Width of one attention head in every published size; an exported graph does not say it."""


def to_hf(kind: str, path: str, layer: int | None) -> str:
    """The tensor name of one layer's slice of a path; `layer` is None outside the stack.

    >>> to_hf("dinov2", "layers/mlp/up_proj/kernel", 3)
    'encoder.layer.3.mlp.fc1.weight'
    >>> to_hf("vit", "norm/scale", None)
    'layernorm.weight'
    """
    if layer is None:
        return _OUTER[path]
    if path in _SCALES:
        return f"encoder.layer.{layer}.{_SCALES[path]}"
    module, _, leaf = path.rpartition("/")
    ending = "bias" if leaf == "bias" else "weight"
    return f"encoder.layer.{layer}.{_INNER[kind][module]}.{ending}"


VIT = {kind: Names(kind, partial(to_hf, kind)) for kind in _INNER}
"""The names by `model_type`: "vit" or "dinov2"."""


def backbone_of(checkpoint: Checkpoint) -> Checkpoint:
    """The backbone's tensors of a checkpoint, under the names and in the shapes of a bare one.

    The class token becomes [D], positions [1 + N, D], the patches' kernel [D, 3, width, height]:
    with its axes turned about, like every other kernel's, it is then [height, width, 3, D].
    """
    prefix = f"{checkpoint.config.get('model_type')}."
    home = {name.removeprefix(prefix): name for name in checkpoint.shapes}
    home = {name: stored for name, stored in home.items() if _BACKBONE.fullmatch(name)}
    return dataclasses.replace(
        checkpoint,
        shapes={name: _shape(name, checkpoint.shapes[stored]) for name, stored in home.items()},
        read=lambda name: _shaped(name, checkpoint.read(home[name])),
    )


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _shaped(name, np.empty(shape, np.bool_)).shape


def _shaped(name: str, tensor: np.ndarray) -> np.ndarray:
    if name == _PATCHES:
        return tensor.swapaxes(-1, -2)
    for _ in range({_CLS: 2, _POSITIONS: 1}.get(name, 0)):
        tensor = tensor[0] if tensor.shape[:1] == (1,) else tensor
    return tensor


def checkpoint_of(graph: Graph) -> Checkpoint:
    """The ViT or DINOv2 in an exported graph, as its Hugging Face folder would be.

    What stands in the graph beside the backbone is left out. Its configuration is read off the
    shapes; heads are 64 wide, as in every published size.
    """
    prefixes = [name.removesuffix(_CLS) for name in graph.weights if name.endswith(_CLS)]
    if len(prefixes) != 1:
        raise InputError(
            f"{graph.where} holds {len(prefixes)} tensors '...{_CLS}', not one; give a ViT or "
            "DINOv2 exported from transformers"
        )
    kernels = {f"{name}.weight": kernel.T for name, kernel in graph.linear.items()}
    tensors = {
        name.removeprefix(prefixes[0]): tensor
        for name, tensor in {**graph.weights, **kernels}.items()
        if name.startswith(prefixes[0])
    }
    if _POSITIONS not in tensors:
        tensors[_POSITIONS] = _folded_positions(graph, tensors[_CLS].shape[-1])
    return Checkpoint(
        where=graph.where,
        config=_config(tensors, graph.where),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=tensors.__getitem__,
        fingerprint=lambda: graph.fingerprint,
    )


def _folded_positions(graph: Graph, width: int) -> np.ndarray:
    """Positions [1, 1 + N, D] of a graph whose exporter cut them in two and dropped their name.

    They are its only anonymous tensors [1, 1, D], the class token's, and [1, N, D], the patches'.
    """
    parts = [
        tensor
        for name, tensor in graph.weights.items()
        if name.startswith("onnx::") and tensor.ndim == 3 and tensor.shape[::2] == (1, width)
    ]
    parts.sort(key=lambda tensor: tensor.shape[1])
    if len(parts) != 2 or parts[0].shape[1] != 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in parts)
        raise InputError(
            f"{graph.where} has no '{_POSITIONS}', nor two nameless tensors [1, 1, {width}] and "
            f"[1, N, {width}] in its place ({shapes or 'none'}); export it again"
        )
    return np.concatenate(parts, axis=1)


def _config(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """What the config.json beside such tensors would say."""
    kind = "dinov2" if to_hf("dinov2", "layers/attn_scale", 0) in tensors else "vit"
    up = to_hf(kind, "layers/mlp/up_proj/kernel", 0)
    missing = [name for name in (_PATCHES, up) if name not in tensors]
    if missing:
        raise InputError(f"{where} has no '...{missing[0]}'; give a whole ViT or DINOv2")
    width, _, patch, _ = tensors[_PATCHES].shape
    layers = (re.match(r"encoder\.layer\.(\d+)\.", name) for name in tensors)
    return {
        "model_type": kind,
        "hidden_size": width,
        "patch_size": patch,
        "image_size": math.isqrt(tensors[_POSITIONS].shape[1] - 1) * patch,
        "num_hidden_layers": 1 + max(int(layer[1]) for layer in layers if layer),
        "num_attention_heads": max(1, width // _HEAD),
        "intermediate_size": tensors[up].shape[0],
        "mlp_ratio": tensors[up].shape[0] / width,
    }
