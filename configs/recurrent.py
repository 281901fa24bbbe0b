"""Recurrent LoRA: an LSTM that knows reviews and editorials learns to read tweets.

Question: a character-level LSTM (192 wide, 222,305 parameters) is adapted with 3,000 tweets; which
of its two kernels carries the new kind of text, and how near does LoRA come to training it all?

    python -m experiments.finetune --config=configs/recurrent.py

The base is pretrained on 19,419 film reviews, product reviews and editorials the first time (800
steps, a minute and a half on two idle cores) and then kept in the cache folder. Every arm takes 10
to 25 seconds more. "before" in the table is no adaptation.

Chosen on dev (400 tweets, one seed; 3.457 bits per character before) among learning rates 3e-3 to
1e-1 (full: 1e-3 to 3e-2), bits after:

    input           1e-2 2.773   3e-2 2.732   1e-1 2.727
    recurrent       1e-2 2.817   3e-2 2.786   1e-1 2.786
    both            3e-3 2.768   1e-2 2.679   3e-2 2.649   1e-1 2.696
    head (trained)  1e-2 2.630   3e-2 2.601   1e-1 2.595
    both and head   1e-2 2.524   3e-2 2.492   1e-1 2.648
    full            1e-3 2.603   3e-3 2.507   1e-2 2.445   3e-2 2.464

The test set was read once (800 tweets, 95 % intervals by drawing tweets again; 3.557 before):

    input             6,656 numbers   2.728   2.689 to 2.766
    recurrent         7,680           2.790   2.750 to 2.829
    both             14,336           2.640   2.601 to 2.678
    head             18,721           2.598   2.558 to 2.638
    both and head    33,057           2.488   2.450 to 2.525
    full            222,305           2.440   2.402 to 2.476

LoRA on one kernel, 3 % of the numbers, takes 74 % (input) or 69 % (recurrent) of what full
fine-tuning gains, on both 82 %. Training the head alone, 8 %, takes more, 86 %; with both and the
head it is 96 %. All arms read the same tweets, so neighbours differ more surely than their
intervals say: full less both and head is -0.048, tweet by tweet -0.054 to -0.042; input less
recurrent -0.062, -0.071 to -0.053. Seeds and hardware were not varied.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.arm=input` runs one arm alone."""
    config = config_dict.ConfigDict()
    config.task = "sequences"
    config.seed = 0
    config.arms = (
        ("input", {"targets": ".*/input/kernel", "train.learning_rate": 1e-1}),
        ("recurrent", {"targets": ".*/recurrent/kernel"}),
        ("both", {"targets": "lstm/.*/kernel"}),
        ("head", {"method.name": "full", "targets": "head/.*", "train.learning_rate": 1e-1}),
        ("both-and-head", {"targets": ("lstm/.*/kernel", ("head/.*", {"name": "full"}))}),
        ("full", {"method.name": "full", "targets": ".*", "train.learning_rate": 1e-2}),
    )

    config.model = config_dict.ConfigDict()  # trained on these texts the first time it is needed
    config.model.domains = ("movie", "amazon", "nyt")
    config.model.d_in = 64
    config.model.width = 192
    config.model.steps = 800
    config.model.batch = 64
    config.model.learning_rate = 1e-2

    config.data = config_dict.ConfigDict()
    config.data.domain = "tweets"
    config.data.dev = 400
    config.data.test = 800
    config.data.length = 128  # characters to a row; what is longer is cut

    config.method = config_dict.ConfigDict()
    config.method.name = "lora"
    config.method.rank = 8
    config.method.alpha = 16.0

    config.train = config_dict.ConfigDict()
    config.train.steps = 200
    config.train.batch = 32
    config.train.warmup = 10
    config.train.learning_rate = 3e-2

    config.evaluate = config_dict.ConfigDict()
    config.evaluate.split = "test"  # dev while choosing settings
    config.evaluate.batch = 100

    return config
