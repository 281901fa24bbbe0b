import json

import pytest
import yaml

from lora_jax.errors import InputError
from lora_jax.io.card import Card, model_card

SITES = [("layers/attn/q_proj", "lora, rank 4, alpha 8, scale 2")]
FULL: Card = {
    "title": "Reviews",
    "summary": "Tells good reviews from bad ones.",
    "license": "apache-2.0",
    "language": "en",
    "tags": ["sentiment"],
    "base": "pypi://base==1/x.gguf",
    "base_sha256": "ab" * 32,
    "base_license": "apache-2.0",
    "seed": 7,
    "data": "movie reviews",
    "data_sha256": "cd" * 32,
    "data_license": "mit",
    "examples": {"train": 100, "test": 20},
    "hyper": {"learning rate": 2e-4, "schedule": "a|b"},
    "metrics": [
        {
            "name": "accuracy",
            "before": 0.8125,
            "after": 0.89,
            "interval": (0.871, 0.907),
            "examples": 20,
        }
    ],
    "merge_error": 1.25e-6,
    "trainable": 1234,
    "total": 100000,
    "limits": "English only.",
    "versions": {"jax": "0.12.0"},
    "date": "2024-05-06",
}


def front_matter(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads():
    assert front_matter(model_card("org/base", SITES, FULL)) == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["lora_jax", "peft", "sentiment"],
    }


@pytest.mark.parametrize("name", ["pypi://a==1/b.gguf", "/home/me/base", 'quote"d'])
def test_a_base_that_is_no_hub_name_stays_out_of_the_front_matter(name):
    text = model_card(name, SITES, {})
    assert "base_model" not in front_matter(text)
    assert f"| name | {name} |" in text and json.dumps(name) in text


def test_every_fact_is_in_the_card():
    text = model_card("org/base", SITES, FULL)
    for fact in (
        *("# Reviews", "ab" * 32, "cd" * 32, "lora, rank 4, alpha 8, scale 2", "| seed | 7 |"),
        *("train 100, test 20", "| learning rate | 0.0002 |", "a\\|b", "English only."),
        "| accuracy | 0.8125 | 0.89 | 0.871 to 0.907 | 20 |",
        *("1.25e-06", "1,234 trained parameters of 100,000 (1.234 %)", "2024-05-06", "0.12.0"),
        *('load("pypi://base==1/x.gguf")', 'from_pretrained("org/base")'),
    ):
        assert fact in text


def test_what_is_unknown_leaves_no_trace():
    text = model_card("org/base", SITES, {})
    assert "More information needed" not in text and "None" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# Adapter for org/base", "## Base", "## Adapted", "## How to use"]


def test_the_same_facts_give_the_same_text():
    assert model_card("org/base", SITES, FULL) == model_card("org/base", SITES, dict(FULL))


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match="'metrcs'; nearest: 'metrics'"):
        model_card("org/base", SITES, {"metrcs": []})
