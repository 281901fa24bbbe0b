"""LoHa and LoKr on convolutions, and their dropout, beside peft's own layers."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import methods
from lora_jax.io.peft import load_peft, save_peft
from lora_jax.operands import Operand

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings are theirs

NAMES = {f"{name}/kernel": f"{name}.weight" for name in ("conv", "line", "fc")}
LETTERS = {4: ("NCHW", "HWIO", "NCHW"), 3: ("NCH", "HIO", "NCH")}


class Net(torch.nn.Module):
    """A convolution over images, one over lines, and a linear layer, side by side."""

    def __init__(self, draw):
        super().__init__()
        channels = lambda: 2 * draw.randint(3, 8)  # noqa: E731
        window = draw.choice([(3, 2), (1, 3), (2, 2), (1, 1)])
        self.conv = torch.nn.Conv2d(channels(), channels(), window, stride=(2, 1), bias=False)
        self.line = torch.nn.Conv1d(channels(), channels(), draw.randint(1, 3), bias=False)
        self.fc = torch.nn.Linear(channels(), channels(), bias=False)

    def forward(self, image, line, x):
        return self.conv(image), self.line(line), self.fc(x)


def net(params, image, line, x):
    def convolve(x, name, strides):
        w, letters = params[name]["kernel"], LETTERS[x.ndim]
        return jax.lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=letters)

    outputs = convolve(image, "conv", (2, 1)), convolve(line, "line", (1,))
    return *outputs, x @ params["fc"]["kernel"]


def configs(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    rank = draw.randint(1 if kind == "LoHa" else 2, 3)  # theirs has strides torch refuses at 1
    shared = {"r": rank, "alpha": draw.choice([3, 8]), "use_effective_conv2d": seed % 2 == 0}
    shared |= {"target_modules": ["conv", "line", "fc"]}
    if kind == "LoHa":
        return draw, peft.LoHaConfig(**shared)
    both = draw.random() < 0.5
    shared |= {"decompose_both": both, "decompose_factor": draw.choice([-1, 2])}
    return draw, peft.LoKrConfig(**shared)


class _Nothing:
    """A context that keeps nothing: the forward pass alone is theirs."""

    def save_for_backward(self, *tensors):
        pass


@pytest.fixture(autouse=True)
def true_gradients(monkeypatch):
    """torch's own derivative of peft's formula, in place of the backward pass that peft has for it.

    That one takes, for the gradient of each `hada_w_a` of the CP form, the other core.
    """
    from peft.tuners.loha import layer

    formed = lambda *args, scale: layer.HadaWeightCP.forward(_Nothing(), *args, scale)  # noqa: E731
    monkeypatch.setattr(layer, "make_weight_cp", formed)


def test_peft_has_another_derivative_of_the_cp_form():
    from peft.tuners.loha.layer import HadaWeightCP

    torch.manual_seed(0)
    shapes = [(2, 2, 3, 2), (2, 5), (2, 4)] * 2
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = torch.autograd.grad(HadaWeightCP.apply(*tensors, torch.tensor(1.0)).sum(), tensors)
    formed = HadaWeightCP.forward(_Nothing(), *tensors, torch.tensor(1.0))
    true = torch.autograd.grad(formed.sum(), tensors)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(theirs, true, strict=True)]
    assert same == [True, False, True] * 2


def whole_on_a_line(layer):
    """Whether peft's LoKr mixes channels and window up: a whole `w2` of a line's convolution."""
    return "default" in getattr(layer, "lokr_w2", {})


def paired(kind, seed, tmp_path, **training):
    """peft's model, and ours as it is read from the files that peft's is saved to."""
    draw, config = configs(kind, seed)
    for name, value in training.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    bare = Net(draw)
    model = peft.get_peft_model(bare, config).eval()
    layers = {name: getattr(model.base_model.model, name) for name in ("conv", "line", "fc")}
    if whole_on_a_line(layers["line"]):
        config.target_modules = ["conv", "fc"]
        bare = model.unload()
        model = peft.get_peft_model(bare, config).eval()
        layers = {name: getattr(model.base_model.model, name) for name in ("conv", "fc")}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(tmp_path / "theirs")
    base = {name: getattr(model.base_model.model, name) for name in ("conv", "line", "fc")}
    kernels = {n: getattr(layer, "base_layer", layer).weight for n, layer in base.items()}
    params = {n: {"kernel": ours(w.detach().numpy())} for n, w in kernels.items()}
    shapes = [w.shape[1] for w in kernels.values()]
    rng = np.random.default_rng(seed)
    x = [(2, shapes[0], 7, 5), (2, shapes[1], 6), (3, shapes[2])]
    x = [rng.standard_normal(shape, np.float32) for shape in x]
    sites = lj.find_sites(net, params, *x)
    read = load_peft(tmp_path / "theirs", params, sites, names=NAMES)
    return model, layers, params, sites, read, x


def ours(weight):
    """A kernel of torch's as ours, the window first."""
    return jnp.asarray(np.transpose(weight, (*range(2, weight.ndim), 1, 0)))


def near(mine, other, rounding=2e-5):
    other = other.detach().numpy() if hasattr(other, "detach") else np.asarray(other)
    np.testing.assert_allclose(mine, other, rtol=0, atol=rounding * max(np.abs(other).max(), 1e-2))


def gradients(layers):
    """peft's own, by the names that ours have."""
    found = {}
    for name, layer in layers.items():
        own = dict(layer.named_parameters())
        found[name] = {
            n.removesuffix(".default"): p.grad for n, p in own.items() if p.requires_grad
        }
    return found


def as_theirs(folder, frozen, grads):
    """Our gradients in PEFT's layout: written as an adapter is."""
    from safetensors.numpy import load_file

    save_peft(folder, frozen, grads, base_name="x", names=NAMES, task_type=None)
    file = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in file.items()}


def both_agree(model, layers, read, x, folder, key=None):
    frozen, trained = read
    theirs = model(*map(torch.tensor, x))
    weights = [np.random.default_rng(9).standard_normal(y.shape, np.float32) for y in theirs]
    forward = lambda t: lj.factored(net)(lj.bind(frozen, t, key), *x)  # noqa: E731
    mine, pull = jax.vjp(forward, trained)
    for one, other in zip(mine, theirs, strict=True):
        near(one, other)
    pairs = zip(theirs, weights, strict=True)
    sum((y * torch.tensor(w)).sum() for y, w in pairs).backward()
    written = as_theirs(folder, frozen, pull(tuple(map(jnp.asarray, weights)))[0])
    wanted = {f"{n}.{k}": g for n, own in gradients(layers).items() for k, g in own.items()}
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        near(written[name], value, 1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_outputs_gradients_and_files(kind, seed, tmp_path):
    model, layers, params, _, read, x = paired(kind, seed, tmp_path)
    both_agree(model, layers, read, x, tmp_path / "gradients")
    merged = lj.merge(*read)
    save_peft(tmp_path / "ours", *read, base_name="x", names=NAMES, task_type=None)
    bare = model.unload()
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "ours").merge_and_unload()
    for name in params:
        near(merged[name]["kernel"], ours(getattr(again, name).weight.detach().numpy()))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_starts_are_of_the_same_size(kind, seed, tmp_path):
    draw, config = configs(kind, 2 * seed)
    config.r = 2
    config.target_modules = ["conv"]
    net_ = Net(draw)
    net_.conv = torch.nn.Conv2d(36, 30, (3, 2), bias=False)
    model = peft.get_peft_model(net_, config)
    theirs = dict(model.base_model.model.conv.named_parameters())
    params = {"conv": {"kernel": ours(net_.conv.base_layer.weight.detach().numpy())}}
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=LETTERS[4]
    )
    sites = lj.find_sites(apply, params, jnp.ones((1, 36, 4, 4)))
    hyper = {"effective_conv": True}
    if kind == "LoKr":
        hyper |= {"factor": config.decompose_factor, "decompose_both": config.decompose_both}
    method = getattr(methods, kind.lower())(rank=2, **hyper)
    frozen, trained = lj.attach(jax.random.key(0), params, {".*": method}, sites)
    written = as_theirs(tmp_path / "x", frozen, trained)
    assert any("_t" in name for name in written)
    zeros = 0
    for name, value in theirs.items():
        if not value.requires_grad:
            continue
        value, mine = value.detach().numpy(), written["conv." + name.removesuffix(".default")]
        assert mine.shape == value.shape
        zeros += not mine.any()
        assert mine.any() == value.any() and (np.ptp(mine) == 0) == (np.ptp(value) == 0), name
        if value.any() and value.size > 20:
            assert 0.7 < np.abs(mine).max() / np.abs(value).max() < 1.4, name
    assert zeros == 1


def test_a_whole_factor_on_a_line_is_refused(tmp_path):
    params = {"line": {"kernel": jnp.ones((3, 4, 6))}}
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["line"]["kernel"], (1,), "VALID", dimension_numbers=LETTERS[3]
    )
    sites = lj.find_sites(apply, params, jnp.ones((1, 4, 9)))
    adapter = lj.attach(jax.random.key(0), params, {".*": methods.lokr(rank=4)}, sites)
    with pytest.raises(lj.InputError, match=r"mixes channels and window up; give rank < 1"):
        save_peft(tmp_path / "x", *adapter, base_name="x", names=NAMES, task_type=None)
    torch.manual_seed(0)  # theirs is no Kronecker product there
    config = peft.LoKrConfig(r=4, target_modules=["0"], init_weights=False)
    line = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, bias=False))
    layer = peft.get_peft_model(line, config).base_model.model[0]
    w1, w2 = (getattr(layer, f"lokr_w{i}")["default"].detach() for i in (1, 2))
    product = torch.einsum("ac,bdk->abcdk", w1, w2).reshape(6, 4, 3) * layer.scaling["default"]
    assert not torch.allclose(product, layer.get_delta_weight("default"))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_the_formula_of_rank_dropout_given_a_mask(kind, scaled, tmp_path, monkeypatch):
    more = {"rank_dropout_scale": scaled} if kind == "LoKr" else {}
    model, layers, *_, read, x = paired(kind, 2, tmp_path, rank_dropout=0.4, **more)
    for layer in layers.values():  # a config that is read gives the method with its dropout
        assert layer.rank_dropout["default"] == 0.4
    each = [node.method.hyper for node in lj.adapter.adapted(read[0]).values()]
    assert {hyper["rank_dropout"] for hyper in each} == {0.4}
    kept = lambda width: np.arange(width) % 3 != 1  # noqa: E731
    monkeypatch.setattr(Operand, "mask", lambda self, rate, shape, draw=0: _mask(rate, shape, kept))
    monkeypatch.setattr(torch, "rand", lambda width: torch.tensor(0.9 * kept(width) + 0.1))
    both_agree(model.train(), layers, read, x, tmp_path / "gradients", jax.random.key(0))


def _mask(rate, shape, kept):
    return jnp.asarray(kept(*shape)) if rate else None


@pytest.mark.parametrize("drawn", [0.1, 0.9])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_the_formula_of_module_dropout_given_a_draw(kind, drawn, tmp_path, monkeypatch):
    model, layers, params, _, read, x = paired(kind, 2, tmp_path, module_dropout=0.4)
    frozen, trained = read
    kept = lambda width: np.full(width, drawn > 0.4)  # noqa: E731
    monkeypatch.setattr(Operand, "mask", lambda self, rate, shape, draw=0: _mask(rate, shape, kept))
    monkeypatch.setattr(torch, "rand", lambda width: torch.full((width,), drawn))
    theirs = model.train()(*map(torch.tensor, x))
    mine = lj.factored(net)(lj.bind(frozen, trained, jax.random.key(0)), *x)
    named = zip(params, mine, theirs, net(params, *x), strict=True)
    for name, one, other, plain in named:
        near(one, other)
        skipped = drawn < 0.4 or name not in layers
        assert np.allclose(one, plain, atol=1e-5) == skipped


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_configs_keep_their_dropout(kind, tmp_path):
    more = {"rank_dropout": 0.25, "module_dropout": 0.125}
    more |= {"rank_dropout_scale": True} if kind == "LoKr" else {}
    *_, read, _ = paired(kind, 2, tmp_path, **more)
    for method in (node.method for node in lj.adapter.adapted(read[0]).values()):
        assert {name: method.hyper[name] for name in more} == more
    save_peft(tmp_path / "ours", *read, base_name="x", names=NAMES, task_type=None)
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert {name: getattr(config, name) for name in more} == more
    assert config.use_effective_conv2d
