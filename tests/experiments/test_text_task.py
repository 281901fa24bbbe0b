"""The task of plain text: rows, perplexity over documents, what is said of a change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from experiments.run import finetune
from experiments.settings import resolve
from experiments.tasks import TASKS
from lora_jax.errors import InputError


@pytest.fixture
def config(llama, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        letters = "abc"[number % 3] * (9 + 5 * number)
        (folder / f"{number}.txt").write_text(f"text {number} {letters}")
    return {
        "task": "text",
        "model": {"source": str(llama)},
        "data": {"source": str(folder), "dev": 2, "test": 3, "length": 12},
        "method": {"name": "lora", "rank": 3, "alpha": 6.0},
        "train": {"steps": 12, "batch": 4, "learning_rate": 2e-2},
        "evaluate": {"batch": 3},
    }


def test_text_is_learnt_and_compared_document_by_document(config, tmp_path, capsys):
    result = finetune(config, tmp_path / "run")
    before, after = result.before.score, result.after.score
    assert after.value < before.value and after.low < after.value < after.high
    said = capsys.readouterr().out
    assert "text texts: documents 3 train" in said
    assert "perplexity after / before: 0." in said and "of 3 documents" in said
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_perplexity_is_that_of_every_token_but_each_documents_first(config, llama):
    from lora_jax.data.prose import read_prose, split_prose
    from lora_jax.models import load

    task = TASKS["text"](resolve(config))
    sites = lj.find_sites(task.apply, task.params, *task.inputs)
    frozen, trained = lj.attach(jax.random.key(0), task.params, {lj.all_linear: lj.lora(2)}, sites)
    measured = task.measure(frozen, trained)
    model = load(llama)
    held_out = split_prose(read_prose(config["data"]["source"]), dev=2, test=3, seed=0).test
    total = count = 0
    for document in held_out:
        ids = model.tokenizer.encode(document.text)
        for start in range(0, len(ids) - 1, 12):
            row = ids[start : start + 13]
            inputs = jnp.array([row[:-1] + [0] * (13 - len(row))])  # causal: what follows is idle
            table = jax.nn.log_softmax(model.apply(model.params, inputs)[0])
            total -= sum(float(table[place, token]) for place, token in enumerate(row[1:]))
            count += len(row) - 1
    assert measured.score.total == count
    assert measured.score.value == pytest.approx(np.exp(total / count), rel=1e-4)


def test_batches_score_every_position(config):
    task = TASKS["text"](resolve(config))
    batch = task.batches(0)
    assert batch["ids"].shape == batch["targets"].shape == (4, 12)
    full = batch["mask"].all(axis=1)
    assert full.any()
    np.testing.assert_array_equal(batch["ids"][full, 1:], batch["targets"][full, :-1])
    assert batch["weights"].sum() == batch["mask"].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 41}, "config.data.length is 41, but the model has room for 40 tokens"),
        ({"length": 0}, "config.data.length is 0"),
        ({"dev": 5}, "config.data: dev=5 and test=3 of 8 documents"),
        ({"source": "nowhere"}, "no text at 'nowhere'"),
    ],
)
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(InputError, match=message):
        TASKS["text"](resolve(config | {"data": config["data"] | changes}))
