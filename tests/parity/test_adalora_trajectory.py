"""AdaLoRA's whole trajectory equals peft's: ranks a step, final arrays, stored pattern."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import dynamics
from lora_jax.methods import adalora
from lora_jax.train import adapter_loss, init_state, make_step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
STEPS, RANK, TARGET, ALPHA = 60, 6, 3, 8.0
SCHEDULE = {"start": 8, "end": 15, "every": 4}
WIDTHS = {"first": (9, 7), "second": (7, 5)}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def data(seed):
    rng = np.random.default_rng(seed)
    kernels = {name: rng.standard_normal(shape) / 3 for name, shape in WIDTHS.items()}
    inputs = rng.standard_normal((STEPS, 11, 9))
    return kernels, inputs, np.tanh(inputs @ rng.standard_normal((9, 5)))


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def loss(params, batch):
    off = apply(params, batch["x"]) - batch["y"]
    return jnp.sum(off**2), jnp.asarray(float(off.size))


class Net(torch.nn.Module):
    def __init__(self, kernels):
        super().__init__()
        for name, kernel in kernels.items():
            layer = torch.nn.Linear(*kernel.shape, bias=False)
            layer.weight.data = torch.tensor(kernel.T)
            setattr(self, name, layer)

    def forward(self, x, y):
        off = self.second(torch.tanh(self.first(x))) - y
        return SimpleNamespace(loss=(off**2).mean())


def theirs(kernels, inputs, targets, seed):
    """peft's ranks a step, its final arrays in our layout, its pattern, and where it started."""
    torch.manual_seed(seed)
    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=SCHEDULE["start"],
        tfinal=SCHEDULE["end"],
        deltaT=SCHEDULE["every"],
        total_step=STEPS,
        orth_reg_weight=0.3,
        lora_alpha=ALPHA,
        target_modules=list(WIDTHS),
    )
    model = peft.get_peft_model(Net(kernels), config)
    layers = {name: getattr(model.base_model.model, name) for name in WIDTHS}

    def arrays():
        got = {}
        for name, layer in layers.items():
            parts = (layer.lora_A.default.T, layer.lora_E.default[:, 0], layer.lora_B.default.T)
            got[name] = {k: p.detach().numpy().copy() for k, p in zip("aeb", parts, strict=True)}
        return got

    start, ranks = arrays(), []
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.05
    )
    for t in range(STEPS):
        # Without a task type, peft's own forward never reaches the orthogonality term.
        model.base_model(torch.tensor(inputs[t]), torch.tensor(targets[t])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(t)
        optimizer.zero_grad()
        ranks.append([int((part["e"] != 0).sum()) for part in arrays().values()])
    pattern = model.peft_config["default"].rank_pattern
    kept = {name: np.ravel(p) for name in WIDTHS for n, p in pattern.items() if name in n}
    return ranks, arrays(), kept, start


def ours(kernels, inputs, targets, start):
    params = {name: jnp.asarray(kernel) for name, kernel in kernels.items()}
    sites = lj.find_sites(apply, params, jnp.asarray(inputs[0]))
    method = adalora(rank=RANK, alpha=ALPHA)
    frozen, _ = lj.attach(jax.random.key(0), params, {".*": method}, sites)
    moving = dynamics.adalora(steps=STEPS, target_rank=TARGET, gamma=0.3, **SCHEDULE)
    optimizer = optax.adamw(0.05, weight_decay=0.05)
    step = make_step(adapter_loss(loss), optimizer, dynamics=moving)
    trained = jax.tree.map(jnp.asarray, start)
    state, ranks = init_state(trained, optimizer, frozen=frozen, dynamics=moving), []
    for t in range(STEPS):
        state, _ = step(state, frozen, {"x": inputs[t], "y": targets[t]})
        ranks.append([int((state.trained[name]["e"] != 0).sum()) for name in WIDTHS])
    assert step._cache_size() <= 1
    return ranks, state.trained, state.dynamics["kept"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sixty_steps_equal_pefts(seed):
    given = data(seed)
    their_ranks, their_arrays, their_pattern, start = theirs(*given, seed)
    ranks, arrays, pattern = ours(*given, start)
    assert ranks == their_ranks
    assert sum(ranks[-1]) == TARGET * len(WIDTHS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), arrays, their_arrays
    )
    jax.tree.map(np.testing.assert_array_equal, pattern, their_pattern)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alpha", [5, -1])
def test_a_layer_and_its_gradients_equal_pefts(seed, alpha):
    rng = np.random.default_rng(seed)
    d_in, d_out, rank = rng.integers(3, 12, 3).tolist()
    w, x, g = (rng.standard_normal(s) for s in ((d_in, d_out), (6, d_in), (6, d_out)))
    net = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False))
    net[0].weight.data = torch.tensor(w.T)
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=1, total_step=9, lora_alpha=alpha, target_modules=["0"]
    )
    layer = peft.get_peft_model(net, config).base_model.model[0]
    shapes = {"a": (d_in, rank), "e": (rank,), "b": (rank, d_out)}
    trained = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for own, name in ((layer.lora_A, "a"), (layer.lora_B, "b")):
        own.default.data = torch.tensor(trained[name].T.copy())
    layer.lora_E.default.data = torch.tensor(trained["e"][:, None])
    out = layer(torch.tensor(x))
    out.backward(torch.tensor(g))
    params = {"w": jnp.asarray(w)}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    sites = lj.find_sites(apply, params, x)
    rules = {"w": adalora(rank=rank, alpha=alpha)}
    frozen, _ = lj.attach(jax.random.key(0), params, rules, sites)
    forward = lambda t: lj.factored(apply)(lj.bind(frozen, {"w": t}), x)  # noqa: E731
    y, pull = jax.vjp(forward, jax.tree.map(jnp.asarray, trained))
    (grads,) = pull(jnp.asarray(g))
    np.testing.assert_allclose(y, out.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(grads["a"], layer.lora_A.default.grad.numpy().T, rtol=1e-8)
    np.testing.assert_allclose(grads["e"], layer.lora_E.default.grad.numpy()[:, 0], rtol=1e-8)
    np.testing.assert_allclose(grads["b"], layer.lora_B.default.grad.numpy().T, rtol=1e-8)
