"""A folder that is written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lora_jax.errors import InputError


@contextlib.contextmanager
def whole_folder(folder: Path, known: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its name at a clean end.

    Until that moment, and after any failure such as a full disk, the previous folder stays as it
    was. Raises InputError where the folder holds anything but `known` names, which would be lost.
    """
    _check_replaceable(folder, known)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
    try:
        staged.chmod(_folder_mode())
        yield staged
        _exchange(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def swap_folder(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write `files` (name -> bytes) as the whole content of `folder`, and return its path.

    As `whole_folder`, for contents that are small enough to be bytes.

    >>> with tempfile.TemporaryDirectory() as here:
    ...     folder = swap_folder(Path(here) / "new", {"a.txt": b"one"})
    ...     _ = swap_folder(folder, {"a.txt": b"two"})
    ...     (folder / "a.txt").read_text(), os.listdir(here)
    ('two', ['new'])
    """
    folder = Path(folder).resolve()
    with whole_folder(folder, files) as staged:
        for name, content in files.items():
            _write(staged / name, content)
    return folder


def _check_replaceable(folder: Path, known: Collection[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file, not a folder; give another name")
    present = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if others := [name for name in present if name not in known]:
        raise InputError(
            f"'{folder}' holds other files, which writing it anew would delete: "
            f"{', '.join(others[:5])}; give a folder of its own"
        )


def _folder_mode() -> int:
    """The mode that mkdir gives; mkdtemp makes private folders."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a full disk may show itself only here


def _exchange(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.replace(folder)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    try:
        folder.replace(previous)  # onto an empty folder, which rename allows
        staged.replace(folder)
    except BaseException:
        if folder.exists():
            previous.rmdir()
        else:
            previous.replace(folder)
        raise
    shutil.rmtree(previous)
