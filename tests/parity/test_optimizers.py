"""LoRA+ and LoRA-FA take peft's steps: the same trained numbers after several, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.optim import lora_fa, lora_plus, roles

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
optimizers = pytest.importorskip("peft.optimizers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs

V, D, F, OUT, RANK, ALPHA, RATE, STEPS = 11, 6, 7, 5, 2, 3.0, 1e-2, 6
IDS = np.random.default_rng(0).integers(0, V, (8,))
TARGET = np.random.default_rng(1).standard_normal((8, OUT))


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.up = torch.nn.Linear(D, F)
        self.norm = torch.nn.LayerNorm(F)
        self.down = torch.nn.Linear(F, OUT)

    def forward(self, ids):
        return self.down(self.norm(torch.tanh(self.up(self.emb(ids)))))


def apply(params, ids):
    h = jnp.tanh(params["emb"][ids] @ params["up"] + params["up_bias"][None])
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * params["norm"][None] + params["norm_bias"][None]
    return h @ params["down"] + params["down_bias"][None]


def wrapped(seed, targets, **options):
    """Their model under adapters with random factors."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        modules_to_save=["norm"],
        bias="all",
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(Theirs().double(), config)
    return model.double()


NAMES = {"": "weight", "_bias": "bias"}


def array(tensor):
    return jnp.asarray(tensor.detach().numpy().copy())


def adapter_arrays(module, name):
    """Their factors of one module in our layout."""
    kind = "embedding_" if name == "emb" else ""
    factor = lambda x: getattr(module, f"lora_{kind}{x}")["default"]  # noqa: E731
    pair = [f if kind else f.weight for f in (factor("A"), factor("B"))]
    arrays = {"a": array(pair[0]).T, "b": array(pair[1]).T}
    if module.use_dora["default"]:
        arrays["magnitude"] = array(module.lora_magnitude_vector["default"].weight)
    return arrays


def theirs_as_ours(model, targets, method):
    """The base, our rules for it, and their trained numbers in our tree."""
    inner = model.base_model.model
    modules = {name: getattr(inner, name) for name in ("emb", "up", "down")}
    base = {n: m.base_layer if hasattr(m, "base_layer") else m for n, m in modules.items()}
    norm = inner.norm.modules_to_save["default"]
    params = {"emb": array(base["emb"].weight)}
    params |= {n: array(base[n].weight).T for n in ("up", "down")}
    params |= {f"{n}_bias": array(base[n].bias) for n in ("up", "down")}
    params |= {"norm": array(norm.weight), "norm_bias": array(norm.bias)}
    whole = {"up_bias", "down_bias", "norm", "norm_bias"}
    rules = dict.fromkeys(targets, method) | dict.fromkeys(whole, lj.full())
    values = {n: adapter_arrays(modules[n], n) for n in targets}
    return params, rules, values | {n: {"w": params[n]} for n in whole}


def attached(params, rules, values):
    sites = lj.find_sites(apply, params, IDS)
    frozen, start = lj.attach(jax.random.key(0), params, rules, sites)
    for path, arrays in values.items():
        for name in set(arrays) - set(start[path]):
            frozen[path].frozen[name] = arrays[name]
    return frozen, {p: {n: values[p][n] for n in own} for p, own in start.items()}


def train_theirs(model, optimizer):
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = model(torch.tensor(IDS))
        torch.sum((y - torch.tensor(TARGET)) ** 2).backward()
        optimizer.step()


def train_ours(frozen, trained, optimizer):
    def loss(trained):
        return jnp.sum(jnp.square(lj.factored(apply)(lj.bind(frozen, trained), IDS) - TARGET))

    @jax.jit
    def step(trained, state):
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    for _ in range(STEPS):
        trained, state = step(trained, state)
    return trained


def agree(ours, theirs, tolerance):
    for path, arrays in ours.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(array, theirs[path][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus(seed, dora):
    targets = ["emb", "up", "down"]
    method = (lj.dora if dora else lj.lora)(rank=RANK, alpha=ALPHA)
    with jax.enable_x64(True):
        model = wrapped(seed, targets, use_dora=dora)
        frozen, trained = attached(*theirs_as_ours(model, targets, method))
        ours = lora_plus(
            RATE, roles(frozen, trained), ratio=4, embedding_rate=3e-3, weight_decay=0.3
        )
        theirs = optimizers.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=4,
            loraplus_lr_embedding=3e-3,
            loraplus_weight_decay=0.3,
        )
        start = jax.tree.map(np.array, trained)
        trained = train_ours(frozen, trained, ours)
        train_theirs(model, theirs)
        expected = theirs_as_ours(model, targets, method)[2]
        agree(trained, expected, 1e-9)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), start, trained)
        assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_fa(rslora, autocast, monkeypatch):
    targets = ["up", "down"]
    method = lj.lora(rank=RANK, alpha=ALPHA, rslora=rslora, freeze_a=True)
    if not autocast:
        monkeypatch.setattr(optimizers.lorafa, "is_bf16_available", lambda: False)
    with jax.enable_x64(True):
        model = wrapped(3, targets, use_rslora=rslora)
        frozen, trained = attached(*theirs_as_ours(model, targets, method))
        theirs = optimizers.create_lorafa_optimizer(
            model, r=RANK, lora_alpha=ALPHA, lr=RATE, weight_decay=0.1
        )
        ours = lora_fa(RATE, frozen, weight_decay=0.1)
        trained = train_ours(frozen, trained, ours)
        train_theirs(model, theirs)
        expected = theirs_as_ours(model, targets, method)[2]
        # bfloat16 keeps 8 bits of the corrected gradient, Adam turns that into part of a step
        agree(trained, expected, 0.2 * RATE if autocast else 1e-8)
