"""Fashion-MNIST on a convolutional network: what LoRA adds to a head, beside full fine-tuning.

Question: EfficientNet-Lite0, trained on ImageNet, gets a fresh head for ten kinds of clothes and
sees 5,000 pictures twice, scaled from 28 to 64 pixels. How much better than the head alone is it
with LoRA of rank 8 on the 32 kernels that mix channels, and with everything trained? BatchNorm
keeps ImageNet's statistics in every arm.

    python -m experiments.finetune --config=configs/fashion_efficientnet.py

Learning rates were chosen on dev (1,000 pictures, one seed) after half a pass, 80 steps. probe:
1e-3 79.5 %, 3e-3 82.8 %, 1e-2 80.6 %; lora: 1e-3 82.6 %, 3e-3 82.4 %, 1e-2 75.3 %; full: 1e-4
83.1 %, 3e-4 83.5 %, 1e-3 82.3 %. All but lora's 1e-2 lie in overlapping intervals (about 2.4 points
each way). Test was read once (2,000 of the official test pictures; an untrained head: 16.7 %):

    arm    trained parameters   test accuracy, 95 % interval (Wilson)
    probe              12,810   83.0 % (81.3 to 84.6)
    lora              195,082   87.5 % (86.0 to 88.9)
    full            3,383,818   88.2 % (86.8 to 89.6)

LoRA is 4.5 points above the probe, and its interval overlaps that of full fine-tuning. It takes
the two passes: after half a pass, on dev, no arm stood clear of another. About 18 minutes of
processor time on two cores for all three arms (probe 3, lora 6, full 10), up to 2.5 GB.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Return the settings; `--config.arm=lora` runs one arm alone."""
    config = config_dict.ConfigDict()
    config.task = "images"
    config.seed = 0
    config.arms = (
        ("probe", {"targets": "none", "train.learning_rate": 3e-3}),
        ("lora", {"train.learning_rate": 1e-3}),
        ("full", {"method.name": "full", "targets": ".*", "train.learning_rate": 3e-4}),
    )

    config.model = config_dict.ConfigDict()
    config.model.kind = "efficientnet"  # or vit
    config.model.source = ""  # Lite0, trained on ImageNet; or a .pth file of the same

    config.data = config_dict.ConfigDict()
    config.data.source = "fashion_mnist"  # or mnist_5k, or a folder with Fashion-MNIST's files
    config.data.size = 64  # pixels; its last feature maps are 1/32 of that
    config.data.train = 5000
    config.data.dev = 1000
    config.data.test = 2000

    config.method = config_dict.ConfigDict()
    config.method.name = "lora"
    config.method.rank = 8
    config.method.alpha = 16.0

    # The kernels that mix channels. A depthwise one is a stack of 9 x 1 and 25 x 1 matrices, for
    # which factors are larger than the kernel; "convolutions" would take them, too.
    config.targets = r"(blocks/\d+/(expand|project)|last)/conv/kernel"

    config.train = config_dict.ConfigDict()
    config.train.steps = 313  # of 32: twice through the training pictures
    config.train.batch = 32
    config.train.warmup = 20

    config.evaluate = config_dict.ConfigDict()
    config.evaluate.split = "test"  # dev while choosing settings
    config.evaluate.batch = 100
    return config
