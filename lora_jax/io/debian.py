"""Files out of Debian packages: downloaded once with apt, checked by sha256, never installed.

Format: deb(5) and ar(5). A package is an ar archive that holds a tar archive of its files.
"""

import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of
from lora_jax.io.packages import cache_folder

_MAGIC = b"!<arch>\n"
_HEADER = 60
_GARBLED = (tarfile.TarError, lzma.LZMAError, EOFError, ValueError)


def fetch_debian(name: str, version: str, sha256: str) -> Path:
    """The path of a .deb file, downloaded with `apt-get download` unless the cache has it.

    It needs neither root nor the package's dependencies. InputError where there is no apt, where
    its lists do not offer this version, or when the file has another sha256.
    """
    folder = cache_folder() / "packages"
    for file in sorted(folder.glob(f"{name}_*.deb")):
        if sha256_of([file]) == sha256:
            return file
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that an interrupted download leaves nothing under a final name.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        file = _download(name, version, Path(scratch))
        found = sha256_of([file])
        if found != sha256:
            raise InputError(f"{name} {version}: sha256 should be {sha256}, apt's has {found}")
        return file.replace(folder / file.name)


def unpack_debian(package: Path, folder: str) -> Path:
    """Copies the files of one folder of a .deb into the cache, once: "usr/share/datasets/x".

    Folders inside it and links are left out. InputError when the package is garbled or has no
    such folder.
    """
    target = cache_folder() / "unpacked" / f"{package.stem}-{sha256_of([package])[:12]}" / folder
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        try:
            with tarfile.open(fileobj=io.BytesIO(_data(package.read_bytes()))) as archive:
                _copy(archive, PurePosixPath(folder), whole)
        except _GARBLED as fault:
            raise InputError(
                f"{package} is not a whole Debian package ({fault}); delete it and run again"
            ) from None
        if not any(whole.iterdir()):
            raise InputError(f"{package} has no files in {folder}; is it the package you meant?")
        whole.replace(target)
    return target


def _download(name: str, version: str, scratch: Path) -> Path:
    if shutil.which("apt-get") is None:
        raise InputError(
            f"{name} {version} is a Debian package and there is no apt-get here; bring its files "
            f"in a folder, or the .deb file to {cache_folder()}/packages"
        )
    command = ["apt-get", "download", "--quiet", f"{name}={version}"]
    run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    file = next(iter(scratch.glob("*.deb")), None)
    if run.returncode or file is None:
        faults = [line for line in run.stderr.splitlines() if line.startswith("E:")]
        reason = (faults or [run.stderr.strip()])[-1][:300]
        raise InputError(
            f"apt-get could not download {name}={version} ({reason}); run `apt-get update` first, "
            "or bring its files in a folder"
        )
    return file


def _data(package: bytes) -> bytes:
    """The member `data.tar.*` of an ar archive; ValueError when there is none."""
    if not package.startswith(_MAGIC):
        raise ValueError("it does not begin as an ar archive does")
    at = len(_MAGIC)
    while at + _HEADER <= len(package):
        name, size = package[at : at + 16], int(package[at + 48 : at + 58])
        start = at + _HEADER
        if name.startswith(b"data.tar"):
            return package[start : start + size]
        at = start + size + size % 2
    raise ValueError("it has no data.tar")


def _copy(archive: tarfile.TarFile, folder: PurePosixPath, target: Path) -> None:
    for entry in archive:
        path = PurePosixPath(entry.name)
        stream = archive.extractfile(entry) if entry.isfile() and path.parent == folder else None
        if stream is not None:
            (target / path.name).write_bytes(stream.read())
