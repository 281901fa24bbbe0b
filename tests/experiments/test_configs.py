"""Every config in the repository has keys, types, methods and targets that exist."""

import runpy
from pathlib import Path

import pytest

from experiments.arms import configs_of
from experiments.settings import plain, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("[!_]*.py") if "bench" not in file.stem)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_resolves(name):
    config = plain(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())
    if "arms" in config:
        assert configs_of(config)
    else:
        resolve(config)
