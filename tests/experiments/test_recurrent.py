"""The task of an LSTM that changes its kind of text."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
from experiments.run import finetune
from experiments.settings import resolve
from experiments.tasks import TASKS, characters, sequences
from lora_jax.errors import InputError

TEXTS = {
    "movie": [f"a film {n}" for n in range(40)],
    "nyt": [f"news {n}" for n in range(30)] + ["@you 3"],
    "tweets": [f"@you {n}" for n in range(36)],
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sequences, "fetch_package", lambda *_, **__: None)
    monkeypatch.setattr(
        sequences, "read_texts", lambda _, names: [text for name in names for text in TEXTS[name]]
    )
    model = {"domains": ("movie", "nyt"), "d_in": 5, "width": 7, "steps": 40, "batch": 9}
    return {
        "task": "sequences",
        "model": model,
        "data": {"dev": 4, "test": 6, "length": 8},
        "method": {"rank": 2},
        "train": {"steps": 30, "batch": 3, "learning_rate": 0.05},
        "evaluate": {"batch": 4},
    }


def test_adapting_a_kernel_lowers_the_bits(config, tmp_path, capsys):
    result = finetune(config | {"targets": ".*/recurrent/kernel"}, tmp_path / "run")
    assert result.parameters == 2 * (7 + 28)
    assert result.after.score.value < result.before.score.value
    assert result.after.score.low < result.after.score.value < result.after.score.high
    said = capsys.readouterr().out
    assert "tweets: 26 train, 4 dev, 6 test texts; pretrained on 70 others" in said
    assert "change -" in said
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    after = next(line for line in lines if line.get("event") == "after")
    assert after["bits_per_character"] == result.after.score.value


def test_the_base_is_pretrained_once_for_its_settings(config, monkeypatch, tmp_path):
    first = TASKS["sequences"](resolve(config))
    again = TASKS["sequences"](resolve(config | {"train": {"batch": 4}, "targets": ".*"}))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert len(list((tmp_path / "cache" / "pretrained").iterdir())) == 1
    other = TASKS["sequences"](resolve(config | {"seed": 1}))
    assert other.source.fingerprint != first.source.fingerprint == again.source.fingerprint
    first.source.path.write_bytes(b"cut short")
    with pytest.raises(InputError, match="delete it and run again"):
        TASKS["sequences"](resolve(config))


def test_the_score_is_bits_over_characters(config):
    task = TASKS["sequences"](resolve(config))
    sites = lj.find_sites(task.apply, task.params, *task.inputs)
    frozen, trained = lj.attach(jax.random.key(0), task.params, {".*": lj.full()}, sites)
    measured = task.measure(frozen, jax.tree.map(np.zeros_like, trained))
    counts = sorted(measured.details[:, 1])
    assert counts[0] == len("@you 1") + 1 and counts[-1] <= 8
    # All symbols alike: log2 of their number, over every character and every end.
    assert measured.score.value == pytest.approx(np.log2(characters.VOCABULARY), rel=1e-5)


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ({"interrupted": True, "stopped": "Ctrl-C"}, KeyboardInterrupt),
        ({"stopped": "the loss exceeds 9"}, InputError),
    ],
)
def test_pretraining_that_does_not_end_leaves_nothing(config, monkeypatch, tmp_path, ending, error):
    whole = characters.fit
    monkeypatch.setattr(characters, "fit", lambda *a, **k: whole(*a, **k)._replace(**ending))
    with pytest.raises(error):
        TASKS["sequences"](resolve(config))
    assert not (tmp_path / "cache" / "pretrained").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"domain": "movie"}, "among config.model.domains"),
        ("data", {"domain": "tweet"}, "config.data.domain is 'tweet'.*nearest: 'tweets'"),
        ("data", {"dev": 40}, "config.data: dev=40"),
        ("model", {"domains": ("film",)}, "config.model.domains is 'film'"),
        ("model", {"source": "x"}, "leave it empty"),
        ("model", {"width": 0}, "config.model.width is 0"),
        ("model", {"steps": 0}, "config.model.steps=0"),
    ],
)
def test_mistakes_are_named(config, section, changes, message):
    with pytest.raises(InputError, match=message):
        TASKS["sequences"](resolve(config | {section: config[section] | changes}))
