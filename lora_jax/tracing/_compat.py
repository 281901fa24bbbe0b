"""What differs between JAX versions, and what a jaxpr tells only by convention."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend import core as jex
from jax.extend import source_info_util


def _folder(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return [str(Path(spec.origin).parent) + "/"] if spec and spec.origin else []


_FRAMEWORKS = ("jax", "jaxlib", "flax", "equinox", "haiku", "lora_jax")
_OURS = ("<frozen", *(folder for name in _FRAMEWORKS for folder in _folder(name)))
"""Where no line of a user's model lies; a model may well come from a package."""


class Scan(NamedTuple):
    """The parts of a scan equation: how many constants and carries, the body, the options."""

    consts: int
    carry: int
    body: Any
    options: dict[str, Any]


def scan_parts(eqn: Any) -> Scan:
    """The parts of a scan; its counts became trees of arguments (`ft_in`) in jax 0.12."""
    params = eqn.params
    if "ft_in" in params:
        consts, carry = (len(part.vals) for part in params["ft_in"].unpack()[:2])
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    options = {name: params[name] for name in ("reverse", "length", "unroll")}
    return Scan(consts, carry, params["jaxpr"], options)


class ShardMap(NamedTuple):
    """The parts of a shard_map equation: its body, mesh, specs and options."""

    body: Any
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    options: dict[str, Any]


def shard_map_parts(eqn: Any) -> ShardMap:
    """The parts of a shard_map; the name of its manual axes differs between versions."""
    params = eqn.params
    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    options = {"axis_names": set(manual), "check_vma": params["check_vma"]}
    specs = tuple(params["in_specs"]), tuple(params["out_specs"])
    return ShardMap(params["jaxpr"], params["mesh"], *specs, options)


@contextmanager
def at_source(eqn: Any) -> Iterator[None]:
    """What is traced here gets an equation's scope and source line, so profiles stay readable."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
        yield


def run(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """One equation of a jaxpr on values, with the scope and the source line it was traced at."""
    known = {
        var: value
        for var, value in zip(eqn.invars, values, strict=True)
        if not isinstance(var, jex.Literal)
    }
    single = jaxpr.replace(
        constvars=[], invars=list(known), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects
    )
    return jax.core.eval_jaxpr(single, [], *known.values())


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's code that traced an equation, '' when not known."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    for frame in frames:
        if not frame.file_name.startswith(_OURS):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""
