"""Low-rank adaptation of any JAX model, as pure transforms of the parameter tree.

`find_sites` traces a model's function and tells which parameters are kernels; `attach` splits the
parameters into a frozen and a trained part by rules; `factored` runs the function on both without
ever forming an adapted kernel; `merge` gives back plain parameters.
"""

from lora_jax import tree
from lora_jax.adapter import Adapted, adapted, bind, merge, summary
from lora_jax.attachment import attach
from lora_jax.errors import InputError
from lora_jax.frameworks import (
    from_equinox,
    from_haiku,
    from_linen,
    from_linen_stateful,
    from_nnx,
    from_nnx_stateful,
)
from lora_jax.method import Method
from lora_jax.methods import (
    adalora,
    boft,
    delta_lora,
    dora,
    fixed,
    fourierft,
    full,
    houlsby,
    hra,
    ia3,
    ia3_bias,
    ia3_rules,
    intrinsic,
    loha,
    lokr,
    lora,
    miss,
    oft,
    randlora,
    tied,
    vblora,
    vera,
)
from lora_jax.quant import int8, loftq, nf4, quantized
from lora_jax.select import (
    all_linear,
    attention,
    biases,
    convolutions,
    embeddings,
    kernels,
    mlp,
    recurrent,
    recurrent_input,
)
from lora_jax.sites import Site, Sites, find_sites
from lora_jax.transform import factored, materialised

__all__ = [
    "Adapted",
    "InputError",
    "Method",
    "Site",
    "Sites",
    "adalora",
    "adapted",
    "all_linear",
    "attach",
    "attention",
    "biases",
    "bind",
    "boft",
    "convolutions",
    "delta_lora",
    "dora",
    "embeddings",
    "factored",
    "find_sites",
    "fixed",
    "fourierft",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_linen_stateful",
    "from_nnx",
    "from_nnx_stateful",
    "full",
    "houlsby",
    "hra",
    "ia3",
    "ia3_bias",
    "ia3_rules",
    "int8",
    "intrinsic",
    "kernels",
    "loftq",
    "loha",
    "lokr",
    "lora",
    "materialised",
    "merge",
    "miss",
    "mlp",
    "nf4",
    "oft",
    "quantized",
    "randlora",
    "recurrent",
    "recurrent_input",
    "summary",
    "tied",
    "tree",
    "vblora",
    "vera",
]
