"""A fresh head over any network's features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert

from lora_jax.errors import InputError
from lora_jax.models.bert import initialise_bert
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.heads import with_head
from lora_jax.models.network import Network


@pytest.fixture(scope="module")
def bert():
    return initialise_bert(BertConfig.from_hf(tiny_bert.CONFIGS["bert"]), jax.random.key(1))


def test_logits_are_features_times_kernel_plus_bias(bert, key):
    network = with_head(bert, 5, key)
    head = network.params["head"]
    assert head["kernel"].shape == (12, 5) and not head["bias"].any()
    params = {**network.params, "head": {**head, "bias": jnp.arange(5.0)}}
    ids, mask = tiny_bert.batch("bert")
    wanted = bert.features(bert.params, ids, mask) @ head["kernel"] + np.arange(5.0)
    np.testing.assert_allclose(network.apply(params, ids, mask), wanted, atol=1e-6)
    np.testing.assert_allclose(network.apply(params, ids, mask=mask), wanted, atol=1e-6)


def test_other_features_make_other_widths(bert, key):
    def both(params, ids, mask):
        hidden = bert.apply(params, ids, mask)
        return jnp.concatenate([hidden[:, 0], hidden.mean(axis=1)], axis=-1)

    assert with_head(bert, 3, key, both).params["head"]["kernel"].shape == (24, 3)


def test_what_cannot_carry_a_head_is_refused(bert, key):
    bare = dataclasses.replace(bert, features=None)
    for network, classes, features, message in [
        (bert, 1, None, "at least 2 classes, got|at least 2 classes apart"),
        (bare, 3, None, "names no features"),
        (bert, 3, bert.apply, r"reads features \[B, D\], these are \[2, 8, 12\]"),
        (with_head(bert, 3, key), 3, None, "has a parameter 'head' already"),
        (Network(lambda p: p, {}, None), 3, lambda p: p, "no example inputs"),
    ]:
        with pytest.raises(InputError, match=message):
            with_head(network, classes, key, features)
