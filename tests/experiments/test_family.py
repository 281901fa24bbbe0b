"""Every method, start, storage, optimizer and change between steps by config, from run to file."""

import json

import pytest
from tables import slow_but

from experiments import opening
from experiments.run import check as check_run
from experiments.run import finetune
from experiments.settings import resolve
from lora_jax import methods
from lora_jax.errors import InputError

# What a method needs on a model of widths 16 and 24.
OPTIONS = {
    "vblora": {"length": 8, "vectors": 12},
    "fourierft": {"n": 20, "alpha": 15.0},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "adalora": {"rank": 9},
    "houlsby": {"size": 3},
    "intrinsic": {"dimension": 30},
    "miss": {"rank": 4},
    "randlora": {"alpha": 4.0},
}
SKIPPED = {"tied", "fixed", "ia3_bias", "ia3_rules"}  # these stand beside others
RUNS = {
    "lora_plus": {"train.optimizer": "lora_plus", "train.ratio": 4.0},
    "lora_fa": {"train.optimizer": "lora_fa", "method.freeze_a": True},
    "on_host": {"train.on_host": True},
    "adalora": {"method.name": "adalora", "method.rank": 3, "dynamics.target_rank": 2},
    "delta_lora": {"method.name": "delta_lora", "dynamics.start": 1},
    "relora": {"dynamics.name": "relora", "dynamics.every": 2, "dynamics.warmup": 1},
    "lora_drop": {"dynamics.name": "lora_drop", "dynamics.threshold": 0.4},
    "qlora": {"quantize.name": "nf4"},
    "qdora": {"quantize.name": "nf4", "quantize.double": False, "method.name": "dora"},
    "int8": {"quantize.name": "int8"},
    "prompt": {"prompt.name": "prompt_tuning", "prompt.length": 3},
    "prompt alone": {"prompt.name": "p_tuning", "prompt.length": 3, "targets": "none"},
    "prefix": {"prompt.name": "prefix_tuning", "prompt.length": 2},
    **{f"init {name}": {"method.init": name} for name in ("pissa", "eva", "corda", "lora_ga")},
}
USUAL = ("adalora", "lora_drop", "qlora", "prompt", "init eva")


def keys(changes):
    return {key.replace(".", "__"): value for key, value in changes.items()}


def run(config, folder, **changes):
    given = {"targets": r"layers/.*/(q_proj|down_proj)/kernel", "method.rank": 2, **changes}
    return finetune(config(**keys({"train.steps": 4, "train.batch": 2, **given})), folder)


def check(result, folder):
    assert result.outcome.stopped is None and result.outcome.step == 4
    assert result.parameters > 0
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    error = lines[-1]["merge_error"]
    assert error is None or error < 1e-3
    opened = opening.open_adapter(folder / "adapter")
    assert opened.trained


@pytest.mark.parametrize("name", slow_but(RUNS, USUAL))
def test_a_run_by_config(name, config, tmp_path):
    check(run(config, tmp_path / "run", **RUNS[name]), tmp_path / "run")


METHODS = [name for name in methods.__all__ if name not in SKIPPED]


@pytest.mark.parametrize("name", slow_but(METHODS, ("vera",)))
def test_every_method_by_config(name, config, tmp_path):
    options = {f"method.{key}": value for key, value in OPTIONS.get(name, {}).items()}
    result = run(config, tmp_path / "run", **{"method.name": name, "method.rank": 2, **options})
    check(result, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.name": "delta_lora", "method.dropout": 0.1}, "dropout"),
        ({"quantize.name": "nf4", "method.init": "lora_ga"}, "quantized"),
        ({"quantize.name": "nf4", "quantize.block": 48}, "block"),
        ({"method.name": "adalora", "method.rank": 3, "dynamics.target_rank": 5}, "target"),
        ({"method.name": "adalora", "dynamics.start": 3, "dynamics.end": 2}, "start"),
        ({"dynamics.name": "relora", "dynamics.every": 0}, "every"),
        ({"dynamics.name": "adalora"}, "adalora"),
        ({"train.optimizer": "lora_plus", "train.ratio": 0.0}, "ratio"),
        ({"prompt.name": "prompt_tuning", "prompt.length": -1}, "length"),
        ({"prompt.name": "prompt_tuning", "prompt.length": 30}, "room for 10 tokens"),
        ({"train.optimizer": "adam"}, "nearest: 'adamw'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message, config, tmp_path):
    with pytest.raises(InputError, match=message):
        run(config, tmp_path / "run", **changes)


def test_a_task_without_text_or_images_has_no_virtual_tokens():
    settings = resolve({"task": "sequences", "prompt": {"name": "prefix_tuning"}})
    with pytest.raises(InputError, match="'sequences' reads neither"):
        check_run(settings)
