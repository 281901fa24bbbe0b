"""Fine-tune a model on a task, and measure it before and after.

python -m experiments.finetune --config=configs/quickstart.py --config.method.rank=4
"""

from pathlib import Path

from absl import flags

from experiments import arms, cli
from experiments.run import finetune
from experiments.settings import known_keys


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_config("configs/quickstart.py")
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/CONFIG by default.")


def main() -> int:
    """Run the config of the command line; 1 when training was lost, 130 after Ctrl-C."""
    config = cli.read_config(known_keys)
    workdir = Path(flags.FLAGS.workdir or Path("runs") / cli.config_stem())
    if arms.has_arms(config):
        return arms.run_arms(config, workdir)
    config, workdir = arms.one_arm(config, workdir)
    result = finetune(config, workdir)
    names = sorted(entry.name for entry in workdir.iterdir())
    print(f"written to {workdir}: {', '.join(names)}")
    if result.outcome.stopped is None:
        return 0
    return 130 if result.outcome.interrupted else 1


if __name__ == "__main__":
    cli.run(main, define_flags)
