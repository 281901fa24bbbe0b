"""Our reading of torch's files against torch.load, bit for bit, in both of its formats."""

from pathlib import Path

import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.io.torch_file import read_torch

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
KINDS += ("bool", "complex64", "complex128")


def state_dict():
    """Every dtype, and every way in which a tensor lies in its storage."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 5), torch.nn.BatchNorm2d(3)).state_dict()
    base = torch.arange(60.0).reshape(3, 4, 5)
    made["windows/transposed"] = base.permute(2, 0, 1)
    made["windows/inside"] = base[1:, ::2, 3]
    made["windows/whole"] = base
    made["windows/repeated"] = torch.arange(3.0)[:, None].expand(3, 7)
    made["windows/none"] = base[:, :0]
    made["windows/parameter"] = torch.nn.Parameter(torch.ones(2, 3))
    for kind in KINDS:
        made[f"kinds/{kind}"] = (torch.randn(3, 2) * 9).to(getattr(torch, kind))
    return made


def save(state, path, zipped):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def as_bytes(tensor):
    flat = tensor.detach().contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() and flat.ndim else b""


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_is_torch_s_bit_for_bit(tmp_path, zipped):
    path = save(state_dict(), tmp_path / "a.pth", zipped)
    found, wanted = read_torch(path), torch.load(path, weights_only=True)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert not tensor.ndim or found[name].tobytes() == as_bytes(tensor), name
    assert found["1.num_batches_tracked"] == 0
    assert np.shares_memory(found["windows/transposed"], found["windows/inside"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (torch.nn.Linear(2, 3), "global torch.nn.modules.linear.Linear is none"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({"a": torch.Size([2, 3])}, "global torch.Size is none"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "global torch._utils._rebuild_tensor"),
    ],
)
def test_other_things_than_a_state_dict(tmp_path, zipped, saved, words):
    with pytest.raises(InputError, match=words):
        read_torch(save(saved, tmp_path / "a.pth", zipped))


if __name__ == "__main__":  # writes the files that tests/io/test_torch_file.py reads anew
    GOLDEN.mkdir(exist_ok=True)
    for name in ("streamed", "zipped"):
        save(state_dict(), GOLDEN / f"{name}.pth", name == "zipped")
