"""Debian packages: fetched with apt, checked, unpacked without being installed."""

import hashlib
import io
import os
import stat
import tarfile

import pytest

from lora_jax.errors import InputError
from lora_jax.io.debian import fetch_debian, unpack_debian

FOLDER = "usr/share/datasets/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo(f"./{FOLDER}/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def deb(path, files):
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files)}
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


FILES = {
    f"./{FOLDER}/a.gz": b"first",
    f"./{FOLDER}/b": b"second",
    f"./{FOLDER}/deeper/c": b"third",
    f"./{FOLDER}/../../../../out": b"out",
}


def apt(tmp_path, monkeypatch, script):
    """An apt-get of our own, first on the path."""
    tool = tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_fetched_once_and_unpacked(tmp_path, monkeypatch, cache):
    path, digest = deb(tmp_path / "offered.deb", FILES)
    log = tmp_path / "log"
    apt(tmp_path, monkeypatch, f'echo "$@" >> {log}; cp {path} tiny_1.0-1_all.deb')
    found = fetch_debian("tiny", "1.0-1", digest)
    assert found == cache / "packages" / "tiny_1.0-1_all.deb"
    assert fetch_debian("tiny", "1.0-1", digest) == found
    assert log.read_text() == "download --quiet tiny=1.0-1\n"
    folder = unpack_debian(found, FOLDER)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "a.gz": b"first",
        "b": b"second",
    }
    found.write_bytes(found.read_bytes())
    assert unpack_debian(found, FOLDER) == folder
    assert not list(cache.rglob("out"))
    assert not list(cache.rglob(".*-*"))


def test_another_file_than_the_one_known(tmp_path, monkeypatch, cache):
    path, _ = deb(tmp_path / "offered.deb", FILES)
    apt(tmp_path, monkeypatch, f"cp {path} tiny_1.0-1_all.deb")
    with pytest.raises(InputError, match="sha256 should be 000"):
        fetch_debian("tiny", "1.0-1", "0" * 64)
    assert not list((cache / "packages").iterdir())


def test_a_version_that_apt_does_not_offer(tmp_path, monkeypatch):
    apt(tmp_path, monkeypatch, 'echo "E: Version 9 was not found" >&2; exit 100')
    with pytest.raises(InputError, match=r"tiny=9 \(E: Version 9 was not found\).*apt-get update"):
        fetch_debian("tiny", "9", "0" * 64)


def test_no_apt(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no apt-get here; bring its files in a folder"):
        fetch_debian("tiny", "1.0-1", "0" * 64)


def test_garbled_packages(tmp_path):
    path, _ = deb(tmp_path / "a.deb", FILES)
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no files in usr/share/other"):
        unpack_debian(path, "usr/share/other")
    for content in (
        b"",
        b"!<arch>\n",
        whole[:150],
        whole[:-200],
        whole.replace(b"data.", b"date."),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a whole Debian package"):
            unpack_debian(path, FOLDER)
