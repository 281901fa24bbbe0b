"""Virtual tokens beside the input of a model: prompt tuning, P-tuning and prefix tuning.

Each makes, of a Llama, a `Prompted` model, and of a BERT or ViT a `PromptedNetwork`, whose
parameters are the base's and, under `prompt`, those of the virtual tokens. So
`{"prompt/.*": full()}` trains them, beside any adapters of the base:

```
prompted = prompt_tuning(model, 20, jax.random.key(0))
sites = find_sites(prompted.apply, prompted.params, ids)
frozen, trained = attach(key, prompted.params, {"prompt/.*": full()}, sites)
loss = adapter_loss(answer_loss(prompted.hidden, prompted.logits))
```

A head goes onto a network before or after: `with_head(prefix_tuning(bert, 20, key), 2, key)`.

Letters: n virtual tokens, B batch, T time, D width, K kv heads, d head size, L layers.
"""

from lora_jax.prompts.factories import p_tuning, prefix_tuning, prompt_tuning
from lora_jax.prompts.network import PromptedNetwork
from lora_jax.prompts.prompted import Prompted

__all__ = ["Prompted", "PromptedNetwork", "p_tuning", "prefix_tuning", "prompt_tuning"]
