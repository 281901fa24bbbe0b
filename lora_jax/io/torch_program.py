"""The program inside a PyTorch checkpoint, followed as data: nothing it names is ever run.

A pickle is a program for a stack machine that would import and call whatever it names. Here it is
read as text: `pickletools.genops` lists its instructions, and a machine of our own follows the two
dozen that a saved state_dict is made of, over plain data. A name in it is never looked up in
Python; it is one of the few in `_CALLS` and `_DTYPES`, or refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import ml_dtypes
import numpy as np

from lora_jax.errors import InputError

_DTYPES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ComplexFloatStorage": np.dtype(np.complex64),
    "torch ComplexDoubleStorage": np.dtype(np.complex128),
}
_REFUSED = (
    "is none that a state_dict is made of; lora_jax refuses to run code from a checkpoint. "
    "Take the weights as safetensors, or save model.state_dict() alone"
)


@dataclass(frozen=True)
class Storage:
    """`count` numbers that lie in the file under `key`."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Tensor:
    """A strided window on a storage; offset and strides count its numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Machine:
    """A stack, a memo of values to come back to, and the storages met on the way."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)

    @property
    def result(self) -> Any:
        """The top of the stack: at the end, what the program made."""
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        """Takes the topmost `count` values, the lowest first."""
        if count > len(self.stack):
            raise ValueError("an instruction finds too few values")
        at = len(self.stack) - count
        taken, self.stack[at:] = self.stack[at:], []
        return taken

    def pop_to_mark(self) -> list[Any]:
        """Takes what lies above the topmost mark, and the mark."""
        above = self.stack[::-1].index(_MARK)
        return self.pop(above + 1)[1:]


_MARK = object()


def follow(stream: BinaryIO) -> Machine:
    r"""Follows one program to its end and leaves the stream behind it.

    Raises InputError for an instruction or a name that no state_dict has, and one of Python's own
    exceptions (LookupError, TypeError, ValueError) where the program makes no sense.

    >>> import io
    >>> follow(io.BytesIO(b"(K\x03K\x05t.")).result
    (3, 5)
    >>> follow(io.BytesIO(b"cos\nsystem\n."))
    Traceback (most recent call last):
    lora_jax.errors.InputError: global os.system is none that a state_dict is made of; ...
    """
    machine = Machine()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in _STEPS:
            raise InputError(f"instruction {opcode.name} {_REFUSED}")
        _STEPS[opcode.name](machine, argument)
    return machine


Step: TypeAlias = Callable[[Machine, Any], Any]


def _push(make: Callable[[Any], Any]) -> Step:
    return lambda machine, argument: machine.stack.append(make(argument))


def _tuple(count: int) -> Step:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _put(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.result


def _get(machine: Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _extend(machine: Machine, values: list[Any]) -> None:
    machine.result.extend(values)


def _set_items(machine: Machine, flat: list[Any]) -> None:
    machine.result.update(zip(flat[::2], flat[1::2], strict=True))


def _name(text: str) -> str:
    if text not in _CALLS and text not in _DTYPES:
        raise InputError(f"global {text.replace(' ', '.')} {_REFUSED}")
    return text


def _call(machine: Machine, _: Any) -> None:
    name, arguments = machine.pop(2)
    machine.stack.append(_CALLS[name](*arguments))


def _storage(machine: Machine, _: Any) -> None:
    ((kind, dtype, key, _, count, *view),) = machine.pop(1)
    if kind != "storage" or any(part is not None for part in view):
        raise InputError("has storages inside storages; save it again with a newer torch")
    storage = Storage(key, _DTYPES[dtype], count)
    machine.storages[key] = storage
    machine.stack.append(storage)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    return Tensor(storage, offset, shape, strides)


# Every function that a state_dict calls, done on plain data.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
}

_STEPS: dict[str, Step] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"), _push(lambda x: x)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": _push(lambda _: _MARK),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: _extend(machine, machine.pop(1)),
    "APPENDS": lambda machine, _: _extend(machine, machine.pop_to_mark()),
    "SETITEM": lambda machine, _: _set_items(machine, machine.pop(2)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "BUILD": lambda machine, _: machine.pop(1),  # an OrderedDict's attributes: version notes
    "GLOBAL": _push(_name),
    "REDUCE": _call,
    "BINPERSID": _storage,
}
