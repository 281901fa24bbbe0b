"""Models that other people wrote, installed from packages, adapted in one line.

Install and run (small: what is heavy is left out), from the repository's root:

    python -m venv .others && .others/bin/pip install -q -e '.[dev]' && .others/bin/pip install \
        -q --no-deps -r tests/others/requirements.txt && .others/bin/python -m pytest -m others

A model whose package is absent is skipped.
"""

import math

import jax
import numpy as np
import pytest
from installed_decoders import DECODERS
from installed_equinox import EQUINOX
from installed_haiku import HAIKU
from laws import attached, built, close, furthest, plain, results, rounding

import lora_jax as lj

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


@every_case
def test_no_kernel_is_missed(case):
    _, params, _, sites = built(case)
    found = {path: (s.d_in, s.d_out, s.stack, s.uses) for path, s in sites.items()}
    assert found == dict(case.sites)
    assert {operation for seen in sites.others.values() for operation in seen} <= HARMLESS
    assert len(sites) + len(sites.others) == len(jax.tree.leaves(params))


@every_case
def test_predicates_choose_by_what_the_author_called_it(case):
    sites = built(case)[3].values()
    assert {site.path for site in sites if lj.attention(site)} == set(case.attention)
    assert {site.path for site in sites if lj.mlp(site)} == set(case.mlp)
    assert {site.path for site in sites if site.router} == case.routers


@every_case
def test_a_fresh_lora_changes_no_bit(case):
    apply, params, inputs, _ = built(case)
    frozen, trained = attached(case, "lora")
    fresh = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), *inputs)
    expected = plain(case)(params, *inputs)
    close(fresh, expected)
    if case.exact:
        jax.tree.map(np.testing.assert_array_equal, fresh, expected)


@every_case
def test_each_layer_has_an_adapter_of_its_own(case):
    *_, sites = built(case)
    _, trained = attached(case, "lora")
    chosen = [site for site in sites.values() if case.targets(site)]
    wanted = sum(2 * (site.d_in + site.d_out) * math.prod(site.stack) for site in chosen)
    assert sum(x.size for x in jax.tree.leaves(trained)) == wanted


@every_row
def test_the_laws_hold(case, name):
    _, params, inputs, _ = built(case)
    fresh, *moved = results(case, name)
    close(fresh[0], plain(case)(params, *inputs), rounding(case, 5e-6))
    for factored, materialised, grads, wanted, merged in moved:
        close(factored, materialised, rounding(case, 5e-6))
        assert furthest(factored, fresh[0]) > 1e-2
        close(plain(case)(merged, *inputs), materialised, rounding(case, 5e-6))
        close(grads, wanted, rounding(case, 6e-5))  # haiku_resnet 3.4e-5; in float64 7e-15
