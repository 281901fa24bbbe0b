"""The tasks by name, each a module that is imported when a config chooses it: `config.task`.

To add one, write a module here and its name into `TASKS`. The module has

* `Data`: a frozen dataclass of what `config.data` may set, every field with a default (its type is
  that of the default; other types and unknown keys are refused with the nearest named).
  `__post_init__` checks values: `check_positive`, or an InputError that names `config.data.KEY`;
* `make(settings) -> Task`: reads `settings.data` (that Data), `settings.model`, `settings.prompt`,
  `settings.seed`, `settings.train.batch` and `settings.evaluate` alone: runs that differ elsewhere
  share one Task;
* if it wants other keys than `config.model.source`, a dataclass `ModelSettings` in the same way; an
  empty `source` stands for the task's own default. `language.py` has that of language models.

`task.py` has the interface, and pieces: `compiled`, `draw_rows`, `check_positive`; `virtual.py` has
those of models with virtual tokens. A task that trains fresh parameters (a head) puts them into
`params` and names them in `fresh`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.settings import Settings
    from experiments.tasks.task import Task


@dataclass(frozen=True)
class ModelSettings:
    """What `config.model` may set where a task asks for nothing else."""

    source: str = ""
    """Where the base lies; empty for the task's own."""


@dataclass(frozen=True)
class Entry:
    """A task by name, whose module is imported when it is first asked for anything."""

    name: str

    @property
    def settings(self) -> Callable[..., Any]:
        """The dataclass of `config.data`."""
        return self._module.Data

    @property
    def model(self) -> Callable[..., Any]:
        """The dataclass of `config.model`."""
        return getattr(self._module, "ModelSettings", ModelSettings)

    def __call__(self, settings: "Settings") -> "Task":
        """Load the base and the data."""
        return self._module.make(settings)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"experiments.tasks.{self.name}")


TASKS: dict[str, Entry] = {
    name: Entry(name) for name in ("answers", "sentences", "images", "sequences", "ratings", "text")
}
