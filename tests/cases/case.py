"""What a case is, and the operations that its sites are of."""

from lora_jax.testing import Case, Draw

__all__ = ["CONV", "DENSE", "LOOKUP", "RAGGED", "Case", "Draw", "prefixed"]

DENSE, LOOKUP, CONV, RAGGED = ("dense",), ("lookup",), ("conv",), ("ragged",)


def prefixed(prefix, sites):
    """The sites of a part of a model, with the part's path in front."""
    return {f"{prefix}/{path}": seen for path, seen in sites.items()}
