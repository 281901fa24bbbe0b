"""Time one training step here, in peft and for the frozen base alone, taking turns in one run.

python -m experiments.bench_step --config=configs/bench_step.py
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.worker import Worker, has_peft
from lora_jax.io.export import save_hf
from lora_jax.models import load


def bench(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Run every worker in turn, `rounds` times, and return one record each."""
    peers = [name for name in options["peers"] if name != "peft" or has_peft()]
    model = load(options["source"])
    peer = {"config": "LoraConfig", "r": options["method"]["rank"]}
    peer |= {"lora_alpha": options["method"]["alpha"]}
    peer |= {"use_dora": options["method"]["name"] == "dora"}
    options = options | {"vocabulary": model.config.vocab_size, "peft": peer}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        save_hf(folder, model.params, model.config, model.tokenizer)
        del model
        workers = [Worker(name, folder, options) for name in ("product", *peers)]
        for _ in range(options["rounds"]):
            for worker in workers:
                worker.step()
    return [worker.end() for worker in workers]


def show(records: list[dict[str, Any]]) -> Table:
    """Return the measurements as a table."""
    best = next(r["flops_per_second"] for r in records if r["name"] == "product")
    table = Table(title="one training step")
    for head in ("", "step, s", "(min - max)", "tokens/s", "peak, GB", "TFLOP", "of peak"):
        table.add_column(head, justify="right" if head else "left")
    for r in records:
        if r["name"] == "product":
            continue
        flops, rate = r["flops"], r["flops_per_second"]
        table.add_row(
            r["name"],
            f"{r['seconds']:.2f}",
            f"{r['fastest']:.2f} - {r['slowest']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['peak_gb']:.2f}",
            f"{flops / 1e12:.2f}" if flops else "-",
            f"{rate / best:.0%}" if rate else "-",
        )
    table.caption = f"peak: a {best / 1e9:.0f} GFLOP/s float32 product, measured in the same run"
    return table


def ratios(records: list[dict[str, Any]]) -> list[str]:
    """Return how we stand to the floor and to peft, by pairs of steps of one round."""
    by_name = {r["name"]: r for r in records}
    ours, lines = by_name.get("lora_jax"), []
    if ours and (floor := by_name.get("floor")):
        over = statistics.median(np.divide(ours["all"], floor["all"]))
        lines.append(f"{over - 1:+.1%} over the frozen base's own forward and backward")
    if ours and (peer := by_name.get("peft")):
        faster = statistics.median(np.divide(peer["all"], ours["all"]))
        smaller = ours["peak_gb"] / peer["peak_gb"]
        lines.append(f"{faster:.2f} x peft's tokens/s, {smaller:.2f} x its peak memory")
        lines.append(
            f"loss of the first step: {ours['first_loss']:.5f}, peft's {peer['first_loss']:.5f}"
        )
    return lines


def define_flags() -> None:
    """Define --config and --out."""
    cli.define_config("configs/bench_step.py")
    flags.DEFINE_string("out", "runs/bench_step.json", "Where the measurements go.")


def main() -> None:
    """Run the config of the command line."""
    options = cli.read_config()
    if not has_peft():
        print("peft is not installed, so it is left out: pip install 'lora-jax[parity]'")
    records = bench(options)
    console = Console()
    console.print(show(records))
    for line in ratios(records):
        console.print(line)
    out = Path(flags.FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"options": options, "records": records}, indent=2) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
