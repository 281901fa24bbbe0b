"""Compiling with few optimisations: the same arithmetic in a third of the time."""

import jax

_OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False


def quick(function):
    """`jax.jit` for programs that run a few times on tiny arrays."""
    return jax.jit(function, compiler_options=_OPTIONS)
