"""The processes that benchmarks time: each makes one training step ready and runs it on demand.

A worker reads one word a line: `step` runs one step and answers with its seconds, `end` answers
with the peak memory of its process, in all and in the steps. Torch is imported in the peer's worker
alone.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.train.memory import process_peak, restart_peak

PRODUCT = 2048  # side of the square float32 product that measures the machine's peak


_LAYERS = "layers/.*/kernel"
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Ready(NamedTuple):
    """A step to time (it returns when its results are there), and facts about it."""

    step: Callable[[], Any]
    facts: dict[str, Any]


def lora_jax_step(folder: Path, options: Mapping[str, Any], ids: np.ndarray) -> Ready:
    """Our training step: factored adapters, chunked cross-entropy, AdamW."""
    import jax
    import optax

    import lora_jax as lj
    from experiments import choices
    from experiments.flops import matrix_flops
    from experiments.storages import stored
    from lora_jax.io.native import save_adapter
    from lora_jax.models import load
    from lora_jax.train import adapter_loss, answer_loss, init_state, make_step

    model = load(str(folder)).with_options(remat=options["remat"])
    sites = lj.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), "int32"))
    rules = {options.get("targets") or _LAYERS: choices.make("method", options["method"])}
    base = choices.make("quantize", options.get("quantize") or {"name": "none"})
    rules = stored(base, base.targets, rules, sites)
    frozen, trained = lj.attach(jax.random.key(0), model.params, rules, sites)
    del model.params["layers"]  # `frozen` holds the arrays now
    optimizer = optax.adamw(1e-4)
    change = choices.make("dynamics", options.get("dynamics") or {"name": "none"})
    dynamics = change.dynamics(1000)
    state = init_state(trained, optimizer, frozen=frozen, dynamics=dynamics)
    loss = adapter_loss(answer_loss(model.hidden, model.logits))
    step = make_step(loss, optimizer, dynamics=dynamics)
    batch = _batch(ids)
    program = jax.make_jaxpr(step)(state, frozen, batch)
    held = [state]

    def run() -> float:
        held[0], info = step(held[0], frozen, batch)
        return float(info.loss)

    saved = _bytes_of(lambda place: save_adapter(place, frozen, held[0].trained))
    facts = {"flops": matrix_flops(program), "trained": lj.tree.count(trained), "saved": saved}
    jax.clear_caches()  # programs that drew factors and packed kernels
    return Ready(run, {**facts, "frozen": lj.tree.nbytes(frozen)})


def floor_step(folder: Path, options: Mapping[str, Any], ids: np.ndarray) -> Ready:
    """The least any adapter can cost: the frozen base forward, and back to its embedded inputs."""
    import jax

    from experiments.flops import matrix_flops
    from lora_jax.models import load
    from lora_jax.train.loss import cross_entropy

    model = load(str(folder)).with_options(remat=options["remat"])
    batch = _batch(ids)

    def loss(inputs: Any, params: Any, targets: Any, weights: Any) -> Any:
        hidden = model.trunk(params, inputs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        total, weight = cross_entropy(
            lambda h: model.logits(params, h), flat, targets.reshape(-1), weights.reshape(-1)
        )
        return total / weight

    step = jax.jit(jax.value_and_grad(loss))
    inputs = jax.jit(model.embed)(model.params, ids)
    program = jax.make_jaxpr(step)(inputs, model.params, batch["targets"], batch["weights"])

    def run() -> float:
        value, grad = step(inputs, model.params, batch["targets"], batch["weights"])
        jax.block_until_ready(grad)
        return float(value)

    return Ready(run, {"flops": matrix_flops(program), "trained": 0})


def peft_step(folder: Path, options: Mapping[str, Any], ids: np.ndarray) -> Ready:
    """The same model, batch and adapter in peft and torch, with AdamW."""
    import os

    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = dict(options["peft"])
    make = getattr(peft, arguments.pop("config"))
    targets = {"target_modules": arguments.pop("target_modules", _LINEAR)}
    config = make(task_type="CAUSAL_LM", **targets, **arguments)
    model = peft.get_peft_model(base, config)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-4)
    tokens, steps = torch.tensor(ids, dtype=torch.long), [0]

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            steps[0] += 1
            model.base_model.update_and_allocate(steps[0])
        return float(loss)

    saved = _bytes_of(lambda place: model.save_pretrained(place, save_embedding_layers=False))
    trained = sum(p.numel() for p in weights)
    return Ready(run, {"flops": None, "trained": trained, "saved": saved})


def product_step(folder: Path, options: Mapping[str, Any], ids: np.ndarray) -> Ready:
    """One large square float32 product: what this machine reaches at best."""
    import jax

    x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    multiply = jax.jit(lambda x: x @ x)

    def run() -> float:
        return float(jax.block_until_ready(multiply(x))[0, 0])

    return Ready(run, {"flops": 2 * PRODUCT**3, "trained": 0})


WORKERS = {
    "lora_jax": lora_jax_step,
    "floor": floor_step,
    "peft": peft_step,
    "product": product_step,
}


def serve(name: str, folder: Path, options: Mapping[str, Any]) -> None:
    """Make a worker's step ready and answer its parent until told to end."""
    shape = (options["batch"], options["time"])
    ids = np.random.default_rng(0).integers(0, options["vocabulary"], shape)
    ready = WORKERS[name](folder, options, ids.astype(np.int32))
    losses = [ready.step() for _ in range(options["warmup"])]
    whole = process_peak()
    restart_peak()  # the steps alone, without what loading and compiling took
    _answer({"first_loss": losses[0] if losses else math.nan, **ready.facts})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        started = time.perf_counter()
        ready.step()
        _answer({"seconds": time.perf_counter() - started})
    steps = process_peak()
    _answer({"steps_gb": steps, "peak_gb": max(whole or 0.0, steps or 0.0)})


def _batch(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Next-token prediction at every position but the last, as transformers scores it."""
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0
    return {
        "ids": ids,
        "targets": np.roll(ids, -1, axis=1),
        "weights": weights,
    }


def _bytes_of(save: Callable[[Path], Any]) -> int:
    """The size of the weights that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as parent:
        save(Path(parent) / "adapter")
        return sum(file.stat().st_size for file in Path(parent).rglob("*.safetensors"))


def _answer(message: Mapping[str, Any]) -> None:
    print("BENCH " + json.dumps(message), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
