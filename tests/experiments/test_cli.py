"""Exit codes and messages of a real command line, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli
from experiments.cli import guarded
from lora_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def command(*words, cwd, module="experiments.finetune"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config.method.rnk=4"],
            "error: unknown key 'method.rnk' in '{}'; nearest: 'method.rank'",
        ),
        (["--config.method.rank=x"], "error: flag --config.method.rank=x: invalid literal"),
        (["--wrkdir=x"], "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["--config.method.rank=0", "--workdir=out"], "error: lora(rank=0): "),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, words, message):
    path = ROOT / "configs" / "quickstart.py"
    done = command(f"--config={path}", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message.format(path))
    assert len(done.stderr.splitlines()) <= 3
    assert not any(entry.name != "cache" for entry in tmp_path.iterdir())


def test_a_missing_config_file(tmp_path):
    done = command("--config=nowhere.py", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: no config file 'nowhere.py'; give one such as configs/quickstart.py\n"
    )


@pytest.mark.parametrize("error", [InputError("no"), FileNotFoundError("no"), OSError(28, "full")])
def test_a_users_mistake_is_one_message_and_two(error, capsys):
    def fail():
        raise error

    assert guarded(fail) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_of_main(result, status):
    assert guarded(lambda: result) == status


def test_ctrl_c():
    def stop():
        raise KeyboardInterrupt

    assert guarded(stop) == 130


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "it defines no get_config"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_config_file_that_does_not_work_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"mine\.py' does not work: .*{message}"):
        cli._config_of(str(path))


@pytest.mark.parametrize("words", [["--config="], ["--config"], ["--config", "--config.seed=1"]])
def test_a_config_flag_without_a_file_is_said(words):
    with pytest.raises(InputError, match="no config file"):
        cli._config_path(words)


def test_errors_of_the_disk_say_what_to_do(capsys):
    def full():
        raise OSError(28, "No space left on device", "runs/x")

    assert cli.guarded(full) == 2
    assert "the disk is full at 'runs/x'; free space" in capsys.readouterr().err
