"""What the other two commands make of a written adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from experiments.generate import write
from experiments.merge import merge
from experiments.opening import open_adapter
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.generate import Sampling
from lora_jax.io.peft import save_peft

GREEDY = Sampling()


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    """An adapter far from zero, saved without any training."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    model = models.load(str(llama))
    sites = lj.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    rules = {lj.all_linear: lj.lora(rank=3, alpha=6.0)}
    frozen, trained = lj.attach(jax.random.key(0), model.params, rules, sites)
    trained = jax.tree.map(lambda x: x + 0.3, trained)
    save_peft(
        folder,
        frozen,
        trained,
        base_name="tiny",
        provenance={"source": model.source.uri, "fingerprint": model.source.fingerprint},
    )
    return folder


@pytest.fixture(scope="module")
def opened(adapter):
    return open_adapter(adapter)


def test_the_adapter_changes_what_is_written(opened):
    prompts = ["item 1 a", "item"]
    ours = write(opened, prompts, max_new_tokens=6, sampling=GREEDY)
    base = write(opened, prompts, max_new_tokens=6, sampling=GREEDY, adapter=False)
    assert len(ours) == len(base) == 2
    assert ours != base


def test_draws_follow_the_seed(opened):
    def draw(seed):
        options = {"max_new_tokens": 6, "sampling": Sampling(temperature=3.0), "seed": seed}
        return write(opened, ["item 1 a"], **options)

    assert draw(1) == draw(1) != draw(2)


def test_a_prompt_beyond_the_context(opened):
    with pytest.raises(InputError, match="context of 40"):
        write(opened, ["x" * 38], max_new_tokens=6, sampling=GREEDY)


def test_the_merged_model_is_the_adapted_one(opened, tmp_path):
    assert merge(opened, tmp_path / "merged") < 1e-5
    model = models.load(str(tmp_path / "merged"))
    ids = jnp.arange(12)[None]
    ours = lj.factored(opened.model.apply)(lj.bind(opened.frozen, opened.trained), ids)
    np.testing.assert_allclose(model.apply(model.params, ids), ours, rtol=1e-4, atol=1e-3)
    assert model.tokenizer.encode("ab") == opened.model.tokenizer.encode("ab")


def test_the_error_of_a_narrow_type_is_measured(opened, tmp_path):
    assert 1e-4 < merge(opened, tmp_path / "merged", dtype="bfloat16") < 0.2


def test_a_folder_in_use_is_left_alone(opened, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(InputError, match="give a new folder"):
        merge(opened, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="give the adapter/ folder of a run"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        open_adapter(tmp_path)
