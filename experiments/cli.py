"""What every command line shares: flags, one line for a user's mistake, and the compile cache."""

import ast
import errno
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from experiments.settings import check_type, flat_keys, plain, set_key, unknown_key
from lora_jax.errors import InputError

flags.disclaim_key_flags()  # --help lists what is defined here under the command that asks for it

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run(main: Callable[[], int | None], define: Callable[[], None] | None = None) -> None:
    """Parse the flags, call `main` and exit: 0, its own status, or 2 after a user's mistake.

    `define` defines the flags: all commands share one table of them, so a module that is only
    imported must define none.
    """
    use_huge_pages()
    if define is not None:
        define()

    def start(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # jax reports at INFO which accelerators it misses
        cache_compilations()
        sys.exit(guarded(main))

    app.run(start, flags_parser=_parse)


def guarded(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit status.

    InputError and OSError become one message and 2; Ctrl-C, where nothing keeps what was done so
    far, becomes 130.
    """
    try:
        return main() or 0
    except (InputError, OSError) as error:
        message = _explained(error) if isinstance(error, OSError) else error
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr, flush=True)
        return 130


def _explained(error: OSError) -> str:
    """Say what an error of the file system means and what to do about it."""
    at = f" at '{error.filename}'" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{at}; free space or give another folder. What was there is whole"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"no permission to write{at}; give another folder"
    return str(error)


def define_config(example: str) -> None:
    """Define --config=FILE; `--config.KEY=VALUE` and `--noconfig.KEY` then change one key."""
    flags.DEFINE_string("config", None, f"What to run: {example}; --config.KEY=VALUE changes it.")
    flags.DEFINE_multi_string("override", [], "KEY=VALUE: what --config.KEY=VALUE stands for.")


def read_config(known: Callable[[Any], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Run the config file of the command line and lay the command line's own keys over it.

    `known(config)` gives the keys that there are, with their defaults; without it, those of the
    file. InputError for a file that is not there or does not work, and for an unknown key.
    """
    path = flags.FLAGS.config
    if path is None:
        raise InputError("give a config, such as --config=configs/quickstart.py")
    if not Path(path).is_file():
        raise InputError(f"no config file '{path}'; give one such as configs/quickstart.py")
    config = _config_of(path)
    pairs = [word.partition("=")[::2] for word in flags.FLAGS.override]
    first = lambda key: key != "task" and not key.endswith(".name")  # noqa: E731  (they give keys)
    for key, text in sorted(pairs, key=lambda pair: first(pair[0])):
        defaults = {**flat_keys(config), **(known(config) if known else {})}
        if key not in defaults:
            raise unknown_key(key, defaults, f"'{path}'")
        value = text if isinstance(defaults[key], str) else _literal(text)
        set_key(config, key, check_type(key, value, defaults[key]))
    return config


def config_stem() -> str:
    """Return the name of the config file given on the command line, without its suffix."""
    return Path(flags.FLAGS.config).stem


def use_huge_pages() -> None:
    """On Linux, start again with the allocator asking for huge pages.

    A training step takes and gives back gigabytes of scratch memory; in pages of 4 kB the kernel
    spends a tenth of the step on them. The allocator reads this setting only as a program starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update(HUGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_compilations() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start is quicker."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "lora_jax" / "compiled"))


def _parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; an unknown one is one line and status 2."""
    rest: list[str] = []

    def parse() -> None:
        try:
            rest.extend(flags.FLAGS(_overrides(argv)))
        except flags.Error as error:
            raise InputError(" ".join(str(error).split())) from error
        if len(rest) > 1:
            raise InputError(f"'{rest[1]}' is no flag; settings are given as --name=value")

    if status := guarded(parse):
        sys.exit(status)
    return rest


def _overrides(argv: Sequence[str]) -> list[str]:
    """Write `--config.KEY=VALUE` as `--override=KEY=VALUE`; no value is true, `--no...` false."""
    words = []
    for word in argv:
        found = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", word, re.DOTALL)
        if found:
            negated, key, value = found.groups()
            value = str(not negated) if value is None else value
            word = f"--override={key}={value}"
        words.append(word)
    return words


def _literal(text: str) -> Any:
    """A number, truth or tuple as Python writes it; other text is itself."""
    text = text.capitalize() if text in ("true", "false") else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _config_of(path: str) -> dict[str, Any]:
    """Run a config file, which is the user's own program: whatever it raises is named with it."""
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = plain(get_config()) if get_config else None
    except Exception as error:
        raise InputError(f"the config file '{path}' does not work: {error!r}") from error
    if not isinstance(config, dict):
        fault = "get_config() returns no ConfigDict" if get_config else "it defines no get_config()"
        raise InputError(f"the config file '{path}' does not work: {fault}")
    return config
