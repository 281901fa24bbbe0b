"""What every command line shares: flags, one line for a user's mistake, and the compile cache."""

import errno
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.settings import flat_keys, unknown_key
from lora_jax.errors import InputError

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


def config_stem() -> str:
    """Return the name of the config file given on the command line, without its suffix."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


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
    """Parse the flags; an unknown one, or an unknown config key, is one line and status 2."""
    rest: list[str] = []

    def parse() -> None:
        _check_config(argv)
        try:
            rest.extend(flags.FLAGS(argv))
        except flags.Error as error:
            raise InputError(" ".join(str(error).split())) from error
        if len(rest) > 1:
            raise InputError(f"'{rest[1]}' is no flag; settings are given as --name=value")

    if status := guarded(parse):
        sys.exit(status)
    return rest


def _config_path(words: Sequence[str]) -> str:
    """Find the file in --config=FILE or --config FILE, the last of them if there are several."""
    path = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == "config":
            path = value if equals else following
    if not Path(path).is_file():
        raise InputError(f"no config file '{path}'; give one such as configs/quickstart.py")
    return path


def _config_of(path: str) -> Any:
    """Run a config file, which is the user's own program: whatever it raises is named with it."""
    try:
        return runpy.run_path(path)["get_config"]()
    except Exception as error:
        reason = "it defines no get_config()" if isinstance(error, KeyError) else repr(error)
        raise InputError(f"the config file '{path}' does not work: {reason}") from error


def _check_config(argv: Sequence[str]) -> None:
    """Raise InputError for a config file that is not there, or a `--config.key` it does not have.

    The flags' own parser would fail with a traceback.
    """
    words = list(argv[1:])
    settings = [word.lstrip("-").partition("=") for word in words if word.startswith("-")]
    if "config" not in flags.FLAGS or all(name != "config" for name, _, _ in settings):
        return
    path = _config_path(words)
    known = flat_keys(_config_of(path))
    for name, _, _ in settings:
        key = name.removeprefix("config.")
        if key != name and key not in known:
            raise unknown_key(key, known, f"'{path}'")
