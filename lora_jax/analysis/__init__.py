"""Measurements on adapters and on what was trained."""

from lora_jax.analysis.intrinsic_dimension import D90, Trial, d90

__all__ = ["D90", "Trial", "d90"]
