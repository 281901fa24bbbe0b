"""A run from config to files on a tiny model, and every way it refuses bad input."""

import errno
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import opening
from experiments import run as running
from experiments.run import finetune as run
from lora_jax.errors import InputError
from lora_jax.io import swap


def tensors(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """One run long enough to learn the task, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    changes = {"train__steps": 60, "train__batch": 8, "train__warmup": 3, "method__rank": 4}
    return run(config(**changes), folder), folder


def test_it_learns(done):
    result, _ = done
    assert result.outcome.stopped is None
    assert result.outcome.step == 60
    assert result.after.score.share > max(result.before.score.share, 0.85)


def test_it_writes_the_resolved_config_and_metrics(done):
    result, folder = done
    settings = json.loads((folder / "config.json").read_text())
    assert settings["train"]["batch"] == 8
    assert settings["train"]["b1"] == 0.9
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:60]] == list(range(1, 61))
    assert rows[59]["loss"] < rows[0]["loss"]
    assert [row["event"] for row in rows[60:]] == ["before", "after", "end"]
    assert rows[61]["accuracy"] == result.after.score.share
    assert rows[62]["merge_error"] < 1e-5
    assert sorted(entry.name for entry in folder.iterdir()) == [
        *("adapter", "config.json"),
        *(["loss.png"] if (folder / "loss.png").exists() else []),
        "metrics.jsonl",
    ]


def test_it_writes_an_adapter_with_a_filled_card(done):
    result, folder = done
    card = (folder / "adapter" / "README.md").read_text()
    for words in ("test accuracy", "task.jsonl", "rank 4", "learning_rate", "merged model"):
        assert words in card
    assert f"{result.after.score.share:.6g}" in card
    notes = json.loads((folder / "adapter" / "lora_jax.json").read_text())
    assert len(notes["provenance"]["fingerprint"]) == 64


def test_the_adapter_opens_on_the_base_that_it_names(done):
    result, folder = done
    opened = opening.open_adapter(folder / "adapter")
    jax.tree.map(np.testing.assert_array_equal, dict(opened.trained), result.outcome.trained)


def test_another_base_is_refused(done, other_llama):
    with pytest.raises(InputError, match="not for this base"):
        opening.open_adapter(done[1] / "adapter", str(other_llama))


def test_the_same_config_gives_the_same_bytes_and_replaces_the_old(done, config, tmp_path):
    shutil.copytree(done[1], tmp_path / "one")
    (tmp_path / "one" / "notes.txt").write_text("mine")
    for name in ("one", "two"):
        run(config(method__dropout=0.1), tmp_path / name)
    assert tensors(done[1]) != tensors(tmp_path / "one") == tensors(tmp_path / "two")
    assert (tmp_path / "one" / "notes.txt").read_text() == "mine"


def test_accumulation_remat_bfloat16_and_dora(config, tmp_path, capsys):
    changes = {"train__accumulate": 2, "model__remat": "layers", "method__name": "dora"}
    result = run(config(model__dtype="bfloat16", **changes), tmp_path / "run")
    assert "trainable params:" in capsys.readouterr().out
    assert {x.dtype.name for x in jax.tree.leaves(result.outcome.trained)} == {"float32"}


def test_free_answers_are_measured_by_perplexity(config, tmp_path, capsys):
    task = tmp_path / "free.csv"
    task.write_text("prompt,completion\n" + "\n".join(f"item {n},<{n}>" for n in range(40)))
    result = run(config(data__source=str(task)), tmp_path / "run")
    assert result.after.details is None
    assert result.after.score.perplexity < result.before.score.perplexity
    assert "perplexity" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_divergence_keeps_an_adapter_and_says_so(config, tmp_path, capsys):
    settings = config(train__learning_rate=1e30, train__clip=0.0, train__steps=6)
    result = run(settings, tmp_path / "run")
    assert "not finite" in result.outcome.stopped
    saved = np.frombuffer(tensors(tmp_path / "run")[-400:], np.float32)
    assert np.isfinite(saved).all()
    assert "training stopped: the loss" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_trained(config, tmp_path, monkeypatch, capsys):
    plain = running.make_step

    def pressing(*args, **kwargs):
        step = plain(*args, **kwargs)

        def pressed(state, frozen, batch):
            if int(state.step) == 1:
                signal.raise_signal(signal.SIGINT)
            return step(state, frozen, batch)

        return pressed

    monkeypatch.setattr(running, "make_step", pressing)
    result = run(config(), tmp_path / "run")
    assert result.outcome.interrupted
    assert result.outcome.step == 2
    assert result.after is None
    assert tensors(tmp_path / "run")
    assert "Ctrl-C after step 2 of 4; the adapter of step 2 is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method__rank": 0}, "config.method: lora.rank=0"),
        ({"method__name": "lorra"}, "'lorra'.*nearest: 'lora'"),
        ({"train__stepz": 3}, "unknown key 'train.stepz'.*nearest: 'train.steps'"),
        ({"targets": ".*/qproj/kernel"}, "pattern '.*/qproj/kernel' matches no parameter; nearest"),
        (
            {"data__length": 9},
            "^config.data.length: example .* prompt and .* answer tokens, .* more than the length",
        ),
        ({"data__length": 41}, "config.data.length is 41.*room for 40 tokens"),
        ({"data__test": 60}, "^config.data.dev=6 and test=60 leave nothing to train on"),
        ({"model__source": "nowhere"}, "nowhere"),
        ({"train__batch": 5, "train__accumulate": 2}, "train.batch is 5.*accumulate=2"),
        ({"train__warmup": 4}, "^config.train.warmup=4"),
        ({"model__source": ""}, "config.model.source is empty"),
        ({"targets": "none"}, "config.targets is 'none' and the task 'answers' trains nothing"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        run(config(**changes), tmp_path / "run")
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_an_empty_data_file(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InputError, match="has no examples"):
        run(config(data__source=str(empty)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights(config, llama, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="model"):
        run(config(model__source=str(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_tokenizer(config, llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        run(config(model__source=str(folder)), tmp_path / "run")


def test_a_full_disk_while_saving_keeps_the_previous_run(done, config, tmp_path, monkeypatch):
    shutil.copytree(done[1], tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    write, calls = swap._write, []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > 5:  # four files of the rehearsal, then one of the adapter
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(swap, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        run(config(seed=1), tmp_path)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_a_folder_with_other_files_is_not_an_adapters(config, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("ten years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        run(config(), tmp_path)
    assert (tmp_path / "adapter" / "thesis.tex").read_text() == "ten years"
