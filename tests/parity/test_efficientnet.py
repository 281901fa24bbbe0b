"""EfficientNet-Lite against the same network in torch's functions, on random weights."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_efficientnet

from lora_jax.models.efficientnet import apply_training
from lora_jax.models.load_efficientnet import LITE0_IMAGENET, load_efficientnet

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"


def pad_same(x, size, stride):
    """Zeros for ceil(H / stride) rows and columns, the odd one below and to the right."""
    pads = []
    for length in (x.shape[3], x.shape[2]):
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads += [total // 2, total - total // 2]
    return torch.nn.functional.pad(x, pads)


class Theirs:
    """The network in torch's functions, over a state_dict; training moves its statistics."""

    def __init__(self, config, state, training=False):
        self.config, self.state, self.training = config, state, training

    def unit(self, x, conv, norm, stride=1, depthwise=False, linear=False):
        kernel = self.state[f"{conv}.weight"]
        groups = kernel.shape[0] if depthwise else 1
        x = pad_same(x, kernel.shape[2], stride)
        x = torch.nn.functional.conv2d(x, kernel, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        values = [self.state[f"{norm}.{name}"] for name in names]
        x = torch.nn.functional.batch_norm(x, *values, self.training, 0.01, 1e-3)
        return x if linear else torch.clip(x, 0, 6)

    def __call__(self, images):
        x = (torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2) - 127) / 128
        x = self.unit(x, "_conv_stem", "_bn0", stride=2)
        for index, (c_in, stage) in enumerate(self.config.blocks()):
            at, y = f"_blocks.{index}.", x
            if stage.expand > 1:
                y = self.unit(y, f"{at}_expand_conv", f"{at}_bn0")
            y = self.unit(y, f"{at}_depthwise_conv", f"{at}_bn1", stage.stride, depthwise=True)
            y = self.unit(y, f"{at}_project_conv", f"{at}_bn2", linear=True)
            x = x + y if (stage.stride, stage.channels) == (1, c_in) else y
        x = self.unit(x, "_conv_head", "_bn1").mean((2, 3))
        return torch.nn.functional.linear(x, self.state["_fc.weight"], self.state["_fc.bias"])


def random_state():
    """A state_dict with every number random, variances positive, as torch tensors."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in tiny_efficientnet.torch_shapes().items():
        scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        value = rng.normal(size=shape) * scale + (name.endswith(".weight") and len(shape) == 1)
        value = rng.uniform(0.5, 2, shape) if name.endswith("running_var") else value
        state[name] = torch.tensor(value, dtype=torch.float32)
    return state


def test_logits_at_inference(tmp_path):
    state, images = random_state(), tiny_efficientnet.images()
    torch.save(state, tmp_path / "tiny.pth")
    ours = load_efficientnet(tmp_path / "tiny.pth", tiny_efficientnet.CONFIG)
    wanted = Theirs(tiny_efficientnet.CONFIG, state)(images).numpy()
    np.testing.assert_allclose(jax.jit(ours.apply)(ours.params, images), wanted, atol=1e-5)
    recorded = np.load(GOLDEN / "efficientnet.npz")
    np.testing.assert_allclose(recorded["logits"], wanted, atol=1e-5)


def test_logits_and_statistics_in_training(tmp_path):
    state, images = random_state(), tiny_efficientnet.images()
    torch.save(state, tmp_path / "before.pth")
    wanted = Theirs(tiny_efficientnet.CONFIG, state, training=True)(images).numpy()
    torch.save(state, tmp_path / "after.pth")
    before, after = (
        load_efficientnet(tmp_path / f"{name}.pth", tiny_efficientnet.CONFIG)
        for name in ("before", "after")
    )
    run = jax.jit(apply_training, static_argnums=0)
    found, moved = run(before.config, before.params, before.state, images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, after.state)


@pytest.mark.slow
@pytest.mark.network
def test_lite0_gives_torch_s_logits():
    ours = load_efficientnet()
    state = torch.load(ours.source.path, weights_only=True)
    images = np.random.default_rng(1).integers(0, 256, (2, 97, 130, 3), np.uint8)
    wanted = Theirs(ours.config, state)(images).numpy()
    np.testing.assert_allclose(jax.jit(ours.apply)(ours.params, images), wanted, atol=1e-4)
    assert ours.source.uri == LITE0_IMAGENET


if __name__ == "__main__":  # writes what test_efficientnet_lite.py reads anew
    STATE, IMAGES = random_state(), tiny_efficientnet.images()
    torch.save(STATE, GOLDEN / "efficientnet.pth", _use_new_zipfile_serialization=False)
    np.savez(
        GOLDEN / "efficientnet.npz", logits=Theirs(tiny_efficientnet.CONFIG, STATE)(IMAGES).numpy()
    )
