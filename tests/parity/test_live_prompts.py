"""Virtual tokens of a BERT against peft's own model, and files both ways."""

import warnings

import jax
import numpy as np
import pytest
import tiny_bert

from lora_jax.io.peft import load_prompt, save_prompt
from lora_jax.models import load_bert, with_head

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

N, CLASSES = 3, 4
CONFIGS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "p": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix, made": (
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 7},
    ),
}
every = pytest.mark.parametrize("name", CONFIGS)


def theirs(folder, auto, name, task_type):
    """A model of peft's with virtual tokens, all that it trains moved away from its start."""
    torch.manual_seed(0)
    made, options = CONFIGS[name]
    config = made(task_type=task_type, num_virtual_tokens=N, **options)
    options = {"num_labels": CLASSES} if task_type == "SEQ_CLS" else {}
    base = auto.from_pretrained(folder, dtype=torch.float32, **options)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def answer(model, ids, mask, types=None):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            **({} if types is None else {"token_type_ids": torch.tensor(types).long()}),
        )


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=1e-4, rtol=0)


@every
@pytest.mark.parametrize("kind", tiny_bert.CONFIGS)
def test_features_both_ways(kind, name, tmp_path):
    folder = tiny_bert.write(tmp_path / "base", kind)
    model = theirs(folder, transformers.AutoModel, name, "FEATURE_EXTRACTION")
    ids, mask = tiny_bert.batch(kind)
    wanted = answer(model, ids, mask)
    bare = load_bert(folder, "pooler")
    model.save_pretrained(tmp_path / "theirs")
    prompted = load_prompt(tmp_path / "theirs", bare)
    hidden = wanted.last_hidden_state[:, wanted.last_hidden_state.shape[1] - ids.shape[1] :]
    close(prompted.apply(prompted.params, ids, mask)[mask], hidden[torch.tensor(mask)])
    close(prompted.features(prompted.params, ids, mask), wanted.pooler_output)
    assert np.abs(bare.apply(bare.params, ids, mask) - hidden.numpy())[mask].max() > 1e-2

    save_prompt(tmp_path / "ours", prompted, prompted.params, base_name="org/tiny")
    base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert type(again) is peft.PeftModelForFeatureExtraction
    np.testing.assert_allclose(
        answer(again, ids, mask).pooler_output, wanted.pooler_output, atol=1e-5
    )


@every
def test_a_classifier_both_ways(name, tmp_path):
    folder = tiny_bert.write(tmp_path / "base", "bert")
    auto = transformers.AutoModelForSequenceClassification
    model = theirs(folder, auto, name, "SEQ_CLS")
    ids, mask = tiny_bert.batch("bert")
    types = (np.arange(9) > 3)[None] * np.array([[1], [0]])
    wanted = answer(model, ids, mask, types).logits
    model.save_pretrained(tmp_path / "theirs")
    headed = with_head(load_bert(folder, "pooler"), CLASSES, jax.random.key(0))
    prompted = load_prompt(tmp_path / "theirs", headed)
    close(prompted.apply(prompted.params, ids, mask, types), wanted)

    save_prompt(tmp_path / "ours", prompted, prompted.params, base_name="org/tiny")
    base = auto.from_pretrained(folder, dtype=torch.float32, num_labels=CLASSES)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(answer(again, ids, mask, types).logits, wanted, atol=1e-5)
