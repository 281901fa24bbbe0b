"""Where an adapter's factors start: random, from the kernel, or from data."""

import re

from lora_jax.errors import InputError
from lora_jax.inits.corda import corda
from lora_jax.inits.eva import eva, eva_rules
from lora_jax.inits.lora_ga import lora_ga
from lora_jax.inits.mica import mica
from lora_jax.inits.olora import olora
from lora_jax.inits.pissa import pissa
from lora_jax.inits.random import gaussian, kaiming, orthogonal
from lora_jax.inits.start import Start, check_rank, remainder

__all__ = [
    "Start",
    "check_rank",
    "corda",
    "eva",
    "eva_rules",
    "gaussian",
    "kaiming",
    "lora_ga",
    "mica",
    "named",
    "olora",
    "orthogonal",
    "pissa",
    "remainder",
]

_STARTS = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "pissa_niter_16": lambda: pissa(16),
    "olora": olora,
    "mica": mica,
    "eva": eva,
    "corda": corda,
    "corda_kpm": lambda: corda(mode="kpm"),
    "lora_ga": lora_ga,
}


def named(init: str | Start, owner: str = "lora") -> Start:
    """The start that a name means; a Start is itself. InputError lists the names.

    `pissa_niter_N` has N rounds of subspace iteration, whatever N.

    >>> named("pissa_niter_4").name, named("lora_ga").wants
    ('pissa_niter_4', 'kernel_gradients')
    """
    if isinstance(init, Start):
        return init
    if isinstance(init, str) and (rounds := re.fullmatch(r"pissa_niter_(\d+)", init)):
        return pissa(int(rounds[1]))
    if not isinstance(init, str) or init not in _STARTS:
        known = ", ".join(map(repr, _STARTS))
        raise InputError(f"{owner}(init={init!r}): unknown init; give one of {known}")
    return _STARTS[init]()
