"""Models that other people wrote, installed from packages, adapted in one line.

Install and run (small: what is heavy is left out), from the repository's root:

    python -m venv .others && .others/bin/pip install -q -e '.[dev]' && .others/bin/pip install \
        -q --no-deps -r tests/others/requirements.txt && .others/bin/python -m pytest -m others

A model whose package is absent is skipped.
"""

import functools
import math

import jax
import numpy as np
import pytest
from installed_decoders import DECODERS
from installed_equinox import EQUINOX
from installed_haiku import HAIKU

import lora_jax as lj
from lora_jax.testing import Claim, Row, compiled_as_users_do, laws
from lora_jax.testing.row import plain

pytestmark = [
    pytest.mark.others,
    pytest.mark.filterwarnings("ignore"),  # their imports warn
]
CASES = [*DECODERS, *EQUINOX, *HAIKU]
HARMLESS = {"add", "mul", "concatenate", "lookup"}  # biases, scales, class tokens
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_row = pytest.mark.parametrize(
    "case, name", [(case, name) for case in CASES for name in ("lora", "dora")], ids=str
)

CLAIMS = {
    "lora": Claim(lambda: lj.lora(rank=2, alpha=3.0), rounding=5e-6),
    "dora": Claim(lambda: lj.dora(rank=2, alpha=3.0), rounding=5e-6),
}


@functools.cache
def row(case, name="lora"):
    return Row(case, CLAIMS[name])


@every_case
def test_no_kernel_is_missed(case):
    params, sites = row(case).params, row(case).sites
    found = {path: (s.d_in, s.d_out, s.stack, s.uses) for path, s in sites.items()}
    assert found == dict(case.sites)
    assert {operation for seen in sites.others.values() for operation in seen} <= HARMLESS
    assert len(sites) + len(sites.others) == len(jax.tree.leaves(params))


@every_case
def test_predicates_choose_by_what_the_author_called_it(case):
    sites = row(case).sites.values()
    assert {site.path for site in sites if lj.attention(site)} == set(case.attention)
    assert {site.path for site in sites if lj.mlp(site)} == set(case.mlp)
    assert {site.path for site in sites if site.router} == case.routers


@every_case
def test_a_fresh_lora_changes_no_bit(case):
    made = row(case)
    fresh = compiled_as_users_do(lj.factored(made.apply))(lj.bind(*made.attached), *made.inputs)
    laws.close(fresh, plain(case))
    if case.exact:
        jax.tree.map(np.testing.assert_array_equal, fresh, plain(case))


@every_case
def test_each_layer_has_an_adapter_of_its_own(case):
    made = row(case)
    chosen = [site for site in made.sites.values() if case.targets(site)]
    wanted = sum(2 * (site.d_in + site.d_out) * math.prod(site.stack) for site in chosen)
    assert sum(x.size for x in jax.tree.leaves(made.attached[1])) == wanted


@every_row
def test_the_laws_hold(case, name):
    laws.a_fresh_adapter_changes_nothing(row(case, name))
    laws.factored_is_its_definition(row(case, name))
    laws.merged_is_its_definition(row(case, name))
    for _, _, grads, wanted, _ in row(case, name).results[1:]:
        laws.close(grads, wanted, row(case, name).rounding(6e-5))  # haiku_resnet 3.4e-5
