"""Silero VAD's published weights, read out of an ONNX file."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.onnx import Graph, open_onnx
from lora_jax.io.sources import locate
from lora_jax.models.network import Network
from lora_jax.models.silero import SileroConfig, silero_network

SILERO = (
    "pypi://silero-vad==6.2.3/silero_vad/data/silero_vad_openvino_16k.onnx"
    "#sha256=7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"
)
"""The weights that the published runtime uses; the safetensors beside them hold older ones."""


def load_silero(source: str | Path = SILERO) -> Network:
    """The published voice detector: `apply(params, chunks, stream=None) -> probabilities, stream`.

    `chunks` [B, N, 512] are 16 kHz samples in [-1, 1] cut into chunks of 32 ms. The returned
    `Stream` is the argument of the next call on the same recordings; without one they begin.
    `features` are the mean over chunks of what the head reads [B, 128]. Equal to onnxruntime to
    1e-6. Raises InputError for chunks or a stream of another shape, or a file of another model.
    """
    place = locate(source)
    graph = open_onnx(place.path)
    config = SileroConfig()
    network = silero_network(config, assemble_silero(graph, config))
    place = dataclasses.replace(place, fingerprint=graph.fingerprint)
    return dataclasses.replace(network, source=place)


def assemble_silero(graph: Graph, config: SileroConfig) -> dict[str, Any]:
    """The ONNX tensors as parameters: convolutions [taps, c_in, c_out], kernels [d_in, d_out]."""

    def read(ending: str, *shape: int) -> np.ndarray:
        names = [name for name in graph.weights if name.endswith(ending)]
        if len(names) != 1 or graph.weights[names[0]].shape != shape:
            found = [graph.weights[name].shape for name in names]
            raise InputError(
                f"{graph.where} should have one tensor '...{ending}' of shape {shape}, it has "
                f"{found}; give silero_vad_openvino_16k.onnx of silero-vad 6"
            )
        return graph.weights[names[0]]

    sizes = (config.window // 2 + 1, *config.channels)
    params: dict[str, Any] = {}
    for index, (c_in, c_out) in enumerate(pairwise(sizes)):
        kernel = read(f"encoder.{index}.reparam_conv.weight", c_out, c_in, 3)
        bias = read(f"encoder.{index}.reparam_conv.bias", c_out)
        params[f"conv{index + 1}"] = {"kernel": kernel.transpose(2, 1, 0), "bias": bias}
    gates, inner, width = 4 * config.width, sizes[-1], config.width
    bias = read("rnn.bias_ih", gates) + read("rnn.bias_hh", gates)
    params["lstm"] = {
        "input": {"kernel": read("rnn.weight_ih", gates, inner).T, "bias": bias},
        "recurrent": {"kernel": read("rnn.weight_hh", gates, width).T},
    }
    kernel = read("decoder.2.weight", 1, width, 1)[:, :, 0].T
    params["head"] = {"kernel": kernel, "bias": read("decoder.2.bias", 1)}
    return jax.tree.map(jnp.asarray, params)
