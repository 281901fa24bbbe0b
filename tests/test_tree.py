import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj
from lora_jax import tree


def test_paths_drop_the_boxes_of_frameworks_and_nothing_else():
    module = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    assert set(tree.flatten(nnx.state(module))) == {"kernel", "bias"}
    boxed = nn.Dense(5, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")))
    params = boxed.init(jax.random.key(0), np.ones((2, 3)))
    assert set(tree.flatten(params)) == {"params/kernel", "params/bias"}
    assert set(tree.flatten({"attn": {"value": 1.0, "query": 2.0}})) == {"attn/value", "attn/query"}


def test_replace_keeps_the_structure_and_refuses_unknown_paths():
    state = nnx.state(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    changed = tree.replace(state, {"bias": np.zeros(5)})
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    with pytest.raises(lj.InputError, match=r"no parameter at 'bais'; nearest: 'bias'"):
        tree.replace(state, {"bais": 0})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(lj.InputError, match="share the path 'a/b'"):
        tree.flatten({"a/b": 1, "a": {"b": 2}})


PATHS = dict.fromkeys(["layers/q_proj/kernel", "layers/v_proj/kernel", "head/bias"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({".*/qproj/kernel": 1}, "matches no parameter; nearest: 'layers/q_proj/kernel'"),
        ({"q_proj": 1}, "pattern 'q_proj' matches no parameter"),
        ({".*": 1, "head/.*": 2}, "has no effect: all it matches, such as 'head/bias'"),
        ({"(": 1}, "is not a regular expression"),
        ({lambda item: True: 1}, "matches no parameter"),
    ],
)
def test_a_rule_without_effect_is_an_error(rules, message):
    with pytest.raises(lj.InputError, match=re.escape(message)):
        tree.first_match(rules, PATHS)


def test_the_first_rule_wins():
    rules = {".*/q_proj/.*": "q", ".*/kernel": "any"}
    assert tree.first_match(rules, PATHS) == {
        "layers/q_proj/kernel": "q",
        "layers/v_proj/kernel": "any",
    }
