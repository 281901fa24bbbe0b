"""Laws that hold for every method on every model: one table of both.

Compiling is what costs time here. So the laws of one row share one compiled program, built with
few optimisations; only a fresh LoRA's bit equality is held between two programs compiled as users
compile them.
"""

import functools

import jax
import numpy as np
import pytest
from cases import CASES
from claims import CLAIMS

import lora_jax as lj
from lora_jax.testing import LAWS, MODELS, Claim, Row, compiled_as_users_do, laws
from lora_jax.testing.row import plain

VARIANTS = {
    "lora": Claim(lambda: lj.lora(rank=2, alpha=3.0)),
    "dora": Claim(lambda: lj.dora(rank=2, alpha=3.0)),
    "rslora": Claim(lambda: lj.lora(rank=3, rslora=True, init="gaussian")),
    "lora_fa": Claim(lambda: lj.lora(rank=2, freeze_a=True)),
    "dora_through_norm": Claim(lambda: lj.dora(rank=2, detach_norm=False)),
}
MAIN = ("lora", "dora")  # these meet every case, the others the thorough ones
ROWS = [(case, name) for name in VARIANTS for case in CASES if name in MAIN or case.thorough]
NARROW = [(case, name) for case, name in ROWS if name == "lora" or case.thorough]
# What every method meets in the default suite: all laws of one model, and these of another.
OFTEN = {"dense": LAWS, "scanned": (laws.factored_is_its_definition,)}


@functools.cache
def row(case, name):
    return Row(case, VARIANTS[name])


def rows(pairs):
    """The table as parameters of a test; the methods besides the main two are slow."""

    def marks(case, name):
        rare = () if name in MAIN else (pytest.mark.slow,)
        return (*rare, pytest.mark.xdist_group(f"{case} {name}"))

    table = [pytest.param(*pair, marks=marks(*pair)) for pair in pairs]
    return pytest.mark.parametrize("case, name", table, ids=str)


every_row = rows(ROWS)


def cases(name, chosen=CASES):
    """Cases as parameters of a test of one method."""
    groups = [pytest.mark.xdist_group(f"{case} {name}") for case in chosen]
    table = [pytest.param(case, marks=group) for case, group in zip(chosen, groups, strict=True)]
    return pytest.mark.parametrize("case", table, ids=str)


@cases("lora")
def test_a_fresh_lora_changes_no_bit(case):
    made = row(case, "lora")
    fresh = compiled_as_users_do(lj.factored(made.apply))(lj.bind(*made.attached), *made.inputs)
    laws.close(fresh, plain(case))
    if not case.exact:
        return
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), fresh, plain(case)
    )


@every_row
def test_a_fresh_adapter_changes_nothing(case, name):
    laws.a_fresh_adapter_changes_nothing(row(case, name))


@every_row
def test_factored_is_materialised(case, name):
    laws.factored_is_its_definition(row(case, name))


@every_row
def test_merged_is_materialised(case, name):
    laws.merged_is_its_definition(row(case, name))


@every_row
def test_gradients_are_those_of_the_materialised_model(case, name):
    laws.gradients_are_those_of_the_definition(row(case, name))


@rows(NARROW)
def test_many_adapters_at_once_are_a_loop_over_them(case, name):
    laws.many_adapters_at_once_are_a_loop_over_them(row(case, name))


@rows(NARROW)
def test_a_bfloat16_base_has_float32_adapters(case, name):
    laws.a_bfloat16_base_has_float32_adapters(row(case, name))


@cases("lora", [case for case in CASES if case.thorough])
def test_jit_equals_eager(case):
    laws.jit_equals_eager(row(case, "lora"))


@cases("dora")
def test_shapes_are_enough(case):
    laws.shapes_are_enough(row(case, "dora"))


@functools.cache
def claimed(model, name):
    return Row(model, CLAIMS[name])


def held_to(law, model, name):
    """One law of a method on a model, slow where the default suite leaves it out."""
    rare = () if law in OFTEN.get(str(model), ()) else (pytest.mark.slow,)
    marks = (*rare, pytest.mark.xdist_group(f"{model} {name} claimed"))
    return pytest.param(law, model, name, marks=marks, id=f"{model}-{name}-{law.__name__}")


EVERY_METHOD = [
    held_to(law, model, name)
    for name in CLAIMS
    for model in MODELS
    if not (model.transposed and CLAIMS[name].make().weight is None)
    for law in LAWS
]


@pytest.mark.parametrize("law, model, name", EVERY_METHOD)
def test_every_method_keeps_every_law(law, model, name):
    law(claimed(model, name))
