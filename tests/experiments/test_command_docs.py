"""The examples in the commands' docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import experiments
from experiments import tasks

NAMES = [
    f"{package.__name__}.{module.name}"
    for package in (experiments, tasks)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    assert not doctest.testmod(importlib.import_module(name), optionflags=options).failed
