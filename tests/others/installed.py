"""What a case of somebody else's package is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from cases.case import Case


@dataclass(frozen=True, eq=False)
class Installed(Case):
    """A case whose model comes from a package, with the kernels that two predicates must choose.

    `attention` and `mlp` are parts of `sites`. `routers` are sites that no rule adapts unasked.
    """

    attention: Mapping[str, tuple] = field(default_factory=dict)
    mlp: Mapping[str, tuple] = field(default_factory=dict)
    routers: frozenset[str] = frozenset()


def installed(name, build, attention, mlp, rest, **options):
    """A case from the sites of attention, of feed-forward blocks and of everything else."""
    sites = {**attention, **mlp, **rest}
    return Installed(name, build, sites, attention=attention, mlp=mlp, **options)


def repeated(prefix, count, sites):
    """The sites of `count` equal layers: `prefix` has the layer's number for {}."""
    return {
        f"{prefix.format(i)}/{path}": seen for i in range(count) for path, seen in sites.items()
    }


def shapes_of(params):
    """The tree of shapes of arrays or of shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
