r"""Write on from a prompt, with an adapter on its base.

python -m experiments.generate --adapter=runs/quickstart/adapter \
        --prompt=$'Review: A joy from start to end.\nSentiment:'
"""

import jax
from absl import flags

import lora_jax as lj
from experiments import cli, opening
from experiments.opening import Opened
from lora_jax.errors import InputError
from lora_jax.generate import Sampling, complete


def define_flags() -> None:
    """Define the flags of this command."""
    opening.define_flags()
    flags.DEFINE_multi_string("prompt", [], r"Text to go on from; \n is a new line.")
    flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.")
    flags.DEFINE_integer("max_new_tokens", 32, "The most tokens to write.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
    flags.DEFINE_float("top_p", None, "Draw among the likeliest tokens of this probability.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    flags.DEFINE_bool("no-adapter", False, "Leave the adapter out: what the base writes.")


def write(
    opened: Opened,
    prompts: list[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    adapter: bool = True,
    chat: bool = False,
) -> list[str]:
    """Return what the model writes after each prompt, with its adapter or without."""
    model, frozen, trained = opened
    if model.tokenizer is None:
        raise InputError("the base has no tokenizer; put its tokenizer.json beside the weights")
    if chat:
        prompts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in prompts]
    return complete(
        model,
        prompts,
        params=lj.bind(frozen, trained) if adapter else None,
        decode=lj.factored(model.decode) if adapter else None,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        add_special_tokens=not chat,
    )


def main() -> None:
    """Print what follows each prompt of the command line."""
    options = flags.FLAGS
    prompts = [prompt.replace("\\n", "\n") for prompt in options.prompt]
    if not prompts:
        raise InputError("give a prompt: --prompt=TEXT")
    texts = write(
        opening.open_named(),
        prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, top_p=options.top_p),
        seed=options.seed,
        adapter=not options["no-adapter"].value,
        chat=options.chat,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")


if __name__ == "__main__":
    cli.run(main, define_flags)
