"""What differs between JAX versions, and what a jaxpr tells only by convention."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend import core as jex

_OURS = (sysconfig.get_paths()["purelib"], str(Path(__file__).parent), "<frozen")


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
