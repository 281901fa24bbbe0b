"""Weighted sums of adapters are peft's, kernel by kernel, on random shapes in float64."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.compose import METHODS, weighted_sum
from lora_jax.compose.spectrum import clamped

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs

NAMES = ("emb", "up", "down", "conv")


@pytest.fixture(autouse=True)
def double():
    """Both in float64: peft holds the weights of a sum in torch's default type."""
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


class Theirs(torch.nn.Module):
    def __init__(self, v, d, f, kernel):
        super().__init__()
        self.emb = torch.nn.Embedding(v, d)
        self.up = torch.nn.Linear(d, f)
        self.down = torch.nn.Linear(f, d)
        self.conv = torch.nn.Conv2d(d, f, kernel, stride=2, padding=1)

    def forward(self, ids):
        return self.down(self.up(self.emb(ids)))


def apply(params, ids, image):
    conv = jax.lax.conv_general_dilated(
        image, params["conv"], (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return params["emb"][ids] @ params["up"] @ params["down"], conv


def array(tensor):
    return jnp.asarray(tensor.detach().numpy().copy())


def kernel(tensor, name):
    """One of their arrays in our layout."""
    x = array(tensor)
    return x if name == "emb" else x.transpose(2, 3, 1, 0) if name == "conv" else x.T


def factors(module, name, adapter):
    if name == "emb":
        return {
            "a": array(module.lora_embedding_A[adapter]).T,
            "b": array(module.lora_embedding_B[adapter]).T,
        }
    a, b = (kernel(getattr(module, f"lora_{x}")[adapter].weight, name) for x in "AB")
    return {"a": a.reshape(-1, a.shape[-1]), "b": b.reshape(-1, b.shape[-1])}


def built(seed, ranks, targets):
    """Their model with adapters of these ranks, our sites and pairs of the same numbers."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    v, d, f = draw.randint(8, 14), draw.randint(4, 7), draw.randint(4, 8)
    base = Theirs(v, d, f, (3, draw.choice([1, 2])))
    params = {name: kernel(getattr(base, name).weight, name) for name in NAMES}
    image, model = jnp.ones((1, 6, 6, d)), None
    sites = lj.find_sites(apply, params, jnp.arange(3), image)
    pairs = []
    for i, (rank, names) in enumerate(zip(ranks, targets, strict=True)):
        alpha = float(draw.choice([1, 3, 8]))
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(names), init_lora_weights=False
        )
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        inner = model.base_model.model
        rules = {name: lj.lora(rank=rank, alpha=alpha) for name in names}
        frozen, _ = lj.attach(jax.random.key(i), params, rules, sites)
        pairs.append((frozen, {n: factors(getattr(inner, n), n, str(i)) for n in names}))
    return model, params, pairs


def agree(model, params, made):
    merged = lj.merge(*made)
    for name in NAMES:
        module = getattr(model.base_model.model, name)
        theirs = kernel(module.get_delta_weight("sum"), name)
        np.testing.assert_allclose(merged[name] - params[name], theirs, rtol=0, atol=1e-9)
        assert made[0][name].frozen["scale"] == module.scaling["sum"] == 1


def weights_of(seed, count):
    draw = random.Random(100 + seed)
    return [draw.choice([-1, 1]) * draw.uniform(0.2, 2) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_equal_ranks(method, seed):
    model, params, pairs = built(seed, (2, 2, 2), [NAMES] * 3)
    weights = weights_of(seed, 3)
    sign = ["total", "frequency"][seed % 2]
    prune = method not in ("cat", "linear", "svd")
    # what is dropped at random cannot be the same: there everything is kept
    density = (1.0 if "dare" in method else [0.3, 0.5, 0.8][seed]) if prune else None
    rank = 3 if "svd" in method else None
    model.add_weighted_adapter(
        ["0", "1", "2"],
        weights,
        "sum",
        combination_type=method,
        svd_rank=rank,
        density=density,
        majority_sign_method=sign,
    )
    made = weighted_sum(
        pairs, weights, method, rank=rank, density=density, sign=sign, key=jax.random.key(0)
    )
    agree(model, params, made)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_unequal_ranks_on_unequal_kernels(method):
    targets = [NAMES, ("up", "conv"), ("up", "emb")]
    model, params, pairs = built(5, (2, 1, 3), targets)
    weights = weights_of(5, 3)
    density = 0.5 if method == "ties_svd" else None
    model.add_weighted_adapter(
        ["0", "1", "2"], weights, "sum", combination_type=method, svd_rank=2, density=density
    )
    agree(model, params, weighted_sum(pairs, weights, method, rank=2, density=density))


@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
def test_one_adapter(method):
    model, params, pairs = built(6, (2,), [NAMES])
    model.add_weighted_adapter(["0"], [-0.7], "sum", combination_type=method, density=0.5)
    density = 0.5 if method == "ties" else None
    agree(model, params, weighted_sum(pairs, [-0.7], method, density=density))


def test_factors_cut_at_a_quantile():
    model, _, _ = built(7, (2, 2), [NAMES] * 2)
    for name, clamp in (("whole", None), ("sum", 0.8)):
        model.add_weighted_adapter(
            ["0", "1"], [1.0, 0.5], name, combination_type="svd", svd_rank=2, svd_clamp=clamp
        )
    for name in NAMES:
        module = getattr(model.base_model.model, name)
        whole, cut = factors(module, name, "whole"), factors(module, name, "sum")
        # from their own factors, since the sign of a singular pair is free
        ours = clamped(whole["a"], whole["b"], 0.8)
        jax.tree.map(np.testing.assert_allclose, dict(zip("ab", ours, strict=True)), cut)


def test_a_sum_of_rank_stabilised_adapters_has_scale_one():
    """peft's merged config stays rank-stabilised, so its sum comes out sqrt(rank) too large."""
    config = peft.LoraConfig(
        r=4, lora_alpha=2.0, use_rslora=True, target_modules=["up"], init_lora_weights=False
    )
    model = peft.get_peft_model(Theirs(8, 5, 6, (3, 3)), config, adapter_name="0")
    model.add_weighted_adapter(["0"], [1.0], "sum", combination_type="linear")
    module = model.base_model.model.up
    theirs, single = (kernel(module.get_delta_weight(name), "up") for name in ("sum", "0"))
    np.testing.assert_allclose(theirs, 2 * single, atol=1e-9)
    params = {"w": kernel(module.base_layer.weight, "up")}
    sites = lj.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
    rules = {"w": lj.lora(rank=4, alpha=2.0, rslora=True)}
    frozen, _ = lj.attach(jax.random.key(0), params, rules, sites)
    made = weighted_sum([(frozen, {"w": factors(module, "up", "0")})], [1.0], "linear")
    np.testing.assert_allclose(lj.merge(*made)["w"] - params["w"], single, atol=1e-9)
