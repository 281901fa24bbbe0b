"""Live layers of peft beside ours on random shapes: outputs, gradients, starts, and seeds."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import methods
from lora_jax.torch_random import TorchGenerator, randperm

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings are theirs


def array(parameter):
    return jnp.asarray(parameter.detach().numpy().copy())


def turned(layer, **names):
    """Their parameters, transposed, under our names."""
    return {ours: array(getattr(layer, name)["default"]).T for ours, name in names.items()}


def as_is(layer, **names):
    return {ours: array(getattr(layer, name)["default"]) for ours, name in names.items()}


def from_lokr(layer):
    found = {"w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a"}
    found |= {"w2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a"}
    present = {ours: name for ours, name in found.items() if "default" in getattr(layer, name)}
    return turned(layer, **present)


def from_miss(layer):
    m = array(layer.miss_block["default"])
    return {"m": m.swapaxes(1, 2) if m.ndim == 3 else m}


FROM = {
    "vera": lambda layer: as_is(layer, d="vera_lambda_d", b="vera_lambda_b"),
    "loha": lambda layer: turned(
        layer, a1="hada_w1_b", b1="hada_w1_a", a2="hada_w2_b", b2="hada_w2_a"
    ),
    "lokr": from_lokr,
    "vblora": lambda layer: as_is(layer, logits_a="vblora_logits_A", logits_b="vblora_logits_B"),
    "randlora": lambda layer: as_is(
        layer, **{"lambda": "randlora_lambda", "gamma": "randlora_gamma"}
    ),
    "miss": from_miss,
    "fourierft": lambda layer: as_is(layer, c="fourierft_spectrum"),
}


def frozen_in_common(name, layer):
    if name == "vera":
        return turned(layer, shared_a="vera_A", shared_b="vera_B")
    if name == "randlora":
        held = as_is(layer, bases_a="randlora_A", bases_b="randlora_B")
        return {"bases_a": held["bases_a"][:, 0], "bases_b": held["bases_b"]}
    return {}


def drawn(name, seed):
    """A config of theirs, the method of ours that means the same, and the sides' common divisor."""
    draw = random.Random(f"{name} {seed}")
    r, alpha = draw.randint(1, 5), draw.choice([3, 8.0])
    if name == "vera":
        return peft.VeraConfig(r=r), methods.vera(rank=r), 1
    if name == "loha":
        return peft.LoHaConfig(r=r, alpha=alpha), methods.loha(rank=r, alpha=alpha), 1
    if name == "lokr":
        both, factor = draw.random() < 0.5, draw.choice([-1, 2, 4, 6])
        theirs = peft.LoKrConfig(r=r, alpha=alpha, decompose_both=both, decompose_factor=factor)
        return theirs, methods.lokr(r, alpha, factor=factor, decompose_both=both), 2
    if name == "vblora":
        h, b, k = draw.randint(4, 7), draw.choice([2, 4]), draw.randint(1, 3)
        theirs = peft.VBLoRAConfig(r=r, num_vectors=h, vector_length=b, topk=k)
        return theirs, methods.vblora(r, h, b, k), b
    if name == "randlora":
        theirs = peft.RandLoraConfig(r=r, randlora_alpha=int(alpha))
        return theirs, methods.randlora(r, int(alpha)), 1
    if name == "fourierft":
        n, seed = draw.choice([1, 2, 9, 40]), draw.choice([777, 5])
        theirs = peft.FourierFTConfig(n_frequency=n, scaling=alpha, random_loc_seed=seed)
        return theirs, methods.fourierft(n, alpha, seed=seed), 1
    kind = name.partition(" ")[2]
    if kind == "bat":
        return peft.MissConfig(r=r, init_weights="bat"), methods.miss(r, bat=True), r
    if kind == "mini":
        theirs = peft.MissConfig(r=r, mini_r=2, init_weights="mini")
        return theirs, methods.miss(r, mini_rank=2), 2
    return peft.MissConfig(r=r), methods.miss(r), 1


class Two(torch.nn.Module):
    """Two linear layers of unlike shapes, side by side."""

    def __init__(self, shapes):
        super().__init__()
        self.q, self.k = (torch.nn.Linear(d_in, d_out) for d_in, d_out in shapes)

    def forward(self, x, y):
        return self.q(x), self.k(y)


def two(params, x, y):
    outputs = [v @ params[n] + params[f"{n}_bias"][None] for n, v in (("q", x), ("k", y))]
    return tuple(outputs)


def sides(seed, divisor):
    draw = random.Random(seed)
    return [
        tuple(divisor * draw.randint(-(-8 // divisor), 24 // divisor) for _ in "io") for _ in "qk"
    ]


def paired(name, seed, fresh=False):
    """Their model and our function with its adapter, with the same numbers."""
    torch.manual_seed(seed)
    config, method, divisor = drawn(name, seed)
    config.target_modules = ["q", "k"]
    model = peft.get_peft_model(Two(sides(seed, divisor)), config).eval()
    if not fresh:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
    layers = {n: getattr(model.base_model.model, n) for n in ("q", "k")}
    base = {n: layer.base_layer for n, layer in layers.items()}
    params = {n: array(layer.weight).T for n, layer in base.items()}
    params |= {f"{n}_bias": array(layer.bias) for n, layer in base.items()}
    x = [
        np.random.default_rng(seed).standard_normal((5, p.shape[0]), np.float32)
        for p in (params["q"], params["k"])
    ]
    sites = lj.find_sites(two, params, *x)
    frozen, started = lj.attach(jax.random.key(0), params, {"[qk]": method}, sites)
    trained = {n: FROM[method.name](layer) for n, layer in layers.items()}
    if method.name == "vblora":
        trained["shared/vblora"] = {"bank": array(layers["q"].vblora_vector_bank["default"])}
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, started)
    for node in (frozen["q"], frozen["k"]):
        if node.common:
            held = frozen_in_common(method.name, layers["q"])
            assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, node.common)
            node.common.update(held)
    return model, layers, frozen, trained, started, x


NAMES = ["vera", "loha", "lokr", "vblora", "randlora", "fourierft", "miss", "miss mini", "miss bat"]


def near(ours, theirs, rounding):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    np.testing.assert_allclose(
        ours, theirs, rtol=0, atol=rounding * max(np.abs(theirs).max(), 1e-3)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name, seed):
    model, layers, frozen, trained, _, x = paired(name, seed)
    theirs = model(*map(torch.tensor, x))
    gy = [np.random.default_rng(seed + 9).standard_normal(y.shape, np.float32) for y in theirs]
    forward = lambda t: lj.factored(two)(lj.bind(frozen, t), *map(jnp.asarray, x))  # noqa: E731
    ours, pull = jax.vjp(jax.jit(forward), trained)
    for mine, other in zip(ours, theirs, strict=True):
        near(mine, other, 1e-5)
    (grads,) = pull(tuple(map(jnp.asarray, gy)))
    torch.autograd.backward(theirs, [torch.tensor(g) for g in gy])
    for layer in layers.values():
        for p in layer.parameters():
            if p.requires_grad and p.grad is not None:
                p.data = p.grad
    for n, layer in layers.items():
        wanted = FROM[name.split()[0]](layer)
        for key, value in wanted.items():
            near(grads[n][key], value, 1e-4)
    if name == "vblora":
        near(grads["shared/vblora"]["bank"], layers["q"].vblora_vector_bank["default"], 1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_merged_kernels(name, seed):
    model, _, frozen, trained, _, _ = paired(name, seed)
    merged = lj.merge(frozen, trained)
    plain = model.merge_and_unload()
    for n in ("q", "k"):
        near(merged[n], getattr(plain, n).weight.T, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_starts_are_of_the_same_size(name):
    """Zeros and constants where theirs are, elsewhere numbers within the same bounds."""
    _, _, _, theirs, ours, _ = paired(name, 3, fresh=True)
    for owner, arrays in theirs.items():
        for key, value in arrays.items():
            mine, value = np.asarray(ours[owner][key]), np.asarray(value)
            if value.size == 1:
                continue
            assert (np.ptp(mine) == 0) == (np.ptp(value) == 0), key
            if np.ptp(value) == 0:
                np.testing.assert_allclose(mine, value, rtol=1e-6)
            elif value.size > 20:
                assert 0.4 < np.abs(mine).max() / np.abs(value).max() < 2.5, key


@pytest.mark.parametrize("seed", [0, 777, 2**33 + 5])
def test_uniform_numbers_of_a_seed(seed):
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    for shape, bound in (((7, 50), 0.37), ((300,), 2.5)):
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=theirs)
        np.testing.assert_array_equal(ours.uniform(shape, -bound, bound), drawn.numpy())


@pytest.mark.parametrize("size", [1, 13, 96, 5000, 70_000])
@pytest.mark.parametrize("seed", [0, 777])
def test_permutations_of_a_seed(size, seed):
    theirs = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    count = min(size, 300)
    assert list(randperm(size, count, seed)) == theirs[:count].tolist()


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(16, 10, 3), (40, 56, 8)])
def test_projections_of_a_seed(d_in, d_out, rank):
    from lora_jax.io.peft.projections import vera_projections

    model = torch.nn.Sequential(torch.nn.Linear(d_in, d_out))
    config = peft.VeraConfig(r=rank, target_modules=["0"], projection_prng_key=11)
    theirs = frozen_in_common("vera", peft.get_peft_model(model, config).base_model.model[0])
    ours = vera_projections(11, rank, d_in, d_out)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(16, 10, 3), (40, 56, 8), (9, 30, 64)])
def test_bases_of_a_seed(d_in, d_out, rank):
    from lora_jax.io.peft.projections import randlora_bases

    model = torch.nn.Sequential(torch.nn.Linear(d_in, d_out))
    config = peft.RandLoraConfig(r=rank, target_modules=["0"], projection_prng_key=11)
    theirs = frozen_in_common("randlora", peft.get_peft_model(model, config).base_model.model[0])
    ours = randlora_bases(11, rank, d_in, d_out)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
