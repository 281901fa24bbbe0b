"""ONNX files as named arrays: which kernel belongs to which layer, and garbled files."""

import builtins

import numpy as np
import pytest
import tiny_vit

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of
from lora_jax.io.onnx import open_onnx

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)


def save(path, nodes=(), **weights):
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [], initializer=held),
        producer_name="maker",
        producer_version="1.2",
    )
    helper.set_model_props(model, {"license": "MIT"})
    onnx.save(model, path)
    return path


def test_nameless_kernels_are_found_by_their_bias(tmp_path):
    graph = open_onnx(tiny_vit.onnx_file(tmp_path / "a.onnx"))
    stored = tiny_vit.tensors("dinov2", tiny_vit.config("dinov2"))
    assert len(graph.linear) == 18
    for name, kernel in graph.linear.items():
        wanted = stored[f"{name.removeprefix('backbone.')}.weight"].T
        np.testing.assert_array_equal(kernel, wanted)
    np.testing.assert_array_equal(graph.weights["decoder.weight"], np.ones((2, 3)))


def test_products_of_every_kind(tmp_path):
    bias, nodes = np.ones(4, np.float32), [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/net/free/MatMul"),
        helper.make_node("MatMul", ["x", "net.named.weight"], ["b"]),
        helper.make_node("Gemm", ["x", "torch", "net.turned.bias"], ["c"], transB=1),
        helper.make_node("Gemm", ["x", "onnx::MatMul_1", "net.plain.bias"], ["d"]),
        helper.make_node("MatMul", ["x", "stack"], ["e"]),
        helper.make_node("MatMul", ["x", "y"], ["f"]),
    ]  # fmt: skip
    weights = {"onnx::MatMul_1": KERNEL, "net.named.weight": 2 * KERNEL, "torch": KERNEL.T}
    weights |= {"stack": KERNEL[None], "net.turned.bias": bias, "net.plain.bias": bias}
    found = open_onnx(save(tmp_path / "a.onnx", nodes, **weights)).linear
    assert sorted(found) == ["net.free", "net.named", "net.plain", "net.turned"]
    np.testing.assert_array_equal(found["net.named"], 2 * KERNEL)
    for name in ("net.free", "net.plain", "net.turned"):
        np.testing.assert_array_equal(found[name], KERNEL)


def test_constants_and_what_is_said_about_the_file(tmp_path):
    value = numpy_helper.from_array(KERNEL)
    nodes = [helper.make_node("Constant", [], ["held"], value=value)]
    path = save(tmp_path / "a.onnx", nodes, w=KERNEL)
    graph = open_onnx(str(path))
    assert sorted(graph.weights) == ["held", "w"]
    np.testing.assert_array_equal(graph.weights["held"], KERNEL)
    assert graph.metadata == {"license": "MIT", "producer": "maker 1.2"}
    assert graph.fingerprint == sha256_of([path])


def test_tensors_in_a_file_beside(tmp_path):
    path = save(tmp_path / "a.onnx", w=np.arange(600, dtype=np.float32))
    onnx.save(
        onnx.load(path), tmp_path / "b.onnx", save_as_external_data=True, location="b.bin",
        size_threshold=0,
    )  # fmt: skip
    graph = open_onnx(tmp_path / "b.onnx")
    np.testing.assert_array_equal(graph.weights["w"], np.arange(600))
    assert graph.fingerprint == sha256_of([tmp_path / "b.onnx", tmp_path / "b.bin"])
    (tmp_path / "b.bin").unlink()
    with pytest.raises(InputError, match=r"b\.onnx is not a whole ONNX model"):
        open_onnx(tmp_path / "b.onnx")


def test_garbled_files_are_refused(tmp_path):
    path = save(tmp_path / "a.onnx", w=np.arange(600, dtype=np.float32))
    whole = path.read_bytes()
    for content in (b"no model", whole[: len(whole) // 2], b"\x08\x07" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.onnx is not a whole ONNX model"):
            open_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="without tensors"):
        open_onnx(path)
    with pytest.raises(InputError, match="no file"):
        open_onnx(tmp_path)


def test_a_tensor_of_another_size_than_it_says(tmp_path):
    model = onnx.load(save(tmp_path / "a.onnx", w=KERNEL))
    model.graph.initializer[0].dims[:] = [5, 7]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="tensor 'w' is garbled"):
        open_onnx(tmp_path / "a.onnx")


def test_without_the_package(tmp_path, monkeypatch):
    path, whole = save(tmp_path / "a.onnx", w=KERNEL), builtins.__import__

    def without(name, *rest):
        if name == "onnx":
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'pip install "lora-jax\[onnx\]"'):
        open_onnx(path)
