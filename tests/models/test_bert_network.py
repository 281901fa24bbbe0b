"""BERT and RoBERTa from folders: transformers' numbers, strict names, clear refusals."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert

from lora_jax.errors import InputError
from lora_jax.models.bert import initialise_bert, masked_mean, sentence_embedding
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.load_bert import load_bert

GOLDEN = Path(__file__).parent.parent / "golden" / "bert.npz"
TINY = BertConfig.from_hf(tiny_bert.CONFIGS["bert"])


@pytest.fixture(scope="module", params=tiny_bert.CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def network(kind, tmp_path_factory):
    folder = tiny_bert.write(tmp_path_factory.mktemp(kind), kind)
    return load_bert(folder, pooling="pooler")


def test_hidden_states_and_pooled_output_are_transformers(network, kind):
    ids, mask = tiny_bert.batch(kind)
    with np.load(GOLDEN) as golden:
        hidden = np.asarray(jax.jit(network.apply)(network.params, ids, mask))
        np.testing.assert_allclose(hidden[mask], golden[f"{kind}_hidden"][mask], atol=1e-5)
        pooled = network.features(network.params, ids, mask)
        np.testing.assert_allclose(pooled, golden[f"{kind}_pooled"], atol=1e-5)


def test_padding_changes_nothing(network, kind):
    ids, mask = tiny_bert.batch(kind)
    short = network.apply(network.params, ids[1:, :5])
    padded = network.apply(network.params, ids[1:], mask[1:])
    np.testing.assert_allclose(padded[:, :5], short, atol=1e-5)


def test_one_layer_is_traced_for_all(network, kind):
    text = str(jax.make_jaxpr(network.apply)(network.params, *tiny_bert.batch(kind)))
    assert text.count("dot_general") == 8  # q, k, v, scores, values, o, up, down
    assert network.params["layers"]["attn"]["q_proj"]["kernel"].shape == (2, 12, 12)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_poolings(tmp_path, pooling):
    network = load_bert(tiny_bert.write(tmp_path, "bert"), pooling)
    assert "pooler" not in network.params
    ids, mask = tiny_bert.batch("bert")
    hidden = np.asarray(network.apply(network.params, ids, mask))
    rows = [hidden[0].mean(0), hidden[1, :5].mean(0)] if pooling == "mean" else hidden[:, 0]
    np.testing.assert_allclose(network.features(network.params, ids, mask), rows, atol=1e-6)
    unit = sentence_embedding(network.features)(network.params, ids, mask)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-6)


def test_a_row_of_padding_alone_is_no_nan():
    assert np.all(masked_mean(jnp.ones((1, 3, 2)), jnp.zeros((1, 3), bool)) == 0)


def test_heads_prefixes_and_old_names_are_understood(tmp_path):
    plain = tiny_bert.tensors("bert")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in plain.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in old.items()}
    old = {f"bert.{name}": x for name, x in old.items() if not name.startswith("pooler")}
    old |= {"cls.predictions.bias": np.zeros(29, np.float32), "classifier.weight": np.eye(12)}
    old |= {"bert.embeddings.position_ids": np.arange(16)[None]}
    first = load_bert(tiny_bert.write(tmp_path / "plain", "bert", plain))
    second = load_bert(tiny_bert.write(tmp_path / "old", "bert", old))
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))
    assert first.source.fingerprint != second.source.fingerprint
    with pytest.raises(InputError, match=r"(?s)missing: pooler.dense.*of a BERT model"):
        load_bert(tmp_path / "old", pooling="pooler")


def test_wrong_tensors_are_listed(tmp_path):
    weights = tiny_bert.tensors("bert")
    del weights["encoder.layer.1.output.dense.bias"]
    weights["encoder.layer.2.output.dense.bias"] = np.zeros(12, np.float32)
    weights["embeddings.LayerNorm.bias"] = np.zeros(11, np.float32)
    with pytest.raises(InputError) as caught:
        load_bert(tiny_bert.write(tmp_path, "bert", weights))
    message = str(caught.value)
    assert "missing: encoder.layer.1.output.dense.bias" in message
    assert "surplus: encoder.layer.2.output.dense.bias" in message
    assert "embeddings.LayerNorm.bias is [11], should be [12]" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is no BERT"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"vocab_size": None}, "missing vocab_size"),
        ({"num_attention_heads": 5}, "12 is no multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_unsupported_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        BertConfig.from_hf({**tiny_bert.CONFIGS["bert"], **changes})


def test_wrong_inputs_are_refused(key):
    network = initialise_bert(TINY, key)
    for inputs, message in [
        ((jnp.zeros((3,), int),), r"ids \[B, T\]"),
        ((jnp.zeros((2, 3)),), "integer type, got .* float32"),
        ((jnp.zeros((2, 17), int),), "17 tokens are longer than the model's context of 16"),
        ((jnp.zeros((2, 3), int), jnp.ones((2, 4), bool)), r"mask \[2, 4\] must have"),
    ]:
        with pytest.raises(InputError, match=message):
            network.apply(network.params, *inputs)
    with pytest.raises(InputError, match="pooling='max' is unknown"):
        initialise_bert(TINY, key, "max")


def test_roberta_has_fewer_places_than_rows():
    assert BertConfig.from_hf(tiny_bert.CONFIGS["roberta"]).context == 14


def test_the_tokenizer_fills_up_rows_itself(tmp_path):
    folder = tiny_bert.write(tmp_path, "bert")
    tiny_bert.tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer = load_bert(folder).tokenizer
    assert tokenizer.encode("a good film.") == [2, 8, 4, 6, 9, 3]
    ids, mask = tokenizer.rows(["A good films, a bad film.", "bad"], length=7)
    assert ids.tolist() == [[2, 8, 4, 6, 7, 1, 3], [2, 5, 3, 0, 0, 0, 0]]
    assert mask.sum(axis=1).tolist() == [7, 3]
    with pytest.raises(InputError, match="length=2 leaves no room"):
        tokenizer.rows(["a"], length=2)
    with pytest.raises(InputError, match="rows of 'a film'; give a list"):
        tokenizer.rows("a film", length=7)
