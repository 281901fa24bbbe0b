"""What a config.json may say, and what is refused."""

import numpy as np
import pytest
import tiny_llama

from lora_jax.errors import InputError
from lora_jax.models import LlamaConfig, RopeScaling
from lora_jax.models.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def raw(**changes):
    return {**tiny_llama.CONFIG.to_hf(), **changes}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 5e5},
        {
            "rope_parameters": None,
            "rope_scaling": {
                **{k: v for k, v in LLAMA3.items() if k != "rope_type"},
                "type": "llama3",
            },
            "rope_theta": 5e5,
        },
    ],
)
def test_every_spelling_of_rope_scaling_is_one_config(spelling):
    config = LlamaConfig.from_hf(raw(**spelling))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling("linear", 4.0)])
def test_a_config_survives_its_file(scaling):
    config = tiny_llama.config(rope_scaling=scaling, eos_token_ids=(2, 5), attention_bias=True)
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones():
    plain = inverse_frequencies(tiny_llama.config(head_dim=32, rope_theta=5e5))
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    scaled = inverse_frequencies(
        tiny_llama.config(head_dim=32, rope_theta=5e5, rope_scaling=scaling)
    )
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[[0, -1]], [1.0, 8.0], rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-6)
    assert np.any((ratio > 1.01) & (ratio < 7.99))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {**LLAMA3, "factor": -1}}, "rope factor is -1"),
    ],
)
def test_what_is_not_computed_is_refused(changes, words):
    with pytest.raises(InputError, match=f"here/config.json: .*{words}"):
        LlamaConfig.from_hf(raw(**changes), "here/config.json")
