"""Low-rank adaptation of any JAX model, as pure transforms of the parameter tree.

`find_sites` traces a model's function and tells which parameters are kernels; `attach` splits the
parameters into a frozen and a trained part by rules; `factored` runs the function on both without
ever forming an adapted kernel; `merge` gives back plain parameters.
"""

from lora_jax import tree
from lora_jax.adapter import Adapted, adapted, attach, bind, merge, summary
from lora_jax.errors import InputError
from lora_jax.method import Method
from lora_jax.methods import dora, full, lora
from lora_jax.sites import Site, Sites, all_linear, find_sites
from lora_jax.transform import factored, materialised

__all__ = [
    "Adapted",
    "InputError",
    "Method",
    "Site",
    "Sites",
    "adapted",
    "all_linear",
    "attach",
    "bind",
    "dora",
    "factored",
    "find_sites",
    "full",
    "lora",
    "materialised",
    "merge",
    "summary",
    "tree",
]
