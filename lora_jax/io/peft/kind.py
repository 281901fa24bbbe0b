"""What one peft_type of PEFT is: a record of its options, its tensors, and our methods for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.peft.match import Config, pattern_value
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method

Tensors = Mapping[str, np.ndarray]
Methods = Mapping[str, Method]
Modules = Mapping[str, Module]

LINEAR = ("linear", "head")


@dataclass(frozen=True)
class Part:
    """One array of ours as one tensor of PEFT's: reshaped to `split`, turned by `axes`, reshaped.

    `ours` and `theirs` are the two shapes; `end` is what follows the module's name in the key.

    >>> turned("lora_A.weight", "a", (3, 2)).to_theirs(np.ones((3, 2))).shape
    (2, 3)
    """

    end: str
    name: str
    ours: Shape
    split: Shape
    axes: Shape
    theirs: Shape

    def to_theirs(self, array: Any) -> np.ndarray:
        """PEFT's tensor, in float32."""
        moved = np.asarray(array).reshape(self.split).transpose(self.axes)
        return np.ascontiguousarray(moved.reshape(self.theirs), dtype=np.float32)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our array, in float32."""
        moved = tensor.reshape([self.split[i] for i in self.axes])
        moved = moved.transpose(np.argsort(self.axes))
        return np.ascontiguousarray(moved.reshape(self.ours), dtype=np.float32)


def turned(end: str, name: str, ours: Shape) -> Part:
    """A matrix that stands transposed in PEFT's file."""
    return Part(end, name, ours, ours, (1, 0), ours[::-1])


def alike(end: str, name: str, ours: Shape, theirs: Shape | None = None) -> Part:
    """An array whose numbers have the same order in PEFT's file."""
    return Part(end, name, ours, ours, tuple(range(len(ours))), theirs or ours)


@dataclass(frozen=True)
class Field:
    """An option of adapter_config.json that is an argument of our factory.

    `pattern` is the option with other values for single modules. `number` is "count" for a positive
    integer, "positive" for a positive number. `loose` options matter in training alone: where
    modules differ in them, the largest value is written.
    """

    option: str
    hyper: str
    default: Any
    pattern: str = ""
    number: str = ""
    loose: bool = False

    def value(self, config: Config, module: str) -> Any:
        """The option's value for a module, as our argument."""
        default = config.get(self.option, self.default)
        value = (
            pattern_value(config.get(self.pattern), module, default) if self.pattern else default
        )
        value = self.default if value is None else value
        return float(value) if isinstance(self.default, float) else value


def _nothing(*_: Any) -> Any:
    return {}


def _no_check(config: Config, place: str) -> None:
    """Nothing beyond the options."""


def _as_read(config: Config, tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    return tensors


def _as_held(tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    return tensors


def _any(method: Method) -> bool:
    return True


# Arguments of our factories that do not change what the arrays mean.
_TRAINING = {
    *("dropout", "init", "freeze_a", "active_experts", "share", "detach_norm", "d_initial"),
    *("seed", "projection", "zero", "bank_bound", "logits_std", "strict", "bases"),
    *("rank_dropout", "rank_dropout_scale", "module_dropout"),
}


@dataclass(frozen=True)
class Kind:
    """One peft_type: which options it reads, which method they mean, how its tensors are ours.

    * `factories` are ours by the names of their methods, the first one the usual; `holds` tells a
      method of those names that PEFT's format has no place for.
    * `fields` are options that are arguments of ours. `free` options are read by `make` or have no
      effect on what is loaded, `limits` are the values that others may have, `lacks` options that
      PEFT has for other types. `check(config, place)` raises InputError for the rest.
    * `make(config, module, shape, hyper)` gives the method of a module, None for none.
    * `parts(module, method)` are the tensors of a module, `shared(modules, methods)` those that
      stand in the file once, with whole keys. `read` and `held` turn the file's tensors into those
      of the parts, and back.
    * `write(methods, config, tensors)` gives further options; `meaning(method)` what must agree for
      the same arrays to mean the same.
    * `kinds` are the modules that may have it. `whole` stands before the names of a targeted
      module's own tensors, where the type trains those.
    """

    peft_type: str
    factories: Mapping[str, Callable[..., Method]]
    fields: tuple[Field, ...]
    parts: Callable[[Module, Method], Sequence[Part]]
    free: tuple[str, ...] = ()
    limits: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    check: Callable[[Config, str], None] = _no_check
    make: Callable[[Config, str, Shape, dict[str, Any]], Method | None] | None = None
    shared: Callable[[Modules, Methods], Sequence[Part]] = _nothing
    read: Callable[[Config, Tensors, Modules, Methods], Tensors] = _as_read
    held: Callable[[Tensors, Modules, Methods], Tensors] = _as_held
    write: Callable[[Methods, Config, Tensors], Config] = _nothing
    holds: Callable[[Method], bool] = _any
    meaning: Callable[[Method], Mapping[str, Any]] | None = None
    kinds: tuple[str, ...] = LINEAR
    whole: str = ""
    lacks: tuple[str, ...] = ()

    def method(self, config: Config, module: str, shape: Shape) -> Method | None:
        """The method that a checked config means for a module of this kernel shape."""
        hyper = {option.hyper: option.value(config, module) for option in self.fields}
        if self.make:
            return self.make(config, module, shape, hyper)
        return next(iter(self.factories.values()))(**hyper)

    def means(self, method: Method) -> Mapping[str, Any]:
        """What the method's arrays mean the same function under."""
        if self.meaning:
            return self.meaning(method)
        return {name: value for name, value in method.hyper.items() if name not in _TRAINING}


def uniform(kind: str, option: str, values: Mapping[str, Any]) -> Any:
    """The one value of an option that PEFT has once for all modules; InputError where they differ.

    >>> uniform("VERA", "r", {"q": 4, "v": 4})
    4
    """
    first, *rest = values
    if other := next((name for name in rest if values[name] != values[first]), None):
        raise InputError(
            f"PEFT's {kind} has one {option} for all modules; here {first!r} has {values[first]!r} "
            f"and {other!r} has {values[other]!r}; give them the same, or save_adapter"
        )
    return values[first]
