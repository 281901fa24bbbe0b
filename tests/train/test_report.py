"""What people and programs are told about a run."""

import io
import json

import pytest

from lora_jax.train import Progress
from lora_jax.train.memory import peak_memory
from lora_jax.train.report import json_lines, live_line, loss_picture

PROGRESS = [Progress(n, 3, 1.0 / n, 1e-3, 0.5, 100.0, None, 3.0 - n) for n in (1, 2, 3)]


def test_plain_lines_away_from_a_terminal():
    stream = io.StringIO()
    with live_line(stream, every=1e9) as observe:
        for progress in PROGRESS:
            observe(progress)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3"]


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with live_line(stream) as observe:
        for progress in PROGRESS:
            observe(progress)
    assert "step 3/3" in stream.getvalue()


def test_json_lines(tmp_path):
    observe = json_lines(tmp_path / "metrics.jsonl")
    for progress in PROGRESS:
        observe(progress)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["loss"] == 0.5


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    assert loss_picture(tmp_path / "loss.png", [2.0, 1.0, 1.5])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_known_here():
    peak = peak_memory()
    assert peak is None or 0.01 < peak < 1e4
