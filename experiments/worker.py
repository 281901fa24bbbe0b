"""A process that runs one training step each time it is asked to, for benchmarks side by side."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import cli
from lora_jax.errors import InputError


class Worker:
    """A step made ready in a process of its own, which takes turns with others."""

    def __init__(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, options
        self.seconds: list[float] = []
        command = [sys.executable, "-m", "experiments.bench_workers", name, str(folder)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"} | cli.HUGE_PAGES
        self.process = subprocess.Popen(
            [*command, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )
        self.facts = self._read()

    def step(self) -> None:
        """Run a step that is not counted, then one whose time is kept.

        The first brings back what the machine took away while others had their turn.
        """
        self._ask("step")
        self.seconds.append(self._ask("step")["seconds"])

    def end(self) -> dict[str, Any]:
        """Stop the process and return what it measured."""
        peaks = self._ask("end")
        self.process.wait()
        seconds, flops = statistics.median(self.seconds), self.facts["flops"]
        return {
            "name": self.name,
            "seconds": seconds,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "all": self.seconds,
            "tokens_per_second": self.options["batch"] * self.options["time"] / seconds,
            "peak_gb": peaks["peak_gb"],
            "steps_gb": peaks["steps_gb"],
            "flops_per_second": flops / seconds if flops else None,
            **self.facts,
        }

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        raise InputError(f"the worker '{self.name}' ended early; its messages are above")


def has_peft() -> bool:
    """Whether the peer can be measured here."""
    return all(importlib.util.find_spec(name) for name in ("peft", "torch", "transformers"))
