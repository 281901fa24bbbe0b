"""ONNX files as tables of named arrays: nothing in the graph is ever run.

Format: https://onnx.ai/onnx/intro/concepts.html. Exporters keep the names of most parameters, but
store the kernel of a linear layer transposed and without its name (`onnx::MatMul_1966`). Which
layer it belongs to is read off the graph: from the named bias that is added to its product.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of


@dataclass(frozen=True, eq=False)
class Graph:
    """What an ONNX file holds, by name."""

    where: str
    """The file, for messages."""
    weights: Mapping[str, np.ndarray]
    """Initialisers and constants of the main graph, as stored, under their own names."""
    linear: Mapping[str, np.ndarray]
    """Kernels [d_in, d_out] of the linear layers under the layer's name, "encoder.0.mlp.fc1"."""
    metadata: Mapping[str, str]
    """What the producer wrote about the file, its own name and version among them."""
    fingerprint: str
    """sha256, in hex, of the file, followed by the files it keeps tensors in, if any."""

    def weight(self, name: str) -> np.ndarray:
        """The initialiser of that name; InputError, naming the file, when there is none."""
        if name not in self.weights:
            raise InputError(f"{self.where} has no tensor {name!r}; is it the model you meant?")
        return self.weights[name]

    def kernel(self, name: str) -> np.ndarray:
        """The kernel [d_in, d_out] of the linear layer of that name; InputError as in `weight`."""
        if name not in self.linear:
            raise InputError(
                f"{self.where} has no linear layer {name!r}; is it the model you meant?"
            )
        return self.linear[name]


def open_onnx(path: str | Path) -> Graph:
    """Reads the tensors of an .onnx file and which linear layer each kernel belongs to.

    Tensors that the file keeps in others beside it are read too; those inside the branches of an
    `If` or a `Loop` are not. Raises InputError when the file is missing or is not a whole ONNX
    model, and when the `onnx` package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}; give an .onnx file")
    model, beside = _read(path)
    weights = dict(_tensors(model.graph, path))
    if not weights:
        raise InputError(f"{path} is an ONNX model without tensors; fetch the file again")
    return Graph(
        where=str(path),
        weights=weights,
        linear=dict(_linear(model.graph, weights)),
        metadata={entry.key: entry.value for entry in model.metadata_props}
        | {"producer": f"{model.producer_name} {model.producer_version}".strip()},
        fingerprint=sha256_of([path, *beside]),
    )


def _read(path: Path) -> tuple[Any, list[Path]]:
    """The parsed model, with its tensors, and the files beside it that some of them lie in."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.external_data_helper import load_external_data_for_model
    except ImportError:
        raise InputError(
            f'{path} is an ONNX file; to read it, pip install "lora-jax[onnx]"'
        ) from None
    try:
        model = onnx.load(path, load_external_data=False)
        beside = sorted({path.parent / name for name in _locations(model.graph)})
        load_external_data_for_model(model, str(path.parent))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise InputError(f"{path} is not a whole ONNX model ({reason}); fetch it again") from None
    return model, beside


def _locations(graph: Any) -> Iterator[str]:
    for tensor in graph.initializer:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _tensors(graph: Any, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    from onnx import numpy_helper

    named = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant":
            named += [(node.output[0], each.t) for each in node.attribute if each.name == "value"]
    for name, tensor in named:
        try:
            yield name, numpy_helper.to_array(tensor)
        except ValueError as fault:
            raise InputError(
                f"{path}: tensor {name!r} is garbled ({fault}); fetch it again"
            ) from None


def _linear(graph: Any, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    added = {
        product: bias
        for node in graph.node
        if node.op_type == "Add"
        for bias, product in (node.input, reversed(node.input))
        if bias in weights and product not in weights
    }
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            continue
        kernel = weights[node.input[1]]
        if kernel.ndim != 2:
            continue
        if node.op_type == "Gemm":
            bias = node.input[2] if len(node.input) > 2 else ""
            kernel = kernel.T if _flag(node, "transB") else kernel
        else:
            bias = added.get(node.output[0], "")
        yield _layer(node, bias), kernel


def _flag(node: Any, name: str) -> bool:
    return any(each.name == name and each.i for each in node.attribute)


def _layer(node: Any, bias: str) -> str:
    """The layer's name: its bias's or its kernel's, or else its place in the exporter's scopes."""
    for name, ending in ((bias, ".bias"), (node.input[1], ".weight")):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return node.name.strip("/").rpartition("/")[0].replace("/", ".")
