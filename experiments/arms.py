"""Several runs of one config that differ in a few settings, and a table of what they scored.

`config.arms` lists (name, changes) pairs, the changes by dotted key; a mapping will do, too:

    config.arms = (
        ("probe", {"targets": "none"}),
        ("full", {"method.name": "full", "targets": ".*", "train.learning_rate": 1e-4}),
    )
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.choices import check_choice
from experiments.pictures import bars
from experiments.run import Result, Shared, check, finetune
from experiments.run_folder import staged
from experiments.settings import in_config, plain, resolve, set_key
from experiments.tasks.task import Score
from lora_jax.errors import InputError
from lora_jax.evaluate import Accuracy

HEAD = ("arm", "trained parameters", "before", "after (95 % interval)", "seconds")


@dataclass(frozen=True)
class Row:
    """An arm and what came of it: a result, or why there is none."""

    arm: str
    result: Result | None
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the arm was trained to its end."""
        return self.result is not None and self.result.outcome.stopped is None

    def record(self) -> dict[str, Any]:
        """The row for arms.json."""
        if self.result is None:
            return {"arm": self.arm, "error": self.error}
        before, after, outcome, parameters, seconds = self.result
        return {
            "arm": self.arm,
            "parameters": parameters,
            "before": before.record(),
            "after": after and after.record(),
            "steps": outcome.step,
            "stopped": outcome.stopped,
            "seconds": round(seconds, 1),
        }

    def cells(self) -> tuple[str, ...]:
        """The row for the table."""
        if self.result is None:
            return (self.arm, "-", "-", f"failed: {self.error}", "-")
        before, after, outcome, parameters, seconds = self.result
        words = _with_interval(after.score) if after else "-"
        if outcome.stopped:
            words += f"; stopped: {outcome.stopped}"
        return (self.arm, f"{parameters:,}", _number(before.score), words, f"{seconds:.0f}")


def run_arms(config: Mapping[str, Any], workdir: str | Path) -> int:
    """Run every arm into `workdir`/ARM; write arms.md, arms.json, arms.png; print the table.

    Mistakes in any arm's settings are found before the first one starts. An arm that fails later
    says so in the table, and the others go on. Returns 0, 1 where an arm failed or was lost, 130
    after Ctrl-C.
    """
    arms, rows, shared = configs_of(config), [], Shared()
    for name, settings in arms.items():
        print(f"\n== arm {name} ==", flush=True)
        rows.append(_run(name, settings, Path(workdir) / name, shared))
        _write(Path(workdir), rows)
        if rows[-1].result and rows[-1].result.outcome.interrupted:
            break
    print(f"\n{table(rows)}\nwritten to {workdir}")
    if len(rows) < len(arms) or (rows[-1].result and rows[-1].result.outcome.interrupted):
        return 130
    return 0 if all(row.complete for row in rows) else 1


def has_arms(config: Mapping[str, Any]) -> bool:
    """Whether a config lists several runs and chooses none of them."""
    return bool(config.get("arms")) and not config.get("arm")


def one_arm(config: Mapping[str, Any], workdir: Path) -> tuple[dict[str, Any], Path]:
    """The config of the arm that `config.arm` chooses, and its folder; without one, as given."""
    name = config.get("arm")
    if not name:
        return {key: value for key, value in config.items() if key not in ("arms", "arm")}, workdir
    arms = configs_of(config)
    check_choice("arm", name, arms)
    return arms[name], workdir / name


def configs_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The whole config of every arm, checked; InputError names the arm.

    >>> arms = configs_of({"seed": 1, "train": {"steps": 9}, "arms": [("a", {"train.batch": 4})]})
    >>> arms["a"]
    {'seed': 1, 'train': {'steps': 9, 'batch': 4}}
    """
    common = {key: value for key, value in config.items() if key not in ("arms", "arm")}
    found: dict[str, dict[str, Any]] = {}
    for name, changes in _pairs(config.get("arms")):
        if not re.fullmatch(r"\w[\w. +-]*", name) or name in found:
            raise InputError(
                f"config.arms: '{name}' is no name for a folder of its own; give each arm a "
                "different one of letters, digits, spaces and . _ + -"
            )
        with in_config(f"arms, '{name}': "):
            found[name] = _changed(common, dict(_flat(changes)))
            check(resolve(found[name]))
    return found


def table(rows: list[Row]) -> str:
    """The arms as a Markdown table, in columns."""
    cells = [HEAD, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (*cells[:1], tuple("-" * width for width in widths), *cells[1:])
    ]
    names = {row.result.before.score.name for row in rows if row.result}
    title = f"{', '.join(sorted(names)) or 'no score'}:"
    return "\n".join([title, "", *(f"| {line} |" for line in lines)])


def _run(name: str, config: Mapping[str, Any], workdir: Path, shared: Shared) -> Row:
    """Run one arm; what goes wrong is told at once and kept for the table."""
    try:
        result = finetune(config, workdir, shared)
        # The trained values are saved; kept here, those of all arms would add up.
        return Row(
            name, result._replace(outcome=result.outcome._replace(trained=None, frozen=None))
        )
    except (InputError, OSError) as error:
        print(f"error: arm {name}: {error}", file=sys.stderr, flush=True)
        return Row(name, None, " ".join(str(error).replace("|", "/").split()))
    except Exception as error:  # a fault of ours, or no memory: the other arms go on
        traceback.print_exc()
        return Row(name, None, repr(error).splitlines()[0][:200])


def _write(workdir: Path, rows: list[Row]) -> None:
    with staged(workdir) as stage:
        text = json.dumps([row.record() for row in rows], indent=2) + "\n"
        (stage / "arms.json").write_text(text, encoding="utf-8")
        (stage / "arms.md").write_text(table(rows) + "\n", encoding="utf-8")
        scores = [
            (row.arm, row.result.before.score, row.result.after.score)
            for row in rows
            if row.result and row.result.after
        ]
        if scores:
            bars(stage / "arms.png", scores)


def _pairs(arms: Any) -> list[tuple[str, Mapping[str, Any]]]:
    given = list(plain(arms).items()) if isinstance(arms, Mapping) else arms or ()
    for pair in given if isinstance(given, list | tuple) else (given,):
        match pair:
            case (str(), Mapping()):
                continue
        raise InputError(f"config.arms: {pair!r} is no (name, changes) pair; give a list of them")
    return list(given)


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The changes by dotted key, whether they were given so or nested."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and key != "targets":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with these dotted keys set."""
    made = {k: _changed(v, {}) if isinstance(v, Mapping) else v for k, v in config.items()}
    for key, value in changes.items():
        set_key(made, key, value)
    return made


def _number(score: Score, value: float | None = None) -> str:
    value = score.value if value is None else value
    return f"{100 * value:.1f} %" if isinstance(score, Accuracy) else f"{value:.4g}"


def _with_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return _number(score)
    return f"{_number(score)} ({_number(score, score.low)} to {_number(score, score.high)})"
