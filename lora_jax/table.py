"""The table that sites print as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_jax import tree
from lora_jax.tree import Rule

if TYPE_CHECKING:
    from lora_jax.sites import Site, Sites

_HEAD = ["path", "operation", "in x out", "stack", "uses", "parameters"]


def sites_table(sites: Sites, rules: Mapping[Rule, Any] | None) -> str:
    """The sites one a line, and the other parameters that rules choose; `Sites.table` says more."""
    rows, head = [_row(site) for site in sites.values()], list(_HEAD)
    if rules is not None:
        head.append("adapted by")
        rows = [[*row, _adapted_by(row[0], sites.get(row[0]), rules)] for row in rows]
        for path, operations in sites.others.items():
            if (by := _adapted_by(path, None, rules)) != "-":
                rows.append([path, *_other(operations), by])
    shown = {row[0] for row in rows}
    return "\n".join([*_lines(head, rows), *_rest(sites, shown)])


def _row(site: Site) -> list[str]:
    sizes = [f"{n} {kind}" for n, kind in zip(site.stack, site.stacks, strict=False)]
    stack = " x ".join(sizes or map(str, site.stack)) or "-"
    operation = "; ".join(site.uses) + (f", {site.role}" if site.role else "")
    if site.others:
        operation += f"; also {', '.join(site.others)}"
    size = math.prod(site.view.shape)
    sides = f"{site.d_in} x {site.d_out}"
    return [site.path, operation, sides, stack, str(site.count), f"{size:,}"]


def _other(operations: tuple[str, ...]) -> list[str]:
    return [f"no kernel: {', '.join(operations) or 'unused'}", "-", "-", "-", "-"]


def _adapted_by(path: str, site: Site | None, rules: Mapping[Rule, Any]) -> str:
    """The method of the first rule that matches, and which rules came too late."""
    matching = [rule for rule in rules if tree.matches(rule, path, site)]
    if not matching or rules[matching[0]] is None:
        return "-"
    chosen = rules[matching[0]]
    late = f" (first of {len(matching)} rules that match)" if len(matching) > 1 else ""
    many = isinstance(chosen, list | tuple)
    return ("a method each layer" if many else str(chosen)) + late


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = (head, ["-" * width for width in widths], *rows)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _rest(sites: Sites, shown: set[str]) -> list[str]:
    rest = [path for path in sites.others if path not in shown]
    if not rest:
        return []
    unread = sum(not sites.others[path] for path in rest)
    noun = "parameter that is no kernel" if len(rest) == 1 else "parameters that are no kernels"
    never = f", {unread} of them never read" if unread else ""
    return [f"and {len(rest)} {noun}{never} (sites.others)"]
