"""Small models in every style, which the laws run over. Nearly all dimensions differ."""

from cases import (
    control,
    convolutions,
    equinox_models,
    experts,
    haiku_models,
    layouts,
    linen_models,
    meshes,
    nnx_models,
    plain,
    products,
    rules,
)
from cases.case import Case, Draw
from cases.plain import mlp, tied

PARTS = (
    plain,
    products,
    convolutions,
    layouts,
    control,
    rules,
    meshes,
    experts,
    nnx_models,
    linen_models,
    equinox_models,
    haiku_models,
)
CASES = [case for part in PARTS for case in part.CASES]

__all__ = ["CASES", "Case", "Draw", "mlp", "tied"]
