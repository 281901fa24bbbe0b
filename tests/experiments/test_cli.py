"""Exit codes and messages of a real command line, one process each."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cli
from experiments.cli import guarded
from experiments.settings import known_keys
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
        (["--config.method.rank=x"], "error: config.method.rank is 'x'; expected int"),
        (["--wrkdir=x"], "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["--config.method.rank=0", "--workdir=out"], "error: config.method: lora(rank=0): "),
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
        ("def get_config():\n    config = {}", "returns no ConfigDict"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_config_file_that_does_not_work_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"mine\.py' does not work: .*{message}"):
        cli._config_of(str(path))


def test_errors_of_the_disk_say_what_to_do(capsys):
    def full():
        raise OSError(28, "No space left on device", "runs/x")

    assert cli.guarded(full) == 2
    assert "the disk is full at 'runs/x'; free space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps=2.5"], r"config\.train\.steps is 2\.5; expected int"),
        (["train.clip=high"], r"config\.train\.clip is 'high'; expected float"),
        (["data.truncate=maybe"], r"config\.data\.truncate is 'maybe'; expected bool"),
        (["train=3"], r"config\.train is 3; expected a group of keys"),
        (["train.steps.x=3"], r"unknown key 'train\.steps\.x' in"),
        (["sead=1"], r"unknown key 'sead' in .*nearest: 'seed'"),
    ],
)
def test_a_wrong_value_on_the_command_line_names_the_key(words, message, overridden):
    with pytest.raises(InputError, match=message):
        overridden(*words)


@pytest.fixture
def overridden(tmp_path, monkeypatch):
    """A short config file, with keys of the command line laid over it."""
    path = tmp_path / "short.py"
    lines = ["def get_config():", "    return {'model': {'source': 'x'}, 'targets': ('a', 'b')}"]
    path.write_text("\n".join(lines))

    def read(*words):
        argv = cli._overrides(["program", *(f"--config.{word}" for word in words)])
        given = [word.removeprefix("--override=") for word in argv[1:]]
        options = SimpleNamespace(config=str(path), override=given)
        monkeypatch.setattr(cli.flags, "FLAGS", options)
        return cli.read_config(known_keys)

    return read


def test_keys_of_the_command_line_have_the_types_of_the_settings(overridden):
    words = ["train.clip=2", "model.name=7", "data.truncate", "train.learning_rate=1e-4"]
    config = overridden(*words, "targets=all_linear", "method.alpha=16")
    assert config["train"] == {"clip": 2.0, "learning_rate": 1e-4}
    assert config["model"] == {"source": "x", "name": "7"}
    assert config["data"] == {"truncate": True}
    assert config["targets"] == "all_linear" and config["method"] == {"alpha": 16.0}
    assert overridden("targets=('c',)")["targets"] == ("c",)


def test_no_before_a_key_makes_it_false():
    assert cli._overrides(["p", "--noconfig.data.end"]) == ["p", "--override=data.end=False"]


def test_the_tasks_own_keys_may_come_before_its_name(overridden, tiny):
    config = overridden("data.points=5", "task=tiny")
    assert config["data"] == {"points": 5} and config["task"] == "tiny"
