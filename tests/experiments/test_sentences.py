"""The task of sentences and labels: four kinds of text, one of them trained on."""

import io
import json
import tarfile

import numpy as np
import pytest
import tiny_bert

from experiments.run import finetune
from experiments.settings import resolve
from experiments.tasks import TASKS, sentences
from lora_jax.data.domains import DOMAINS
from lora_jax.errors import InputError


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def table(domain, rows=40):
    pairs = [(2.0, "good"), (-2.0, "bad")]
    lines = (f"{n}\t{pairs[n % 2][0]}\ta {pairs[n % 2][1]} {domain} {n}\r\n" for n in range(rows))
    return "".join(lines).encode()


@pytest.fixture
def config(tmp_path, monkeypatch):
    inner = archive({name: table(domain) for domain, name in DOMAINS.items()})
    sdist = tmp_path / "vader.tar.gz"
    sdist.write_bytes(archive({"x/hutto_ICWSM_2014.tar.gz": inner}))
    monkeypatch.setattr(sentences, "fetch_package", lambda *_, **__: sdist)
    folder = tiny_bert.write(tmp_path / "bert", "bert")
    tiny_bert.tokenizer().save(str(folder / "tokenizer.json"))
    return {
        "task": "sentences",
        "model": {"source": str(folder)},
        "data": {"train": 20, "dev": 6, "test": 10, "shift": 7, "length": 8},
        "targets": "none",
        "train": {"steps": 40, "batch": 5, "learning_rate": 0.1},
        "evaluate": {"batch": 4},
    }


def test_a_head_learns_on_one_domain_and_is_measured_on_all(config, tmp_path):
    result = finetune(config, tmp_path / "run")
    assert result.parameters == 2 * 12 + 2
    record = result.after.record()
    assert record["accuracy"] == 1.0 and record["examples"] == 10
    assert record["nyt_accuracy"] == 1.0 and record["tweets_examples"] == 7
    assert "\n  amazon: 100.0 % (95 % interval 64.6 to 100.0, n = 7)" in str(result.after)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    after = next(line for line in map(json.loads, lines) if line.get("event") == "after")
    assert after["amazon_accuracy"] == 1.0


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_learn_beside_the_head(name, config, tmp_path):
    config["prompt"] = {"name": name, "length": 3}
    config["train"]["steps"] = 2
    result = finetune(config, tmp_path / "run")
    assert sorted(result.outcome.trained) == ["head/bias", "head/kernel", "prompt/embedding"]
    kept = json.loads((tmp_path / "run" / "adapter" / "lora_jax.json").read_text())
    assert kept["provenance"]["prompt"]["length"] == 3
    config["prompt"]["length"] = 13
    with pytest.raises(InputError, match="are longer than the model's context of 16"):
        finetune(config, tmp_path / "other")


def test_the_dev_split_is_of_the_trained_domain_alone(config):
    config["evaluate"]["split"] = "dev"
    config["data"]["domain"] = "tweets"
    task = TASKS["sentences"](resolve(config))
    assert task.about.startswith("20 tweets sentences to learn from; dev: tweets 6 (")
    assert "movie" not in task.about
    batch = task.batches(3)
    assert batch["ids"].shape == batch["mask"].shape == (5, 6) and batch["labels"].shape == (5,)
    assert np.array_equal(batch["ids"], task.batches(3)["ids"])
    total, weight = task.loss(task.params, batch)
    assert weight == 5 and 0 < total / weight < 2


def test_wrong_choices_are_named(config):
    config["data"]["domain"] = "films"
    with pytest.raises(InputError, match=r"data.domain is 'films'"):
        resolve(config)
    config["data"] = {"domain": "nyt", "dev": 30, "test": 30}
    with pytest.raises(InputError, match="dev=30 and test=30 leave nothing to train on"):
        TASKS["sentences"](resolve(config))
