"""Keys and values of a config, methods and targets by name."""

import pytest
from ml_collections import config_dict

import lora_jax as lj
from configs import quickstart
from experiments import choices
from experiments.rules import make_rules
from experiments.settings import flat_keys, resolve
from lora_jax.errors import InputError


def test_the_quickstart_is_complete_and_known():
    settings = resolve(quickstart.get_config())
    assert settings.train.batch == 8
    assert settings.train.b2 == 0.999
    assert make_rules(settings) == {lj.all_linear: lj.lora(rank=8, alpha=16.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "unknown key 'sead' in the config; nearest: 'seed'"),
        ({"train": {"learning_rat": 1.0}}, "nearest: 'train.learning_rate'"),
        ({"method": {"name": "lora", "rnk": 4}}, "unknown key 'method.rnk'.*'method.rank'"),
        ({"method": {"name": "lorra"}}, "config.method.name is 'lorra'.*nearest: 'lora'"),
        ({"train": {"steps": "many"}}, "config.train.steps is 'many'; expected int"),
        ({"train": {"steps": True}}, "expected int"),
        ({"train": {"steps": 2.5}}, "expected int"),
        ({"train": 3}, "config.train is 3; it is a group of keys"),
        ({"model": {"source": "x", "dtype": "float23"}}, "nearest: 'float32'"),
        ({"evaluate": {"split": "train"}}, "config.evaluate.split is 'train'"),
        ({"data": {"dev": 0}}, "config.data.dev is 0"),
        ({"train": {"b1": 1.0}}, "config.train.b1 is 1.0; give at least 0 and less than 1"),
        ({"train": {"diverged": 0.5}}, "config.train.diverged is 0.5; give at least 1"),
        ({"method": {"name": "lora", "alpha": "x"}}, "config.method.alpha is 'x'; expected float"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        resolve({"model": {"source": "x"}, **changes})


def test_a_whole_number_passes_for_a_real_one():
    assert resolve({"model": {"source": "x"}, "train": {"clip": 1}}).train.clip == 1.0


def rules(targets, **method):
    options = {"name": "lora", "rank": 3, "alpha": 6.0, **method}
    config = {"model": {"source": "x"}, "method": options, "targets": targets}
    return make_rules(resolve(config_dict.ConfigDict(config)))


def test_targets_in_every_form():
    three, four = lj.lora(rank=3, alpha=6.0), lj.lora(rank=4, alpha=6.0)
    assert rules("all_linear") == {lj.all_linear: three}
    assert rules(".*/q_proj/kernel") == {".*/q_proj/kernel": three}
    assert rules((".*/q", ".*/v")) == {".*/q": three, ".*/v": three}
    several = ((".*/q", {"rank": 4}), (".*/k", None), "all_linear")
    assert list(rules(several).items()) == [(".*/q", four), (".*/k", None), (lj.all_linear, three)]
    assert rules("all_linear", name="dora") == {lj.all_linear: lj.dora(rank=3, alpha=6.0)}


def test_a_misspelt_predicate_is_named():
    with pytest.raises(InputError, match="nearest: 'all_linear'"):
        rules("all_liner")


def test_changes_of_a_target_are_held_to_the_methods_options():
    with pytest.raises(InputError, match=r"unknown key 'rnk' in config\.targets; nearest: 'rank'"):
        rules(((".*/q", {"rnk": 4}),))
    with pytest.raises(InputError, match=r"config\.targets: rank is '4'; expected int"):
        rules(((".*/q", {"rank": "4"}),))


def test_none_and_the_predicates_by_name():
    assert rules("none") == {}
    assert list(rules("attention")) == [lj.attention] and list(rules("mlp")) == [lj.mlp]


@pytest.mark.parametrize("targets", [(), (("a", {}, 1),), 3, (3,), (("a", 3),)])
def test_targets_without_sense_are_refused(targets):
    with pytest.raises(InputError, match=r"config\.targets is"):
        rules(targets)


def test_options_of_other_methods_are_left_out():
    options = {"name": "full", "rank": 4, "alpha": 1.0}
    assert choices.make("method", options) == lj.full()
    assert choices.unused("method", options) == ["alpha", "rank"]
    with pytest.raises(InputError, match=r"config\.method: lora\(rank=0\)"):
        choices.make("method", {"name": "lora", "rank": 0})


THEIRS = """
import lora_jax as lj

def shifted(size=0.5, *, word="a"):
    init = lambda key, w: ({"w": w}, {"c": w[0] * 0})
    return lj.Method("shifted", init, lambda f, t: f["w"] + t["c"], hyper={"size": size})

def nothing():
    return 3
"""


@pytest.fixture
def their_module(tmp_path, monkeypatch):
    (tmp_path / "their_methods.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_method_of_the_users_own(their_module):
    options = {"name": "their_methods:shifted", "size": 2}
    settings = resolve({"model": {"source": "x"}, "method": options, "targets": ".*/q"})
    (method,) = make_rules(settings).values()
    assert repr(method) == "shifted(size=2.0)"
    for wrong, message in {
        "their_methods:shifter": r"method\.name is 'their_methods:shifter': .*shifter",
        "their_method:shifted": "finds no module 'their_method'",
        "their_methods:THEIRS": "no attribute|no function",
        "their_methods:lj": "no function",
    }.items():
        with pytest.raises(InputError, match=message):
            resolve({"model": {"source": "x"}, "method": {"name": wrong}})
    with pytest.raises(InputError, match=r"nearest: .method\.size."):
        resolve({"model": {"source": "x"}, "method": {**options, "sizes": 1}})
    with pytest.raises(InputError, match=r"gives 3, and no lora_jax\.Method"):
        make_rules(resolve({"model": {"source": "x"}, "method": {"name": "their_methods:nothing"}}))


def test_flat_keys_of_a_config():
    assert "train.batch" in flat_keys(quickstart.get_config())
