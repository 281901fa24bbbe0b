"""Several runs of one config: what is shared, what is written, what is refused."""

import json
import signal

import pytest
from ml_collections import config_dict

from experiments import arms
from experiments import run as running
from experiments.arms import configs_of, one_arm, run_arms
from lora_jax.errors import InputError

ARMS = (
    ("probe", {"targets": "none"}),
    ("lora", {"method.rank": 2, "train.learning_rate": 0.05}),
    ("full", {"method.name": "full", "targets": ".*"}),
)


def config(arms=ARMS, **changes):
    plain = {"task": "tiny", "targets": "body/kernel", "arms": arms}
    return plain | {"train": {"steps": 12, "batch": 8, "learning_rate": 0.02}} | changes


def test_every_arm_is_a_run_and_a_row(tiny, tmp_path, capsys):
    assert run_arms(config(), tmp_path) == 0
    assert len(tiny.LOADED) == 1
    said = capsys.readouterr().out
    text = (tmp_path / "arms.md").read_text()
    assert text.strip() in said
    assert text.splitlines()[0] == "accuracy:"
    assert [line.split("|")[1].strip() for line in text.splitlines()[4:]] == [n for n, _ in ARMS]
    rows = json.loads((tmp_path / "arms.json").read_text())
    assert [row["parameters"] for row in rows] == [14, 14 + 2 * 9, 14 + 18]
    assert len({row["before"]["accuracy"] for row in rows}) == 1
    assert all(row["after"]["low"] < row["after"]["accuracy"] for row in rows)
    for name, _ in ARMS:
        assert (tmp_path / name / "adapter" / "adapter.safetensors").exists()
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["train"]["batch"] == 8


def test_arms_with_other_data_load_again(tiny, tmp_path):
    both = (("few", {"data.points": 20}), ("many", {"data": {"points": 30}}))
    assert run_arms(config(both), tmp_path) == 0
    assert [settings.data.points for settings in tiny.LOADED] == [20, 30]


def test_an_arm_that_fails_is_a_row_and_the_others_go_on(tiny, tmp_path, capsys):
    both = (("bad", {"data.points": 13}), ("wrong", {"targets": "nobody"}), ("good", {}))
    assert run_arms(config(both), tmp_path) == 1
    rows = json.loads((tmp_path / "arms.json").read_text())
    assert "superstition" in rows[0]["error"] and "nobody" in rows[1]["error"]
    assert rows[2]["after"]["examples"] == 40
    assert "failed: config.data.points is 13" in (tmp_path / "arms.md").read_text()
    assert "error: arm bad: config.data.points" in capsys.readouterr().err


def test_a_fault_of_ours_is_a_row_with_its_traceback_on_the_screen(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(running, "adapt", lambda *_: 1 // 0)
    assert run_arms(config((("bad", {}),)), tmp_path) == 1
    assert "ZeroDivisionError" in (tmp_path / "arms.md").read_text()
    assert "Traceback" in capsys.readouterr().err


def test_an_arm_that_diverges_is_not_a_success(tiny, tmp_path):
    wild = (("wild", {"train.learning_rate": 1e30, "train.clip": 0.0}),)
    assert run_arms(config(wild), tmp_path) == 1
    assert "; stopped: the loss" in (tmp_path / "arms.md").read_text()


def test_ctrl_c_ends_all_arms(tiny, tmp_path, monkeypatch):
    plain = running.make_step

    def pressing(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return plain(*args, **kwargs)

    def pressed(step, *args, **kwargs):
        def stepping(*state):
            signal.raise_signal(signal.SIGINT)
            return step(*state)

        return fit(stepping, *args, **kwargs)

    fit = running.fit
    monkeypatch.setattr(running, "fit", pressed)
    assert run_arms(config(), tmp_path) == 130
    assert len(json.loads((tmp_path / "arms.json").read_text())) == 1


def test_one_arm(tiny, tmp_path):
    chosen, workdir = one_arm(config(arm="lora"), tmp_path)
    assert workdir == tmp_path / "lora"
    assert chosen["method"] == {"rank": 2} and "arms" not in chosen
    with pytest.raises(InputError, match=r"config\.arm is 'lorra'.*nearest: 'lora'"):
        one_arm(config(arm="lorra"), tmp_path)
    with pytest.raises(InputError, match=r"config\.arm is 'lora'"):
        one_arm(config(arms=(), arm="lora"), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((("a", {"train.stepz": 3}),), "config.arms, 'a': unknown key 'train.stepz'.*train.steps"),
        ((("a", {"train.warmup": 99}),), "config.arms, 'a': config.train.warmup=99"),
        ((("a", {}), ("a", {})), "'a' is no name for a folder of its own"),
        ((("../a", {}),), "'../a' is no name for a folder"),
        ((("a", 3),), "is no .name, changes. pair"),
        ((3,), "is no .name, changes. pair"),
        (3, "config.arms: 3 is no .name"),
        ((("a", {"method.rank": 0}),), "config.arms, 'a': config.method: lora.rank=0"),
        ((("a", {"targets.x": 0}),), "config.arms, 'a': unknown key 'targets.x'"),
    ],
)
def test_mistakes_in_an_arm_are_found_before_any_starts(tiny, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        run_arms(config(given), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not tiny.LOADED


def test_arms_as_a_config_dict(tiny):
    given = config_dict.ConfigDict(config({"b": {"train": {"steps": 3}}, "a": {}}))
    found = configs_of(given.to_dict())
    assert found["b"]["train"]["steps"] == 3 and found["a"]["train"]["steps"] == 12


def test_perplexities_and_estimates_have_their_own_words():
    from lora_jax.evaluate import Accuracy, Estimate, Likelihood

    assert arms._with_interval(Accuracy.of(89, 100)) == "89.0 % (81.4 % to 93.7 %)"
    assert arms._with_interval(Likelihood(1.0, 5)) == "2.718"
    assert arms._with_interval(Estimate("rmse", 0.91, 0.9, 0.92, 5)) == "0.91 (0.9 to 0.92)"
