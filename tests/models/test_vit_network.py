"""ViT and DINOv2 from folders and ONNX files: transformers' numbers, and clear refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vit

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.models.heads import with_head
from lora_jax.models.load_vit import load_vit
from lora_jax.models.vit import ViTConfig, cubic, initialise_vit, resample


@pytest.fixture(scope="module", params=tiny_vit.SIZES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vit(kind, tmp_path_factory):
    return load_vit(tiny_vit.folder(tmp_path_factory.mktemp("vit") / "model", kind))


def equal_trees(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("number", range(len(tiny_vit.SHAPES)))
def test_features_are_transformers(vit, kind, number):
    wanted = json.loads(tiny_vit.GOLDEN.read_text())[kind][number]
    images = tiny_vit.images(tiny_vit.SHAPES[number])
    found = jax.jit(vit.features)(vit.params, images)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


def test_one_layer_is_traced_for_all(vit):
    text = str(jax.make_jaxpr(vit.apply)(vit.params, tiny_vit.images((28, 28))))
    assert text.count("dot_general") == 9  # patches; q, k, v, scores, values, o, up, down
    assert vit.params["layers"]["attn"]["q_proj"]["kernel"].shape == (3, 12, 12)
    assert vit.params["patches"]["kernel"].shape == (7, 7, 3, 12)


def test_the_source_is_kept(vit):
    assert vit.source.name == "model"
    assert len(vit.source.fingerprint) == 64


def test_a_head_and_other_tasks_parts_are_left_out(tmp_path, kind, vit):
    extra = {"classifier.weight": np.ones((5, 12), np.float32)}
    extra |= {"pooler.dense.bias": np.ones(12, np.float32)}
    extra |= {f"{kind}.embeddings.mask_token": np.ones((1, 12), np.float32)}
    folder = tiny_vit.folder(tmp_path, kind, prefix=f"{kind}.", extra=extra)
    equal_trees(load_vit(folder).params, vit.params)


def test_a_fresh_head_reads_the_features(vit):
    headed = with_head(vit, 5, jax.random.key(0))
    assert headed.params["head"]["kernel"].shape == (24, 5)
    images = tiny_vit.images((14, 35))
    assert jax.eval_shape(headed.apply, headed.params, images).shape == (2, 5)


def test_fresh_weights_have_the_shapes_of_loaded_ones(vit):
    fresh = jax.eval_shape(lambda key: initialise_vit(vit.config, key).params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, vit.params)


def test_the_images_dtype_is_computed_in(vit):
    images = jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.bfloat16)
    assert jax.eval_shape(vit.apply, vit.params, images).dtype == jnp.bfloat16


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_an_exported_graph_has_the_folders_weights(tmp_path, kind, vit, folded, prefix):
    pytest.importorskip("onnx")
    from lora_jax.io.onnx import open_onnx
    from lora_jax.io.vit import backbone_of, checkpoint_of

    graph = open_onnx(tiny_vit.onnx_file(tmp_path / "a.onnx", kind, prefix, folded))
    checkpoint = backbone_of(checkpoint_of(graph))
    stored = tiny_vit.tensors(kind, tiny_vit.config(kind))
    assert set(checkpoint.shapes) == set(stored)
    for name, tensor in stored.items():
        found = checkpoint.read(name)
        assert found.shape == checkpoint.shapes[name]
        if name.endswith("projection.weight"):
            tensor = tensor.swapaxes(2, 3)
        np.testing.assert_array_equal(found, tensor.reshape(found.shape))
    found = ViTConfig.from_hf(checkpoint.config)
    assert found.num_attention_heads == 1  # the graph does not say, and 12 is less than 64
    assert found.intermediate_size == vit.config.intermediate_size
    assert (found.image_size, found.patch_size, found.num_hidden_layers) == (28, 7, 3)


def test_graphs_without_a_vit_are_refused(tmp_path):
    pytest.importorskip("onnx")
    from lora_jax.io.onnx import Graph
    from lora_jax.io.vit import checkpoint_of

    def refuse(weights, message):
        with pytest.raises(InputError, match=message):
            checkpoint_of(Graph("a.onnx", weights, {}, {}, ""))

    cls = {"embeddings.cls_token": np.zeros((1, 1, 12))}
    places = {"embeddings.position_embeddings": np.zeros((1, 17, 12))}
    refuse({"w": np.zeros(3)}, "0 tensors '...embeddings.cls_token'")
    refuse({**cls, "backbone.embeddings.cls_token": np.zeros((1, 1, 12))}, "2 tensors")
    refuse(cls, "nor two nameless tensors")
    refuse({**cls, **places}, "has no '...embeddings.patch_embeddings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov2_with_registers"}, "is no ViT; known are 'vit' and 'dinov2'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only 'gelu'"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"num_channels": 1}, "num_channels"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of num_attention_heads 5"),
        ({"image_size": 30}, "image_size 30 is no multiple of patch_size 7"),
    ],
)
def test_other_architectures_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ViTConfig.from_hf(tiny_vit.config("dinov2", **changes))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    surplus = {"encoder.layer.3.norm1.weight": np.ones(12, np.float32)}
    with pytest.raises(InputError, match=r"surplus: encoder\.layer\.3\.norm1"):
        load_vit(tiny_vit.folder(tmp_path / "a", "dinov2", extra=surplus))
    folder = tiny_vit.folder(tmp_path / "b", "dinov2")
    config = tiny_vit.config("dinov2", num_hidden_layers=4, image_size=35)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"missing: encoder\.layer\.3.*\[17, 12\], should be \[26"):
        load_vit(folder)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 28, 28), np.float32, r"shape \(2, 28, 28\)"),
        ((2, 3, 28, 28), np.float32, r"\[batch, height, width, 3\]"),
        ((2, 28, 28, 1), np.float32, "repeat a grey image's one channel"),
        ((2, 28, 30, 3), np.float32, "28 x 30 pixels, no multiple of the patch size 7"),
        ((2, 0, 28, 3), np.float32, "resize them"),
        ((2, 28, 28, 3), np.uint8, "images are uint8"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(vit, shape, dtype, message):
    for function in (vit.apply, vit.features):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(function, vit.params, jax.ShapeDtypeStruct(shape, dtype))


def test_resampled_positions_keep_the_class_token_and_constants():
    positions = jnp.concatenate([jnp.full((1, 3), 7.0), jnp.full((16, 3), 2.0)])
    found = resample(positions, 2, 5)
    assert found.shape == (11, 3)
    np.testing.assert_allclose(found[0], 7.0)
    np.testing.assert_allclose(found[1:], 2.0, rtol=1e-6)
    assert resample(positions, 4, 4) is positions
    assert cubic(4, 4).tolist() == np.eye(4).tolist()


def test_kernels_found_are_the_kernels(vit):
    image = jax.ShapeDtypeStruct((1, 14, 35, 3), jnp.float32)
    found = lj.find_sites(vit.apply, vit.params, image)
    assert len(found) == 7
    assert all(path.endswith("/kernel") for path in found)  # positions are added, not multiplied
