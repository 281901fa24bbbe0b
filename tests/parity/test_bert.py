"""Our BERT family against transformers': hidden states, pooled outputs, sentence similarities."""

import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_bert

from lora_jax.models.bert import sentence_embedding
from lora_jax.models.load_bert import load_bert

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent.parent / "golden" / "bert.npz"
EATING, BREAD, BABY = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
)


@pytest.fixture(autouse=True)
def quiet():
    # transformers and torch warn about their own futures.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(folder, ids, mask, types=None):
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            token_type_ids=None if types is None else torch.tensor(types).long(),
        )
    return out.last_hidden_state.numpy(), out.pooler_output.numpy()


def ours(folder, ids, mask, types=None):
    network = load_bert(folder, pooling="pooler")
    hidden = jax.jit(network.apply)(network.params, ids, mask, types)
    return np.asarray(hidden), np.asarray(network.features(network.params, ids, mask, types))


def close(found, wanted, mask):
    np.testing.assert_allclose(found[0][mask], wanted[0][mask], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", tiny_bert.CONFIGS)
def test_the_golden_file_is_transformers_answer(tmp_path, kind):
    wanted = theirs(tiny_bert.write(tmp_path, kind), *tiny_bert.batch(kind))
    with np.load(GOLDEN) as golden:
        close(
            (golden[f"{kind}_hidden"], golden[f"{kind}_pooled"]), wanted, tiny_bert.batch(kind)[1]
        )


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForMaskedLM"),
        ("bert", "BertModel"),
        ("roberta", "RobertaModel"),
    ],
)
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_what_transformers_saves_gives_its_hidden_states(tmp_path, kind, cls, act):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**tiny_bert.CONFIGS[kind], "hidden_act": act})
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ids, mask = tiny_bert.batch(kind)
    types = (np.arange(9) > 3)[None] * np.array([[1], [0]]) if kind == "bert" else None
    if cls == "RobertaForMaskedLM":  # it has no pooler
        network = load_bert(tmp_path)
        found = np.asarray(network.apply(network.params, ids, mask))
        wanted = theirs(tmp_path, ids, mask)[0]
        np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-4, rtol=0)
    else:
        close(ours(tmp_path, ids, mask, types), theirs(tmp_path, ids, mask, types), mask)


@pytest.mark.network
def test_minilm_is_transformers_minilm():
    network = load_bert()
    folder = network.source.path
    ids, mask = network.tokenizer.rows([EATING, BREAD, BABY, "film " * 40], 32)
    assert mask.sum(axis=1).tolist() == [8, 11, 9, 32]
    close(ours(folder, ids, mask), theirs(folder, ids, mask), mask)
    random = np.random.default_rng(0).integers(1000, 30522, (2, 64))
    whole = np.ones_like(random, bool)
    close(ours(folder, random, whole), theirs(folder, random, whole), whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (EATING, "Café\u2019s  UNBELIEVABLE, 日本!", ""):
        cut = tokenizer(text, padding=False, truncation=False)["input_ids"]
        assert cut == network.tokenizer.encode(text)


@pytest.mark.network
def test_minilm_tells_near_sentences_from_far_ones():
    network = load_bert()
    rows = network.tokenizer.rows([EATING, BREAD, BABY], 32)
    vectors = np.asarray(jax.jit(sentence_embedding(network.features))(network.params, *rows))
    np.testing.assert_allclose((vectors @ vectors.T)[0], [1.0, 0.755, -0.105], atol=1e-3)


if __name__ == "__main__":  # writes the golden file of tests/models/test_bert_network.py anew
    import tempfile

    answers = {}
    for kind in tiny_bert.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            found = theirs(tiny_bert.write(Path(folder), kind), *tiny_bert.batch(kind))
        answers |= {f"{kind}_hidden": found[0], f"{kind}_pooled": found[1]}
    np.savez(GOLDEN, **answers)
