"""Every start gives what live peft's gives on the same weight: products, projectors, magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import calibrate, inits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
corda = pytest.importorskip("peft.tuners.lora.corda")
eva = pytest.importorskip("peft.tuners.lora.eva")
loraga = pytest.importorskip("peft.tuners.lora.loraga")
config = pytest.importorskip("peft.tuners.lora.config")
saved = pytest.importorskip("peft.utils.save_and_load")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
SHAPES = [(13, 9, 3, 7.0), (6, 11, 2, 2.0), (16, 16, 4, 4.0)]  # d_in, d_out, rank, alpha
shapes = pytest.mark.parametrize(("d_in", "d_out", "rank", "alpha"), SHAPES)


class Net(torch.nn.Module):
    """One linear layer, under the name that peft looks for."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.w = torch.nn.Linear(d_in, d_out, bias=False)

    def forward(self, x):
        return self.w(x)


class Two(torch.nn.Module):
    """Layers whose inputs vary unequally."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(6, 8, bias=False)
        self.v = torch.nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.v(torch.tanh(self.w(x)))


def theirs(net, rank, alpha, init, targets=("w",), **options):
    """(a, b, base, scale) of peft's layer, in our layout, and the wrapped model."""
    options = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), **options}
    wrapped = peft.get_peft_model(net, peft.LoraConfig(init_lora_weights=init, **options))
    return parts(wrapped.base_model.model.w), wrapped


def parts(layer):
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    arrays = [x.detach().numpy().T for x in (a, b, layer.base_layer.weight)]
    return *arrays, layer.scaling["default"]


def apply(params, x):
    return x @ params["w"]


def ours(net, rank, alpha, init, **options):
    """(a, b, base, scale) of our start on the same weight, taken before peft changes it."""
    params = {"w": jnp.asarray(net.w.weight.detach().numpy().T.copy())}
    x = jnp.ones((2, params["w"].shape[0]))
    sites = lj.find_sites(apply, params, x)
    method = lj.lora(rank=rank, alpha=alpha, init=init, **options)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    found = {**frozen["w"].frozen, **trained["w"]}
    return found["a"], found["b"], found["w"], found["scale"]


def same(x, y, tolerance=2e-5):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-3))


def agree(found, wanted, tolerance=2e-5):
    """Scale, base and product are theirs, and each component up to its sign."""
    (a, b, w, scale), (a_t, b_t, w_t, scale_t) = found, wanted
    assert float(scale) == pytest.approx(scale_t)
    same(w, w_t, tolerance)
    same(np.asarray(a) @ np.asarray(b), a_t @ b_t, tolerance)
    same(abs(np.asarray(a)), abs(a_t), 10 * tolerance)
    same(abs(np.asarray(b)), abs(b_t), 10 * tolerance)


@shapes
@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_from_the_kernel(d_in, d_out, rank, alpha, init, rslora):
    torch.manual_seed(rank)
    net = Net(d_in, d_out)
    found = ours(net, rank, alpha, init, rslora=rslora)
    wanted, wrapped = theirs(net, rank, alpha, init, use_rslora=rslora)
    agree(found, wanted)
    if init == "mica":
        names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        assert len(names) == 1 and "lora_A" in names[0]


@shapes
def test_randomised_pissa(d_in, d_out, rank, alpha):
    """The same subspace after enough rounds, where the spectrum has a gap."""
    torch.manual_seed(rank)
    net = Net(d_in, d_out)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(net.w.weight, full_matrices=False)
        s[rank:] *= 0.3
        net.w.weight.copy_(u * s @ vh)
    found = ours(net, rank, alpha, "pissa_niter_16")
    agree(found, theirs(net, rank, alpha, "pissa_niter_16")[0], 1e-4)


def test_orthogonal_has_the_same_spread():
    torch.manual_seed(0)
    net = Net(400, 300)
    found = ours(net, 8, 8.0, "orthogonal")
    wanted, _ = theirs(net, 8, 8.0, "orthogonal")
    for mine, their in zip(found[:2], wanted[:2], strict=True):
        assert np.std(mine) == pytest.approx(np.std(their), rel=0.1)
        assert np.linalg.matrix_rank(mine) == np.linalg.matrix_rank(their) == 4
    same(found[2], wanted[2])


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_random_starts_have_the_same_spread(init):
    torch.manual_seed(0)
    net = Net(600, 30)
    found = ours(net, 16, 8.0, init)
    wanted, _ = theirs(net, 16, 8.0, True if init == "kaiming" else init)
    assert np.std(found[0]) == pytest.approx(np.std(wanted[0]), rel=0.05)
    assert np.abs(found[0]).max() == pytest.approx(np.abs(wanted[0]).max(), rel=0.2)
    assert not np.any(found[1]) and not np.any(wanted[1])


def statistics(gather, net, batches, function=apply):
    params = {"w": jnp.asarray(net.w.weight.detach().numpy().T.copy())}
    batches = [jnp.asarray(x.numpy()) for x in batches]
    sites = lj.find_sites(apply, params, batches[0])
    return gather(function, params, batches, "w", sites)


@shapes
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(d_in, d_out, rank, alpha, mode):
    torch.manual_seed(rank)
    net, batches = Net(d_in, d_out), [torch.randn(1, 40, d_in) for _ in range(3)]
    moments = statistics(calibrate.input_moments, net, batches)
    found = ours(net, rank, alpha, inits.corda(moments, mode))
    lora_config = peft.LoraConfig(
        init_lora_weights="corda",
        r=rank,
        lora_alpha=alpha,
        target_modules=["w"],
        corda_config=config.CordaConfig(corda_method=mode),
    )
    corda.preprocess_corda(net, lora_config, lambda: [net(x) for x in batches])
    wrapped = peft.get_peft_model(net, lora_config)
    agree(found, parts(wrapped.base_model.model.w), 2e-4)


@shapes
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga(d_in, d_out, rank, alpha, direction):
    torch.manual_seed(rank)
    net, batches = Net(d_in, d_out), [torch.randn(30, d_in) for _ in range(2)]
    original = net.w.weight.detach().numpy().T.copy()
    loss = lambda params, x: jnp.mean(jnp.sin(apply(params, x)))  # noqa: E731
    gradients = statistics(calibrate.kernel_gradients, net, batches, loss)
    found = ours(net, rank, alpha, inits.lora_ga(gradients, direction, variant="peft"))
    lora_config = peft.LoraConfig(
        init_lora_weights="lora_ga",
        r=rank,
        lora_alpha=alpha,
        target_modules=["w"],
        lora_ga_config=peft.LoraGAConfig(direction=direction),
    )

    def step():
        for x in batches:
            torch.sin(net(x.requires_grad_())).mean().backward()

    loraga.preprocess_loraga(net, lora_config, step)
    wrapped = peft.get_peft_model(net, lora_config)
    wanted = parts(wrapped.base_model.model.w)
    for mine, their in zip(found[:2], wanted[:2], strict=True):  # each sign on each side is free
        same(abs(np.asarray(mine)), abs(their), 1e-3)
    a, b, w, scale = map(np.asarray, found)
    same(w + scale * a @ b, original)
    same(wanted[2] + wanted[3] * wanted[0] @ wanted[1], original)


@pytest.mark.parametrize("whiten", [False, True])
def test_eva(whiten):
    """Ranks, scales and components, on one batch; theirs see it twice, to know they converged."""
    torch.manual_seed(0)
    net = Two()
    x = torch.randn(64, 6) * torch.tensor([1.5, 1.3, 1.1, 0.9, 0.7, 0.1])
    with torch.no_grad():  # the second layer's inputs vary in one direction, mostly
        net.w.weight.copy_(0.03 * net.w.weight + 0.2)
    params = {n: jnp.asarray(getattr(net, n).weight.detach().numpy().T.copy()) for n in "wv"}
    two = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    inputs = jnp.asarray(x.numpy())
    sites = lj.find_sites(two, params, inputs)
    scatters = calibrate.input_scatters(two, params, [inputs, inputs], ".*", sites)
    rules = inits.eva_rules(scatters, lj.lora(rank=3, alpha=5.0), whiten=whiten)
    frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)

    options = peft.EvaConfig(whiten=whiten)
    lora_config = peft.LoraConfig(
        init_lora_weights="eva", r=3, lora_alpha=5.0, target_modules=["w", "v"], eva_config=options
    )
    wrapped = peft.get_peft_model(net, lora_config)
    eva.initialize_lora_eva_weights(
        wrapped,
        [{"x": x}],
        forward_fn=lambda model, batch: model(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    for name in "wv":
        layer = getattr(wrapped.base_model.model, name)
        a, b, w, scale = parts(layer)
        mine = {**frozen[name].frozen, **trained[name]}
        assert mine["a"].shape == a.shape
        assert float(mine["scale"]) == pytest.approx(scale)
        np.testing.assert_array_equal(mine["w"], w)
        same(mine["a"] @ mine["a"].T, a @ a.T, 2e-3)
        assert not b.any() and not np.any(mine["b"])
    assert {name: trained[name]["a"].shape[1] for name in "wv"} == {"w": 5, "v": 1}


def test_a_trained_residual_adapter_converts_as_peft_converts(tmp_path):
    """Their file on the original base (rank 2r, alpha 2 alpha) holds our `factors`."""
    torch.manual_seed(1)
    net = Net(13, 9)
    original = net.w.weight.detach().numpy().T.copy()
    params = {"w": jnp.asarray(original)}
    sites = lj.find_sites(apply, params, jnp.ones((2, 13)))
    method = lj.lora(rank=3, alpha=7.0, init="pissa")
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    _, wrapped = theirs(net, 3, 7.0, "pissa")
    wrapped.save_pretrained(tmp_path / "start")
    layer = wrapped.base_model.model.w
    with torch.no_grad():
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            p.add_(0.1 * torch.randn_like(p))
    a, b, _, _ = parts(layer)
    # Signs of a decomposition are arbitrary, so the start and what was trained are both theirs.
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    file = saved.load_peft_weights(str(tmp_path / "plain"), device="cpu")
    lora_a, lora_b = (next(v for k, v in file.items() if f"lora_{s}" in k).numpy() for s in "AB")
    read = saved.load_peft_weights(str(tmp_path / "start"), device="cpu")
    a_0, b_0 = (next(v for k, v in read.items() if f"lora_{s}" in k).numpy().T for s in "AB")
    fixed = {**frozen["w"].frozen, "a_0": a_0, "b_0": b_0}
    fixed |= method.rebuild(params["w"], fixed)
    mine = method.factors(fixed, {"a": a, "b": b})
    assert mine[0].shape == (13, 6)
    same(mine[0] @ mine[1], 7 / 3 * lora_a.T @ lora_b.T)
    same(original + mine[0] @ mine[1], method.weight(fixed, {"a": a, "b": b}))
