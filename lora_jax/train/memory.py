"""The most memory the process has held so far."""

import sys

import jax

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None


def peak_memory() -> float | None:
    """Return the peak in GB: of the accelerator, or on CPU of the whole process; None: unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
