"""Torch's files: read as data, whatever they ask for. tests/parity holds them to torch.load."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.io.torch_file import read_torch

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
BASE = np.arange(60, dtype=np.float32).reshape(3, 4, 5)


def text(words):
    """The instruction BINUNICODE, which puts a text on the stack."""
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def archive(path, program):
    """A file in the zip format whose program is `program`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("a/data/0", np.arange(6, dtype="<f4").tobytes())
    return path


def tensor(offset=0, shape=b"K\x02K\x03\x86", strides=b"K\x03K\x01\x86"):
    """The program of a tensor on storage 0, which holds six numbers."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
    )
    place = storage + b"K" + bytes([offset]) + shape + strides
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"\x89ccollections\nOrderedDict\n)RtR"


def named(program):
    """The program of a dict that names what `program` makes."""
    return b"}" + text("w") + program + b"s"


@pytest.mark.parametrize("kind", ["streamed", "zipped"])
def test_windows_on_storages_are_views(kind):
    found = read_torch(GOLDEN / f"{kind}.pth")
    wanted = {
        "transposed": BASE.transpose(2, 0, 1),
        "inside": BASE[1:, ::2, 3],
        "whole": BASE,
        "repeated": np.arange(3.0)[:, None].repeat(7, axis=1),
        "none": BASE[:, :0],
        "parameter": np.ones((2, 3)),
    }
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[f"windows/{name}"], array)
    assert np.shares_memory(found["windows/inside"], found["windows/whole"])
    assert not found["windows/whole"].flags.writeable


def test_both_formats_hold_the_same_bits():
    one, other = (read_torch(GOLDEN / f"{kind}.pth") for kind in ("streamed", "zipped"))
    assert list(one) == list(other)
    kinds = {str(array.dtype) for name, array in one.items() if name.startswith("kinds/")}
    assert len(kinds) == 12
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)
        assert array.tobytes() == other[name].tobytes()


def test_the_smallest_file(tmp_path):
    found = read_torch(archive(tmp_path / "a.pth", named(tensor())))
    np.testing.assert_array_equal(found["w"], np.arange(6, dtype=np.float32).reshape(2, 3))


OPEN = b"X" + struct.pack("<I", 4) + b"open"
ATTACKS = {
    "os.system": b"cos\nsystem\n" + text("touch ran") + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text("touch ran") + b"\x85R",
    "builtins.eval": b"cbuiltins\neval\n" + text("open('ran', 'w')") + b"\x85R",
    "__builtin__.exec": b"c__builtin__\nexec\n" + text("open('ran', 'w')") + b"\x85R",
    "builtins.getattr": b"cbuiltins\ngetattr\n" + text("x") + text("y") + b"\x86R",
    "torch.load": b"ctorch\nload\n" + text("other.pth") + b"\x85R",
    "torch._utils.getattr": b"ctorch._utils\ngetattr\n)R",
    "collections.OrderedDict.__class__": b"ccollections\nOrderedDict.__class__\n)R",
    "INST": b"(" + text("touch ran") + b"ios\nsystem\n",
    "OBJ": b"(ccollections\nOrderedDict\no",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "SHORT_BINUNICODE": b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pos.system\n",
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("wrap", [bytes, named])
def test_code_is_refused_by_name_and_not_run(tmp_path, monkeypatch, name, wrap):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"a.pth: \w+ {name} is none .* refuses to run code"):
        read_torch(archive(tmp_path / "a.pth", wrap(ATTACKS[name])))
    whole = (GOLDEN / "streamed.pth").read_bytes()
    start = whole.index(b"\x80\x02ccollections")
    program = b"\x80\x02" + wrap(ATTACKS[name]) + b"."
    Path("a.pth").write_bytes(whole[:start] + program + whole[start:])
    with pytest.raises(InputError, match=rf"\w+ {name} is none .* refuses to run code"):
        read_torch("a.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"}" + text("w") + b"K\x03s", "'w' is a int, not a tensor; save model.state_dict"),
        (b"]", "holds a list, not tensors by name"),
        (b"}K\x03" + tensor() + b"s", "3 is a tensor, not a tensor"),
        (named(tensor(offset=1)), "storage 0 ends at 6, a tensor at 7"),
        (named(tensor(strides=b"K\x04K\x01\x86")), "storage 0 ends at 6, a tensor at 7"),
        (named(tensor(strides=b"J\xff\xff\xff\xffK\x01\x86")), "a tensor of shape"),
        (named(tensor(shape=b"K\x06\x85")), "not a whole torch file"),
        (b"ctorch\nFloatStorage\n)R", "not a whole torch file"),
        (b"}" + text("w") + b"u", "not a whole torch file"),
        (b"R", "finds too few values"),
    ],
)
def test_programs_that_make_no_state_dict(tmp_path, program, words):
    with pytest.raises(InputError, match=words):
        read_torch(archive(tmp_path / "a.pth", program))


def test_other_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_torch(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"is not a file that torch.save wrote"):
        read_torch(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("a/model.json", "{}")
    with pytest.raises(InputError, match=r"zip archive without data.pkl"):
        read_torch(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["streamed", "zipped"])
def test_cut_and_garbled_files_are_input_errors_or_arrays(tmp_path, kind):
    data, file = (GOLDEN / f"{kind}.pth").read_bytes(), tmp_path / "a.pth"
    for end in range(0, len(data), 97):
        file.write_bytes(data[:end])
        with pytest.raises(InputError):
            read_torch(file)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 400):
        file.write_bytes(data[:at] + rng.bytes(1) + data[at + 1 :])
        try:
            read_torch(file)
        except InputError as fault:
            assert "a.pth" in str(fault)
