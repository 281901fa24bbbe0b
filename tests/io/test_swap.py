from pathlib import Path

import pytest

from lora_jax.errors import InputError
from lora_jax.io import swap
from lora_jax.io.swap import swap_folder

OLD, NEW = {"a.txt": b"old", "b.txt": b"old"}, {"a.txt": b"new", "b.txt": b"new"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_made_and_replaced(tmp_path):
    folder = swap_folder(tmp_path / "deep" / "x", OLD)
    assert content(folder) == OLD
    swap_folder(folder, NEW)
    assert content(folder) == NEW
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777


@pytest.mark.parametrize("when", ["first file", "second file", "first rename", "second rename"])
def test_a_failure_leaves_the_previous_folder_whole(tmp_path, monkeypatch, when):
    folder = swap_folder(tmp_path / "x", OLD)
    calls = {"write": 0, "rename": 0}
    nth = 1 if when.startswith("first") else 2
    write, rename = swap._write, Path.replace

    def failing(kind, function):
        def call(path, *rest):
            calls[kind] += 1
            if (calls[kind] == nth) and kind == {"file": "write"}.get(when.split()[1], "rename"):
                raise OSError(28, "No space left on device")
            return function(path, *rest)

        return call

    monkeypatch.setattr(swap, "_write", failing("write", write))
    monkeypatch.setattr(Path, "replace", failing("rename", rename))
    with pytest.raises(OSError, match="No space left"):
        swap_folder(folder, NEW)
    assert content(folder) == OLD
    assert list(tmp_path.iterdir()) == [folder]


def test_other_files_are_never_deleted(tmp_path):
    folder = swap_folder(tmp_path / "x", OLD)
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        swap_folder(folder, NEW)
    assert content(folder) == OLD | {"thesis.tex": b"years"}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        swap_folder(tmp_path / "file", NEW)
