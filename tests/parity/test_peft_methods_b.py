"""HRA, OFT, BOFT, (IA)^3 and the encoders of virtual tokens against peft's own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

import lora_jax as lj
from lora_jax.methods import boft, hra, ia3, ia3_rules, oft
from lora_jax.methods.boft import butterfly
from lora_jax.prompts import p_tuning, prefix_tuning

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs


def close(ours, theirs, tolerance):
    theirs = theirs.detach().numpy()
    size = max(np.abs(theirs).max(), 1e-3)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=tolerance * size)


# Our method, peft's configuration, and our arrays from peft's parameters by name.
CASES = {
    "hra": (hra(4), dict(r=4), "HRAConfig", {"u": "hra_u"}),
    "hra, odd": (hra(3), dict(r=3), "HRAConfig", {"u": "hra_u"}),
    "hra, gs": (hra(4, apply_gs=True), dict(r=4, apply_GS=True), "HRAConfig", {"u": "hra_u"}),
    "oft": (oft(4), dict(oft_block_size=4), "OFTConfig", {"q": "oft_R"}),
    "oft, exact": (
        oft(4, cayley="exact"),
        dict(oft_block_size=4, use_cayley_neumann=False),
        "OFTConfig",
        {"q": "oft_R"},
    ),
    "oft, shared": (
        oft(2, block_share=True),
        dict(oft_block_size=2, block_share=True),
        "OFTConfig",
        {"q": "oft_R"},
    ),
    "oft, ball": (
        oft(4, coft=True, eps=0.3),
        dict(oft_block_size=4, coft=True, eps=0.3),
        "OFTConfig",
        {"q": "oft_R"},
    ),
    "boft": (boft(4), dict(boft_block_size=4), "BOFTConfig", {"r": "boft_R", "s": "boft_s"}),
    "ia3": (None, dict(feedforward_modules=[]), "IA3Config", {"l": "ia3_l"}),
    "ia3, input": (
        ia3(feedforward=True),
        dict(feedforward_modules=["k"]),
        "IA3Config",
        {"l": "ia3_l"},
    ),
}


class Dense(torch.nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.k = torch.nn.Linear(d_in, d_out)

    def forward(self, x):
        return self.k(x)


def apply(params, x):
    return x @ params["k"]["kernel"] + params["k"]["bias"][None, :]


def theirs(options, config, d_in, d_out):
    """A wrapped layer whose adapter has moved away from its start, and its arrays by name."""
    base = Dense(d_in, d_out)
    w, b = (x.detach().numpy().copy() for x in (base.k.weight, base.k.bias))
    model = peft.get_peft_model(base, getattr(peft, config)(target_modules=["k"], **options))
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in found.values():
            p.add_(0.3 * torch.randn_like(p))
    return model, {"k": {"kernel": jnp.asarray(w.T), "bias": jnp.asarray(b)}}, found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_forward_gradients_and_merge(name, seed):
    method, options, config, names = CASES[name]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    d_in, d_out, rows = 4 * int(rng.integers(2, 7)), int(rng.integers(3, 20)), 5
    model, params, found = theirs(options, config, d_in, d_out)
    x, g = (rng.standard_normal((rows, d), np.float32) for d in (d_in, d_out))
    sites = lj.find_sites(apply, params, jnp.asarray(x))
    rules = {"k/kernel": method} if method else ia3_rules(sites, params, "k/kernel")
    frozen, start = lj.attach(jax.random.key(0), params, rules, sites)
    match = {ours: next(p for n, p in found.items() if f".{t}." in n) for ours, t in names.items()}
    shapes = start["k/kernel"]
    own = {n: jnp.asarray(p.detach().numpy().reshape(shapes[n].shape)) for n, p in match.items()}
    trained = start | {"k/kernel": own}
    y, pull = jax.vjp(lambda t: lj.factored(apply)(lj.bind(frozen, t), x), trained)
    grads = pull(jnp.asarray(g))[0]["k/kernel"]
    reference = model(torch.tensor(x))
    reference.backward(torch.tensor(g))
    close(y, reference, 1e-5)
    close(apply(lj.merge(frozen, trained), x), reference, 1e-5)
    for n, p in match.items():
        close(grads[n], p.grad.reshape(grads[n].shape), 1e-4)


def test_fresh_arrays_have_peft_s_shapes_and_spread():
    found = theirs(dict(r=4), "HRAConfig", 400, 3)[2]
    (u,) = found.values()
    ours = hra(4).init(jax.random.key(0), jnp.zeros((400, 3)))[1]["u"]
    assert ours.shape == u.shape
    np.testing.assert_array_equal(ours[:, ::2], ours[:, 1::2])
    np.testing.assert_allclose(ours.std(), (3 * 400) ** -0.5, rtol=0.1)


@pytest.mark.parametrize(("d_in", "block", "factors"), [(24, 4, 2), (32, 4, 3), (24, 2, 3)])
def test_butterfly_orders_are_peft_s(d_in, block, factors):
    """peft has several factors on CUDA alone; its permutations and their use are compared here."""
    from peft.tuners.boft.layer import BOFTLayer

    layer, total = BOFTLayer.__new__(BOFTLayer), np.eye(d_in)
    r = 0.5 * np.random.default_rng(0).standard_normal((factors, d_in // block, block, block))
    for i in range(factors):
        blocks = d_in // block // 2**i
        order = BOFTLayer.block_butterfly_perm(layer, d_in, blocks, block // 2, factors - 1)
        np.testing.assert_array_equal(butterfly(d_in, block, i), order)
        p = BOFTLayer.perm2mat(layer, order).double()
        turns = BOFTLayer.cayley_batch(layer, torch.tensor(r[i]).float()).double()
        total = (p @ torch.block_diag(*turns) @ p.T).numpy() @ total
    trained = {"r": jnp.asarray(r, jnp.float32), "s": jnp.ones(d_in)}
    ours = boft(block, factors=factors).weight({"w": jnp.eye(d_in)}, trained)
    np.testing.assert_allclose(ours, total, atol=2e-6)


def torch_linear(layer):
    return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoder_of_p_tuning(kind):
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(
        encoder_reparameterization_type=kind,
        encoder_hidden_size=7,
        token_dim=16,
        num_virtual_tokens=4,
        num_transformer_submodules=1,
    )
    encoder = peft.PromptEncoder(config)
    prompt = {"embedding": encoder.embedding.weight.detach().numpy()}
    linear = [m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)]
    prompt["mlp"] = {str(i): torch_linear(layer) for i, layer in enumerate(linear)}
    if kind == "LSTM":
        state = {n: v.detach().numpy() for n, v in encoder.lstm_head.named_parameters()}
        prompt["lstm"] = {
            str(i): {
                way: {
                    "input": state[f"weight_ih_l{i}{end}"].T,
                    "recurrent": state[f"weight_hh_l{i}{end}"].T,
                    "bias": state[f"bias_ih_l{i}{end}"] + state[f"bias_hh_l{i}{end}"],
                }
                for way, end in (("forward", ""), ("backward", "_reverse"))
            }
            for i in range(2)
        }
    made = p_tuning(tiny_llama.model(), 4, jax.random.key(0), hidden=7, encoder=kind.lower())
    shapes = jax.tree.map(jnp.shape, made.params["prompt"])
    assert jax.tree.map(jnp.shape, prompt) == shapes
    close(made.encode(prompt), encoder(torch.arange(4)[None])[0], 1e-5)


def test_the_encoder_of_prefix_tuning():
    torch.manual_seed(0)
    model = tiny_llama.model()  # 3 layers, 2 kv heads of 6
    config = peft.PrefixTuningConfig(
        prefix_projection=True,
        encoder_hidden_size=7,
        token_dim=12,
        num_layers=3,
        num_virtual_tokens=4,
    )
    encoder = peft.PrefixEncoder(config)
    linear = [m for m in encoder.transform if isinstance(m, torch.nn.Linear)]
    prompt = {
        "embedding": encoder.embedding.weight.detach().numpy(),
        "mlp": {str(i): torch_linear(layer) for i, layer in enumerate(linear)},
    }
    made = prefix_tuning(model, 4, jax.random.key(0), hidden=7)
    assert jax.tree.map(jnp.shape, prompt) == jax.tree.map(jnp.shape, made.params["prompt"])
    close(made.encode(prompt), encoder(torch.arange(4)[None])[0], 1e-5)
