"""A run's folder, in which nothing is ever half-written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_jax.errors import InputError


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield a hidden folder inside `folder`; at a clean end its files take their places there.

    Each file is renamed, so a reader sees the old one or the new one, whole. After an error nothing
    in `folder` has changed, and it is gone again if it was not there before.
    """
    folder = Path(folder)
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise InputError(f"'{folder}' is a file; give a folder with --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".running-", dir=folder))
    try:
        yield stage
        for entry in sorted(stage.iterdir()):
            entry.replace(folder / entry.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()
