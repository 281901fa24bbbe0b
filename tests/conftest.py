"""Strict settings for the whole suite: eight CPU devices, no silent rank promotion.

Programs are compiled with few optimisations, which takes less than half the time; what depends on
them asks for all, by `compiled_as_users_do`.
"""

import os
from importlib import metadata

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 12):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def key():
    return jax.random.key(0)
