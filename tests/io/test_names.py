"""The table between Hugging Face's names and ours goes both ways for every parameter."""

import pytest
import tiny_llama

from lora_jax.errors import InputError
from lora_jax.io import names
from lora_jax.models.model import param_shapes


def paths(tree, at=""):
    for name, value in tree.items():
        here = f"{at}/{name}" if at else name
        yield from paths(value, here) if isinstance(value, dict) else [here]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_name_and_comes_back(tied):
    shapes = param_shapes(
        tiny_llama.config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    )
    seen = set()
    for path in paths(shapes):
        layer = 11 if names.is_stacked(path) else None
        name = names.to_hf(path, layer)
        assert names.from_hf(name) == (path, layer)
        assert name.startswith(names.module_of(path, layer) + ".")
        seen.add(name)
    assert len(seen) == len(list(paths(shapes)))


@pytest.mark.parametrize(
    ("path", "layer", "words"),
    [
        ("layers/attn/qproj/kernel", 0, "nearest: layers/attn/q_proj/kernel"),
        ("layers/attn/q_proj/kernel", None, "outside the layers"),
        ("norm/scale", 0, "in a layer"),
    ],
)
def test_a_wrong_path_names_the_nearest(path, layer, words):
    with pytest.raises(InputError, match=words):
        names.to_hf(path, layer)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.qproj.weight", "lm_head.bias", "x"])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(InputError, match=f"no Llama tensor is called '{name}'"):
        names.from_hf(name)
