"""Names and configs alone: PEFT's matching, and the simplest config that says a plan again."""

import pytest

from lora_jax.errors import InputError
from lora_jax.io.peft.config import check_config, methods_of
from lora_jax.io.peft.kinds import TABLE
from lora_jax.io.peft.match import pattern_value, targeted
from lora_jax.io.peft.plan import config_of
from lora_jax.methods import dora, full, lora

ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(12) for n in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{n}_proj" for i in range(12) for n in ("gate", "up", "down")]
NORMS = ["model.norm", *(f"model.layers.{i}.input_layernorm" for i in range(12))]
MODULES = [*ATTENTION, *MLP, *NORMS, "model.embed_tokens", "lm_head"]
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q1, Q11 = "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"


def planned(plan, modules=MODULES, kind="LORA"):
    return config_of(TABLE[kind], plan, modules, "org/base")


def found(**config):
    return {name for name in MODULES if targeted(config, name)}


def test_a_list_matches_dotted_suffixes():
    assert found(target_modules=["q_proj"]) == {n for n in MODULES if n.endswith(".q_proj")}
    assert found(target_modules=["proj"]) == set()
    assert found(target_modules=["1.self_attn.q_proj"]) == {Q1}
    assert found(target_modules=["lm_head"]) == {"lm_head"}


def test_a_string_is_a_full_match():
    assert found(target_modules="q_proj") == set()
    assert found(target_modules=r".*\.1\.self_attn\.q_proj") == {Q1}
    assert found(target_modules=r"model\.layers\.1+\..*q_proj") == {Q1, Q11}


def test_excluded_modules_are_left_out():
    kept = found(target_modules=["q_proj"], exclude_modules=[Q1])
    assert kept == found(target_modules=["q_proj"]) - {Q1}
    kept = found(target_modules=["q_proj"], exclude_modules=r".*\.1\d\..*")
    assert Q1 in kept and Q11 not in kept
    assert found(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]) == found(
        target_modules=["q_proj"]
    )


@pytest.mark.parametrize("layers", [1, [1]])
@pytest.mark.parametrize("pattern", [None, [], "layers", ["h", "layers"]])
def test_layers_to_transform(layers, pattern):
    config = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": layers}
    # the head has no layer index, but its name is the target itself, which passes by the indices
    assert found(**config, layers_pattern=pattern) == {Q1, "lm_head"}


def test_layers_to_transform_edge_cases():
    assert found(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h") == set()
    assert found(target_modules=["embed_tokens"], layers_to_transform=[1]) == set()
    assert found(target_modules=["q_proj"], layers_to_transform=[]) == found(
        target_modules=["q_proj"]
    )
    assert found(target_modules=[Q11], layers_to_transform=[1]) == {Q11}


def test_the_first_pattern_of_the_file_wins():
    assert pattern_value({"q_proj": 2, r"layers\.1\..*q_proj": 6}, Q1, 4) == 2
    assert pattern_value({r"layers\.1\..*q_proj": 6, "q_proj": 2}, Q1, 4) == 6
    assert pattern_value({"proj": 6}, Q1, 4) == 4
    assert pattern_value({".*proj": 6}, Q1, 4) == 6
    assert pattern_value({"^model.layers.1.self_attn.q_proj": 6}, Q1, 4) == 6
    assert pattern_value({"1.self_attn": 6}, Q1, 4) == 4
    assert pattern_value(None, Q1, 4) == 4


def test_all_linear_leaves_the_head():
    config = PLAIN | {"target_modules": "all-linear"}
    linear = [*ATTENTION, *MLP]
    assert set(methods_of(config, linear, [*NORMS, "lm_head"])) == set(linear)


def test_methods_take_rank_alpha_scale_and_kind():
    config = PLAIN | {"rank_pattern": {Q1: 2}, "alpha_pattern": {Q11: 3}, "use_rslora": True}
    methods = methods_of(config, ATTENTION, [])
    assert methods[Q1] == lora(rank=2, alpha=8, rslora=True)
    assert methods[Q11] == lora(rank=4, alpha=3, rslora=True)
    config = PLAIN | {"use_dora": True, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    assert methods_of(config, [Q1], [])[Q1] == dora(rank=4, alpha=8, dropout=0.1, init="gaussian")


def test_modules_to_save_compares_bare_suffixes():
    methods = methods_of(PLAIN | {"modules_to_save": ["norm"]}, ATTENTION, NORMS)
    assert {name for name, method in methods.items() if method.name == "full"} == set(NORMS)


REFUSED = [
    {"peft_type": "C3A"},
    {"peft_type": None},
    {"bias": "some"},
    {"lora_bias": True},
    {"trainable_token_indices": [3]},
    {"alora_invocation_tokens": [7]},
    {"use_qalora": True},
    {"megatron_config": {"a": 1}},
    {"corda_config": {"corda_method": "kpm"}},
    {"eva_config": {"rho": 2.0}},
    {"kasa_config": {"beta": 0.1}},
    {"use_something_of_2027": True},
    *({"init_lora_weights": i} for i in ("pissa_niter_4", "corda", "loftq")),
    *({"init_lora_weights": i} for i in ("lora_ga", "unheard_of", 7)),
]


@pytest.mark.parametrize("option", REFUSED, ids=str)
def test_an_option_that_would_be_ignored_is_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=name) as error:
        check_config(PLAIN | option, "here.json")
    assert repr(value) in str(error.value) and "here.json" in str(error.value)


def test_all_refused_options_are_listed_at_once():
    with pytest.raises(InputError, match=r"2 options.*bias='some', lora_bias=True"):
        check_config(PLAIN | {"bias": "some", "lora_bias": True}, "here.json")


WRONG = [
    ({"r": 0}, "rank 0"),
    ({"r": 4.5}, "rank 4.5"),
    ({"r": True}, "rank True"),
    ({"rank_pattern": {"q": 0}}, "rank 0 for 'q'"),
    ({"lora_alpha": 0}, "alpha 0"),
    ({"alpha_pattern": {"q": "8"}}, "alpha '8'"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": "q(", "layers_to_transform": None}, "regular expression"),
    ({"rank_pattern": {"q(": 2}}, "regular expression"),
    ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "layers_pattern"),
]


@pytest.mark.parametrize(("option", "message"), WRONG, ids=str)
def test_a_value_that_peft_could_not_mean_is_refused(option, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        check_config(PLAIN | option, "here.json")


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"]
)
def test_starting_points_that_can_be_found_again_are_read(init):
    check_config(PLAIN | {"init_lora_weights": init}, "here.json")


# --- methods -> config -------------------------------------------------------------------------

PLANS = {
    "short names": {
        n: lora(rank=4, alpha=8) for n in ATTENTION if n.endswith(("q_proj", "v_proj"))
    },
    "two layers": {n: lora(rank=4, alpha=8) for n in ATTENTION if ".1." in n or ".11." in n},
    "scattered": {n: lora(rank=4, alpha=8) for n in (Q1, MLP[0], "lm_head")},
    "one layer of each rank": {
        n: lora(rank=1 + i, alpha=16) for i, n in enumerate(m for m in MODULES if "q_proj" in m)
    },
    "ranks by name": {n: lora(rank=2 if "q_proj" in n else 6, alpha=8) for n in ATTENTION},
    "alphas by name": {n: lora(rank=2, alpha=1.5 if "q_proj" in n else 6) for n in ATTENTION},
    "rslora": {n: lora(rank=4, alpha=8, rslora=True) for n in ATTENTION},
    "rslora in part": {n: lora(rank=3, alpha=8, rslora="q_proj" in n) for n in ATTENTION},
    "dora": {n: dora(rank=4, alpha=8) for n in MLP},
    "saved whole": {Q1: lora(rank=4, alpha=8), "model.norm": full(), "lm_head": full()},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_config_says_the_plan_again(plan):
    config = planned(plan)
    check_config(config, "here.json")
    again = methods_of(config, MODULES, [])
    assert set(again) == set(plan)
    for name, method in plan.items():
        mine, theirs = method.hyper, again[name].hyper
        assert again[name].name == method.name
        assert mine.get("rank") == theirs.get("rank")
        if mine:
            scale = mine["alpha"] / mine["rank"] ** (0.5 if mine["rslora"] else 1)
            other = theirs["alpha"] / theirs["rank"] ** (0.5 if theirs["rslora"] else 1)
            assert scale == pytest.approx(other, rel=1e-12)


def test_the_config_is_the_simplest_one():
    config = planned(PLANS["short names"])
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["rank_pattern"], config["layers_to_transform"]) == ({}, None)
    assert config["lora_alpha"] == 8 and type(config["lora_alpha"]) is int
    config = planned(PLANS["two layers"])
    assert config["layers_to_transform"] == [1, 11]
    config = planned(PLANS["ranks by name"])
    assert (config["r"], config["rank_pattern"]) == (6, {"q_proj": 2})
    config = planned(PLANS["scattered"])
    assert config["target_modules"] == sorted(PLANS["scattered"])


def test_what_peft_cannot_hold_is_refused():
    with pytest.raises(InputError, match="one use_dora"):
        planned({Q1: lora(rank=4), Q11: dora(rank=4)})
    with pytest.raises(InputError, match="at least one"):
        planned({"model.norm": full()})
    with pytest.raises(InputError, match="name matching"):  # 'lm_head' also names 'x.lm_head'
        planned({"lm_head": lora(rank=4)}, ["lm_head", "x.lm_head"])
