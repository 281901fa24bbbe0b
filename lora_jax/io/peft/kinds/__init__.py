"""The table of PEFT's types: one record each."""

from lora_jax.io.peft.kind import Kind
from lora_jax.io.peft.kinds.adalora import ADALORA
from lora_jax.io.peft.kinds.lora import LORA
from lora_jax.io.peft.kinds.products import FOURIERFT, LOHA, LOKR, MISS
from lora_jax.io.peft.kinds.rotations import BOFT, HRA, OFT
from lora_jax.io.peft.kinds.scales import IA3, LN_TUNING
from lora_jax.io.peft.kinds.shared import RANDLORA, VBLORA, VERA

_KINDS = (
    *(LORA, ADALORA, VERA, LOHA, LOKR, IA3, VBLORA, RANDLORA, MISS, FOURIERFT, HRA, OFT, BOFT),
    LN_TUNING,
)
TABLE: dict[str, Kind] = {kind.peft_type: kind for kind in _KINDS}

__all__ = ["TABLE"]
