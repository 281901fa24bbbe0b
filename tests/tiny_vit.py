"""Tiny ViTs and DINOv2s with all sizes distinct, and the files they may come from."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "vit.json"
SHAPES = ((28, 28), (14, 35))  # of images: the stored positions' own, and one that interpolates
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
SIZES = {"dinov2": {"mlp_ratio": 2}, "vit": {"intermediate_size": 20}}
NORMS = {"dinov2": ("norm1", "norm2"), "vit": ("layernorm_before", "layernorm_after")}
MLP = {"dinov2": ("mlp.fc1", "mlp.fc2"), "vit": ("intermediate.dense", "output.dense")}


def config(kind, **changes):
    return {**CONFIG, "model_type": kind, **SIZES[kind], **changes}


def shapes(kind, config):
    """Every tensor's shape, under a bare backbone's names."""
    width, patch = config["hidden_size"], config["patch_size"]
    inner = config.get("intermediate_size") or width * config["mlp_ratio"]
    found = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + (config["image_size"] // patch) ** 2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linear = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (width, width)}
    linear |= {MLP[kind][0]: (inner, width), MLP[kind][1]: (width, inner)}
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        for name, shape in linear.items():
            found |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in NORMS[kind]:
            found |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
        if kind == "dinov2":
            found |= {f"{at}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
    return found


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return np.sin(0.37 * n**2 + k).reshape(shape).astype(np.float32)


def tensors(kind, config):
    """No norm of one or bias of zero hides a mistake."""
    return {
        name: closed_form(shape, k) * (0.3 if len(shape) > 1 else 1.0)
        for k, (name, shape) in enumerate(shapes(kind, config).items())
    }


def images(shape):
    return closed_form((2, *shape, 3), 0.5)


def folder(path, kind, prefix="", extra=None, **changes):
    """A Hugging Face folder; `extra` tensors stand beside the backbone's."""
    path.mkdir(exist_ok=True)
    made = config(kind, **changes)
    (path / "config.json").write_text(json.dumps(made))
    stored = {prefix + name: tensor for name, tensor in tensors(kind, made).items()}
    save_file({**stored, **(extra or {})}, path / "model.safetensors")
    return path


def onnx_file(path, kind="dinov2", prefix="backbone.", folded=True, **changes):
    """A graph as torch's exporter leaves it: kernels nameless, positions cut in two if `folded`."""
    import onnx
    from onnx import helper, numpy_helper

    stored = tensors(kind, config(kind, **changes))
    constants, nodes = {}, []
    for count, (name, tensor) in enumerate(stored.items()):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2:
            kernel, product = f"onnx::MatMul_{1900 + count}", f"/{module}/MatMul_output_0"
            constants[kernel] = tensor.T
            nodes.append(helper.make_node("MatMul", ["x", kernel], [product]))
            # The bias comes first or second, as it does in real files.
            both = [f"{prefix}{module}.bias", product][:: 1 if count % 2 else -1]
            nodes.append(helper.make_node("Add", both, [f"/{module}/Add_output_0"]))
        elif folded and name == "embeddings.position_embeddings":
            constants |= {"onnx::Concat_7": tensor[:, :1], "onnx::Reshape_8": tensor[:, 1:]}
        else:
            constants[prefix + name] = tensor
    constants["decoder.weight"] = np.ones((2, 3), np.float32)
    held = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [], [], initializer=held)
    onnx.save(helper.make_model(graph, producer_name="pytorch", producer_version="2.7"), path)
    return path
