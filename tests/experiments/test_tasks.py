"""Any task by name: its own settings, its fresh rules, its adapter in our own format."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from experiments.run import finetune as run
from experiments.settings import resolve
from experiments.tasks import TASKS
from experiments.tasks.task import draw_rows
from lora_jax.errors import InputError
from lora_jax.io.native import load_adapter


def tiny_config(**changes):
    plain = {"task": "tiny", "targets": "body/kernel", "method": {"rank": 2, "alpha": 4.0}}
    return plain | {"train": {"steps": 30, "batch": 8, "learning_rate": 0.05}} | changes


def test_a_task_of_another_kind_is_trained_measured_and_saved(tiny, tmp_path, capsys):
    result = run(tiny_config(), tmp_path)
    assert result.parameters == 2 * (3 + 6) + 6 * 2 + 2
    assert result.after.score.share > result.before.score.share
    said = capsys.readouterr().out
    assert "40 points to train" in said and "examples/s" in said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[5]["examples_per_second"] > 0 and "tokens_per_second" not in rows[5]
    assert rows[-1]["merge_error"] < 1e-5
    task = tiny.make(resolve(tiny_config()))
    sites = lj.find_sites(task.apply, task.params, *task.inputs)
    _, trained = load_adapter(tmp_path / "adapter", task.params, sites, base_fingerprint="f" * 64)
    jax.tree.map(np.testing.assert_array_equal, trained, result.outcome.trained)


def test_a_probe_trains_the_head_alone(tiny, tmp_path):
    result = run(tiny_config(targets="none"), tmp_path)
    assert sorted(result.outcome.trained) == ["head/bias", "head/kernel"]


def test_full_fine_tuning_trains_everything(tiny, tmp_path, capsys):
    result = run(tiny_config(targets=".*", method={"name": "full"}), tmp_path)
    assert sorted(result.outcome.trained) == ["body/kernel", "head/bias", "head/kernel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "tinny"}, "config.task is 'tinny', which is not known; nearest: 'tiny'"),
        ({"data": {"point": 3}}, "unknown key 'data.point' in the config; nearest: 'data.points'"),
        ({"data": {"points": "3"}}, "config.data.points is '3'; expected int"),
        ({"data": {"points": 0}}, "config.data.points is 0; give at least 1"),
        ({"data": {"threshold": 0.5}}, "unknown key 'data.threshold'"),
        ({"model": {"remat": "none"}}, "unknown key 'model.remat'"),
    ],
)
def test_a_tasks_own_settings_are_strict(tiny, changes, message):
    with pytest.raises(InputError, match=message):
        resolve(tiny_config(**changes))


def test_a_list_passes_for_a_tuple(tiny):
    assert resolve(tiny_config(data={"kinds": ["a", "b"]})).data.kinds == ("a", "b")


def test_every_task_has_settings_with_defaults():
    for entry in TASKS.values():
        entry.settings(), entry.model()


def test_rows_of_a_step_follow_from_seed_and_step_alone():
    rows = [draw_rows(5, 3, seed=1, step=step).tolist() for step in range(5)]
    flat = [number for row in rows for number in row]
    for epoch in range(3):
        assert sorted(flat[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert draw_rows(5, 3, seed=1, step=4).tolist() == rows[4]


def test_full_fine_tuning_of_a_language_model_opens_merges_and_is_replaced(config, tmp_path):
    from experiments.merge import merge
    from experiments.opening import open_adapter

    result = run(config(method__name="full"), tmp_path / "run")
    opened = open_adapter(tmp_path / "run" / "adapter")
    jax.tree.map(np.testing.assert_array_equal, dict(opened.trained), result.outcome.trained)
    assert merge(opened, tmp_path / "merged") == 0.0
    run(config(), tmp_path / "run")
    names = sorted(file.name for file in (tmp_path / "run" / "adapter").iterdir())
    assert names == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "lora_jax.json")
    ]


def test_drawn_inputs_of_every_type():
    from experiments.measure import merge_error

    def apply(params, x, ids, mask):
        return {"y": (x @ params["w"])[ids] * mask[:, None]}

    inputs = [((4, 3), jnp.float32), ((2,), jnp.int32), ((2,), bool)]
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    params = {"w": jnp.ones((3, 5))}
    sites = lj.find_sites(apply, params, *inputs)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": lj.lora(rank=2)}, sites)
    assert merge_error(apply, frozen, trained, params, inputs) == 0.0
