"""A tiny random Llama in a folder, and a tiny task that it can learn."""

import json

import jax
import numpy as np
import pytest
import tiny_task
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experiments import tasks
from lora_jax import tree
from lora_jax.io.names import is_stacked, is_transposed, to_hf
from lora_jax.models.config import LlamaConfig
from lora_jax.models.model import initialise

CONTEXT = 40
SCALE = {"scale": 1.0, "kernel": 8.0, "embedding": 40.0}


def write_tokenizer(folder):
    """Bytes as tokens, and one token that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "<end>"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return len(vocab)


def write_llama(folder, seed=0):
    """A Hugging Face folder with random weights, large enough for it to have opinions."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    params = tree.flatten(initialise(config, jax.random.key(seed)).params)
    tensors = {}
    for path, leaf in params.items():
        value = np.asarray(leaf) * SCALE[path.rpartition("/")[2]]
        layers = enumerate(value) if is_stacked(path) else [(None, value)]
        for layer, array in layers:
            array = array.T if is_transposed(path) else array
            tensors[to_hf(path, layer)] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def write_task(path, rows=60):
    """The answer is told by the prompt's last letter."""
    lines = [
        {"prompt": f"item {n} {'ab'[n % 2]}", "completion": ["no", "yes"][n % 2]}
        for n in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="session", autouse=True)
def compilations(tmp_path_factory):
    """Programs compiled once serve every run of these tests: most differ in data alone."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory):
    """The same sizes, other weights."""
    return write_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def config(llama, tmp_path_factory):
    """A function that makes settings, with some changed by dotted key."""
    task = write_task(tmp_path_factory.mktemp("data") / "task.jsonl")

    def make(**changes):
        settings = {
            "model": {"source": str(llama)},
            "data": {"source": str(task), "dev": 6, "test": 10, "length": 24},
            "method": {"name": "lora", "rank": 3, "alpha": 6.0},
            "train": {"steps": 4, "batch": 4, "learning_rate": 2e-2},
            "evaluate": {"batch": 4},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                settings.setdefault(section, {})[name] = value
            else:
                settings[section] = value
        return settings

    return make


@pytest.fixture
def tiny(monkeypatch):
    """The task "tiny", which is no language model, among those that a config may name."""

    class Entry(tasks.Entry):
        _module = tiny_task

    monkeypatch.setitem(tasks.TASKS, "tiny", Entry("tiny"))
    tiny_task.LOADED.clear()
    return tiny_task
