"""What is no good is refused where it is given, with the rule, the place and the way out."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj

X = jnp.ones((2, 3))
PARAMS = {
    "w": jnp.ones((3, 5)),
    "whole": jnp.ones((3, 5), jnp.int32),
    "activation": jax.nn.relu,
    "idle": jnp.ones((4, 4)),
    "name": "linear",
    "scale": jnp.ones(5),
}
KEY = jax.random.key(0)


def apply(params, x):
    y = params["activation"](x @ params["w"]) + x @ params["whole"]
    return y * params["scale"][None]


SITES = lj.find_sites(apply, PARAMS, X)


def attach(rules, params=PARAMS):
    return lj.attach(KEY, params, rules, SITES)


FROZEN, TRAINED = attach({"w": lj.lora(2)})
BOUND = lj.bind(FROZEN, TRAINED)


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"whole": lj.lora(2)}, "'whole' is an array of int32.*only floating-point"),
        ({"whole": lj.full()}, "'whole' is an array of int32"),
        ({"name": lj.full()}, "'name' is no array"),
        ({"activation": lj.lora(2)}, "'activation' is no array"),
        ({"idle": lj.lora(2)}, "'idle' is never read by apply"),
        ({"scale": lj.dora(2)}, "'scale' is no kernel .it is used by: mul.*; only full"),
        ({"w": "lora"}, "'lora', which is no method"),
        ({"weight": lj.lora(2)}, "'weight' matches no parameter; nearest: '"),
        ({"w": lj.lora(2), ".": lj.lora(3)}, "is taken by the earlier rule 'w'"),
    ],
)
def test_rules(rules, message):
    with pytest.raises(lj.InputError, match=message):
        attach(rules)


def test_vectors_and_norms_take_full_and_nothing_else():
    frozen, trained = attach({"scale": lj.full()})
    assert list(trained["scale"]) == ["w"]
    assert lj.factored(apply)(lj.bind(frozen, trained), X).shape == (2, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attach({"w": lj.lora(2)}, BOUND), "adapted already"),
        (lambda: attach({"w": lj.lora(2)}, {**PARAMS, "w": jnp.ones((3, 4))}), r"has shape \(3, 4"),
        (lambda: attach({"v": lj.lora(2)}, {"v": X}), "params has no 'w'.*nearest: 'v'"),
        (lambda: lj.attach(0, PARAMS, {"w": lj.lora(2)}, SITES), "key is 0"),
        (lambda: lj.find_sites(apply, BOUND, X), "adapted already"),
        (lambda: lj.bind(BOUND, TRAINED), "'w' is bound already"),
        (lambda: lj.factored(apply)(FROZEN, X), "'w' is not bound"),
        (lambda: lj.materialised(apply)(FROZEN, X), "'w' is not bound"),
        (lambda: lj.merge(FROZEN, {}), r"missing \['w'\]"),
        (lambda: apply(BOUND, X), "through lora_jax.factored"),
        (lambda: jnp.tanh(BOUND["w"]), "through lora_jax.factored"),
        (lambda: lj.factored(apply, materialise="v")(BOUND, X), "'v' matches no parameter"),
    ],
)
def test_parameters_in_the_wrong_place(call, message):
    with pytest.raises(lj.InputError, match=message):
        call()


def test_a_function_must_read_its_parameters_from_its_argument():
    w = jnp.ones((3, 5))
    with pytest.raises(lj.InputError, match=r"closes over its parameters \(1 arrays.*\(3, 5\)"):
        lj.find_sites(lambda params, x: x @ w, {"other": jnp.ones((2, 2))}, X)
    with pytest.raises(lj.InputError, match="closes over 'w'"):
        lj.find_sites(lambda params, x: x @ PARAMS["w"], PARAMS, X)


def test_of_two_rules_the_first_wins_and_the_table_says_so():
    table = SITES.table({"w": lj.lora(2), lj.all_linear: lj.dora(3), "scale": lj.full()})
    assert "lora(rank=2, alpha=8.0) (first of 2 rules that match)" in table
    assert "scale  no kernel: mul" in table
    assert table.splitlines()[3].endswith("full()")


def test_an_operation_without_a_rule_names_itself_and_two_ways_out():
    def apply(params, x):
        return x @ params["w"] + jnp.sum(params["w"] ** 2)

    params = {"w": PARAMS["w"]}
    sites = lj.find_sites(apply, params, X)
    assert "dense; also" in sites.table()
    frozen, trained = lj.attach(KEY, params, {"w": lj.lora(2)}, sites)
    bound = lj.bind(frozen, trained)
    with pytest.raises(lj.InputError) as error:
        lj.factored(apply)(bound, X)
    for part in (
        "'w'",
        "integer_pow' at ",
        "test_inputs.py:",
        "materialise='w'",
        "leave this path",
    ):
        assert part in str(error.value)
    assert lj.factored(apply, materialise="w")(bound, X).shape == (2, 5)
