"""Virtual tokens before the text of a Llama: prompt tuning, P-tuning and prefix tuning.

Each makes a `Prompted` model, whose parameters are the base's and, under `prompt`, those of the
virtual tokens. So `{"prompt/.*": full()}` trains them, beside any adapters of the base:

```
prompted = prompt_tuning(model, 20, jax.random.key(0))
sites = find_sites(prompted.apply, prompted.params, ids)
frozen, trained = attach(key, prompted.params, {"prompt/.*": full()}, sites)
loss = adapter_loss(answer_loss(prompted.hidden, prompted.logits))
```

Letters: n virtual tokens, B batch, T time, D width, K kv heads, d head size, L layers.
"""

from lora_jax.prompts.factories import p_tuning, prefix_tuning, prompt_tuning
from lora_jax.prompts.prompted import Prompted

__all__ = ["Prompted", "p_tuning", "prefix_tuning", "prompt_tuning"]
