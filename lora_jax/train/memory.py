"""The most memory the process has held so far."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import jax

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> float | None:
    """Return the peak in GB: of the accelerator, or on CPU of the whole process; None: unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return process_peak()


def process_peak() -> float | None:
    """Return the most main memory that this program has held, in GB.

    Linux's own file is asked first: the older call also counts the process that started this one.

    >>> process_peak() > 0
    True
    """
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def restart_peak() -> None:
    """Let `process_peak` count from now on, where the system can (Linux).

    What the program has freed goes back to the system first.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # the C library keeps it otherwise
        _CLEAR.write_text("5")  # 5: the peak of resident memory (man 5 proc)
