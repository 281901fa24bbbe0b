"""Size and speed of every method relative to LoRA, and peft's of the same, in one run.

python -m experiments.bench_methods --config=configs/bench_methods.py

For each method: trained numbers, bytes of the saved file, floating-point operations of a step, its
time and the peak memory of its process while it steps. LoRA's step is timed in turns with every
other's, here and in peft, and ratios are medians over pairs of turns, so a slow minute meets both.
"""

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import choices, cli
from experiments.worker import Worker, has_peft
from lora_jax.errors import InputError
from lora_jax.io.export import save_hf
from lora_jax.models import load

COLUMNS = ("trained", "saved", "frozen", "flops", "seconds", "steps_gb")
HEADS = ("method", "trained", "saved, kB", "base, MB", "TFLOP", "step", "memory")
HEADS += ("peft's step", "its memory")


def bench(options: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """Measure every method of the config beside the first; `out` is written after each."""
    rows = _rows(options)
    model = load(options["source"])
    size = model.config.vocab_size
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        save_hf(folder, model.params, model.config, model.tokenizer)
        del model
        for name, row in rows.items():
            common = {**options, "vocabulary": size}
            records.append({"method": name, **_compare(folder, common, rows, row)})
            _write(out, options, records)
            print(f"{name}: done", flush=True)
    return records


def show(records: list[dict[str, Any]]) -> Table:
    """The measurements as a table, times and memory relative to LoRA's in the same library."""
    table = Table(title="a training step, relative to LoRA's")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "method" else "right")
    for record in records:
        ours, peer = record["ours"], record["peft"]
        theirs = ("-", "-") if peer is None else (_times(peer["step"]), _times(peer["memory"]))
        table.add_row(
            record["method"],
            f"{ours['trained']:,}",
            f"{ours['saved'] / 1e3:,.0f}",
            f"{ours['frozen'] / 1e6:,.0f}",
            f"{ours['flops'] / 1e12:.3f}",
            _times(ours["step"]),
            _times(ours["memory"]),
            *theirs,
        )
    return table


def define_flags() -> None:
    """Define --config and --out."""
    cli.define_config("configs/bench_methods.py")
    flags.DEFINE_string("out", "runs/bench_methods.json", "Where the measurements go.")


def main() -> None:
    """Run the config of the command line."""
    options = cli.read_config()
    if not has_peft():
        print("peft is not installed, so it is left out: pip install 'lora-jax[parity]'")
    out = Path(flags.FLAGS.out)
    records = bench(options, out)
    console = Console()
    console.width = max(console.width, 110)  # the table has nine columns
    console.print(show(records))
    console.print(f"written to {out}")


def _rows(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods to measure, the reference first."""
    rows = {row["name"]: row for row in options["rows"]}
    only = options["only"] or tuple(rows)
    for name in only:
        choices.check_choice("only", name, rows)
    for row in rows.values():
        choices.make("method", row["method"])
    if next(iter(rows)) != "lora":
        raise InputError("config.rows begins with 'lora': all others are measured against it")
    return {name: rows[name] for name in ("lora", *(n for n in only if n != "lora"))}


def _compare(
    folder: Path, common: Mapping[str, Any], rows: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any]:
    """A method's step beside LoRA's, here and in peft."""
    peer = row.get("peft") if has_peft() else None
    kinds = ("lora_jax", *(("peft",) if peer else ()))
    pairs = {
        kind: [Worker(kind, folder, {**common, **each}) for each in (rows["lora"], row)]
        for kind in kinds
    }
    for _ in range(common["rounds"]):
        for pair in pairs.values():
            for worker in pair:
                worker.step()
    found = {kind: _relative(*pair) for kind, pair in pairs.items()}
    return {"ours": found["lora_jax"], "peft": found.get("peft")}


def _relative(reference: Worker, worker: Worker) -> dict[str, Any]:
    base, own = reference.end(), worker.end()
    step = statistics.median(np.divide(own["all"], base["all"]))
    memory = own["steps_gb"] / base["steps_gb"]
    facts = {column: own.get(column) for column in COLUMNS}
    return {**facts, "step": step, "memory": memory, "all": own["all"], "lora": base["all"]}


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"


def _write(out: Path, options: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps({"options": dict(options), "records": records}, indent=2) + "\n")
    draft.replace(out)


if __name__ == "__main__":
    cli.run(main, define_flags)
