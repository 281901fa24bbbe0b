"""LoRA-drop: how few layers of MiniLM need factors of their own.

Question: all-MiniLM-L6-v2 learns to tell good film-review snippets from bad ones, as in
`configs/sentences.py`. A probe on the first tenth of the run's batches scores every layer by the
length of what its adapter adds; the layers that make up `threshold` of each kind's total keep their
own pair, all others of the kind share one. Does that cost accuracy?

    python -m experiments.finetune --config=configs/lora_drop.py

Rank and learning rate are those that `configs/sentences.py` chose on dev for LoRA. One seed, test
accuracy on 2,000 snippets with its 95 % interval (Wilson); the head counts as trained, too:

    arm            trained    accuracy, %
    every layer    332,546    85.0 (83.4 to 86.5)
    most (0.9)     314,114    84.9 (83.2 to 86.4)
    half (0.5)     132,866    84.4 (82.7 to 85.9)
    fewest (0.01)  111,362    84.8 (83.1 to 86.3)

The importance lies in the upper layers: at 0.5 one or two of six keep their own pair in each
kind. But nothing is lost even where one layer of each kind does: the arms differ by less than a
third of an interval, so on this task a third of the numbers is enough, and which layers they are in
does not show. About 8 minutes of processor time, 1.9 GB, on two cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.arm=half` runs one arm alone."""
    config = config_dict.ConfigDict()
    config.task = "sentences"
    config.seed = 0
    drop = {"dynamics.name": "lora_drop"}
    config.arms = (
        ("every layer", {}),
        ("most", {**drop, "dynamics.threshold": 0.9}),
        ("half", {**drop, "dynamics.threshold": 0.5}),
        ("fewest", {**drop, "dynamics.threshold": 0.01}),
    )

    config.model = config_dict.ConfigDict()
    config.model.source = ""  # all-MiniLM-L6-v2

    config.data = config_dict.ConfigDict()
    config.data.domain = "movie"
    config.data.train = 3000
    config.data.dev = 1000
    config.data.test = 2000
    config.data.shift = 500
    config.data.length = 48

    config.method = config_dict.ConfigDict()
    config.method.name = "lora"
    config.method.rank = 8
    config.method.alpha = 16.0

    config.targets = "all_linear"

    config.train = config_dict.ConfigDict()
    config.train.steps = 188
    config.train.batch = 16
    config.train.warmup = 10
    config.train.learning_rate = 2e-3

    config.evaluate = config_dict.ConfigDict()
    config.evaluate.split = "test"
    config.evaluate.batch = 50
    return config
