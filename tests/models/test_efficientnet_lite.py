"""EfficientNet-Lite: recorded logits, its state, its files, and its photographs."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_efficientnet

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.models.efficientnet import (
    LITE0,
    LITE1,
    LITE2,
    apply_training,
    initialise,
    network,
    shapes,
)
from lora_jax.models.heads import with_head
from lora_jax.models.load_efficientnet import load_efficientnet

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
CONFIG = tiny_efficientnet.CONFIG


@pytest.fixture(scope="module")
def tiny():
    return load_efficientnet(GOLDEN / "efficientnet.pth", CONFIG)


def test_the_logits_that_torch_gave(tiny):
    wanted = np.load(GOLDEN / "efficientnet.npz")["logits"]
    for dtype in (np.uint8, np.float32):
        found = jax.jit(tiny.apply)(tiny.params, tiny_efficientnet.images(dtype))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_a_file_gives(tiny):
    assert (tiny.source.name, len(tiny.source.fingerprint)) == ("efficientnet", 64)
    params, state = shapes(CONFIG)
    assert jax.tree.map(jnp.shape, tiny.params) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, tiny.state) == jax.tree.map(jnp.shape, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(tiny.params)} == {jnp.dtype("float32")}
    assert tiny.params["blocks"][1]["depthwise"]["conv"]["kernel"].shape == (5, 5, 1, 16)


def test_published_sizes():
    for config, depth, count in (
        (LITE0, 16, 4_652_008),
        (LITE1, 21, 5_416_680),
        (LITE2, 21, 6_092_072),
    ):
        params, _ = shapes(config)
        assert len(params["blocks"]) == depth
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_training_moves_the_statistics(tiny):
    images = tiny_efficientnet.images()
    logits, moved = jax.jit(apply_training, static_argnums=0)(
        CONFIG, tiny.params, tiny.state, images
    )
    assert logits.shape == (3, 5)
    assert jax.tree.structure(moved) == jax.tree.structure(tiny.state)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moved, tiny.state)
    assert all(jax.tree.leaves(changed))
    after = network(CONFIG, tiny.params, moved)
    one, other = (jax.jit(made.apply)(tiny.params, images) for made in (tiny, after))
    assert (one != other).any()


def test_without_classifier_the_output_is_the_features(tiny, key):
    bare = load_efficientnet(GOLDEN / "efficientnet.pth", CONFIG, classifier=False)
    assert "classifier" not in bare.params
    images = tiny_efficientnet.images()
    features = jax.jit(bare.apply)(bare.params, images)
    wanted = jax.jit(tiny.features)(tiny.params, images)
    np.testing.assert_allclose(features, wanted, rtol=1e-6)
    headed = with_head(bare, 4, key)
    assert jax.eval_shape(headed.apply, headed.params, images).shape == (3, 4)


def test_every_convolution_is_a_site(tiny):
    sites = lj.find_sites(tiny.apply, tiny.params, tiny_efficientnet.images())
    kernels = {path for path in lj.tree.flatten(tiny.params) if path.endswith("kernel")}
    assert set(sites) == kernels
    assert {path for path in sites if lj.convolutions(sites[path])} == kernels - {
        "classifier/kernel"
    }
    for name, d_in, d_out, stack in (
        ("stem/conv", 27, 6, ()),
        ("blocks/1/expand/conv", 8, 16, ()),
        ("blocks/1/depthwise/conv", 25, 1, (16,)),
        ("blocks/3/project/conv", 48, 24, ()),
    ):
        site = sites[f"{name}/kernel"]
        assert (site.d_in, site.d_out, site.stack) == (d_in, d_out, stack)
    assert sites["blocks/1/depthwise/conv/kernel"].stacks == ("groups",)


def test_lora_on_every_kind_of_convolution(tiny, key):
    images = tiny_efficientnet.images()
    sites = lj.find_sites(tiny.apply, tiny.params, images)
    rules = {"(stem|blocks/1/.*)/conv/kernel": lj.lora(rank=2, alpha=4), "last/norm/.*": lj.full()}
    frozen, trained = lj.attach(key, tiny.params, rules, sites)
    run = jax.jit(lambda f, frozen, trained: f(lj.bind(frozen, trained), images), static_argnums=0)
    factored, base = lj.factored(tiny.apply), jax.jit(tiny.apply)
    wanted = base(tiny.params, images)
    np.testing.assert_allclose(run(factored, frozen, trained), wanted, atol=1e-6)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    found = run(factored, frozen, trained)
    assert (np.abs(found - wanted) > 1e-3).any()
    np.testing.assert_allclose(found, run(lj.materialised(tiny.apply), frozen, trained), atol=1e-6)
    np.testing.assert_allclose(found, base(lj.merge(frozen, trained), images), atol=1e-6)


def test_fresh_weights_keep_signals_alive(key):
    fresh = initialise(dataclasses.replace(CONFIG, stages=CONFIG.stages[:1]), key)
    features = np.asarray(jax.jit(fresh.features)(fresh.params, tiny_efficientnet.images()))
    assert features.shape == (3, 12)
    assert np.isfinite(features).all()
    assert (features > 0).mean() > 0.2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((19, 23, 3), "uint8"),
        ((2, 3, 19, 23), "uint8"),
        ((2, 19, 23, 1), "uint8"),
        ((2, 0, 23, 3), "uint8"),
        ((2, 19, 23, 3), "int32"),
        ((2, 19, 23, 3), "bool"),
    ],
)
def test_images_of_another_shape_or_kind(tiny, shape, dtype):
    images = np.zeros(shape, dtype)
    with pytest.raises(InputError, match=rf"uint8 or floats .* got {dtype} \[{shape[0]}, "):
        jax.jit(tiny.apply)(tiny.params, images)
    with pytest.raises(InputError, match=r"images are \[B, H, W, 3\]"):
        apply_training(CONFIG, tiny.params, tiny.state, images)


def test_a_file_of_another_size(tmp_path):
    with pytest.raises(InputError) as caught:
        load_efficientnet(GOLDEN / "efficientnet.pth")
    message = str(caught.value)
    assert "missing: _blocks." in message
    assert "is [8, 6, 1, 1], should be [16, 32, 1, 1]" in message
    assert "Give the config of its size" in message
    with pytest.raises(InputError, match=r"surplus: _blocks.3._depth"):
        cut = dataclasses.replace(CONFIG, stages=CONFIG.stages[:2])
        load_efficientnet(GOLDEN / "efficientnet.pth", cut)
    with pytest.raises(InputError, match=r"other.pth cannot be read"):
        load_efficientnet(tmp_path / "other.pth")
    shutil.copy(GOLDEN / "efficientnet.npz", tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: is a zip archive without data.pkl"):
        load_efficientnet(tmp_path / "other.pth", CONFIG)


PHOTOS = {
    "skimage/data/chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "skimage/data/coffee.png": {967},  # espresso
    "skimage/data/camera.png": {872},  # tripod
    "sklearn/datasets/images/flower.jpg": {985},  # daisy
}


@pytest.fixture(scope="module")
def lite0():
    loaded = load_efficientnet()
    return lambda images: jax.nn.softmax(jax.jit(loaded.apply)(loaded.params, images))


def photograph(name):
    """The middle 224 x 224 pixels of a photo whose shorter side was made 256 long."""
    image = pytest.importorskip("PIL.Image")
    package, _, file = name.partition("/")
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs the package {package}, for its photo")
    photo = image.open(Path(found.submodule_search_locations[0]) / file).convert("RGB")
    scale = 256 / min(photo.size)
    width, height = (round(side * scale) for side in photo.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    photo = photo.resize((width, height), image.Resampling.BICUBIC)
    return np.asarray(photo.crop((left, top, left + 224, top + 224)))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", PHOTOS)
def test_lite0_knows_what_is_on_a_photograph(lite0, name):
    shares = np.asarray(lite0(photograph(name)[None])[0])
    assert shares.argmax() in PHOTOS[name]
    if "coffee" in name:
        assert shares[967] == pytest.approx(0.951, abs=0.005)
