"""A method over a packed base is the method on the dequantised kernel."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io.native import NOTES, WEIGHTS, load_adapter, save_adapter
from lora_jax.methods import fixed
from lora_jax.quant import int8, loftq, nf4, quantized

X, W = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(7, 40), (40, 24)]))
IDS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
METHODS = {
    "lora": lj.lora(rank=3, alpha=5.0),
    "lora_fa": lj.lora(rank=3, freeze_a=True),
    "dora": lj.dora(rank=3),
    "dora_through_norm": lj.dora(rank=3, detach_norm=False),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def apply(params, x):
    return jnp.tanh(x @ params["w"])


SITES = lj.find_sites(apply, {"w": W}, X)


def attached(method, w=W, moved=0.1):
    sites = SITES if w.dtype == W.dtype else lj.find_sites(apply, {"w": w}, X)
    frozen, trained = lj.attach(jax.random.key(5), {"w": w}, {"w": method}, sites)
    return frozen, jax.tree.map(lambda x: x + jnp.asarray(moved, x.dtype), trained)


def rounded(w, storage):
    """The dense kernel that a storage stands for."""
    return storage.dequantise(storage.quantise(w, {}), w.shape).astype(w.dtype)


def outcome(frozen, trained):
    @jax.jit
    def run(frozen, trained):
        loss = lambda t: jnp.sum(lj.factored(apply)(lj.bind(frozen, t), X) ** 2)  # noqa: E731
        return jax.value_and_grad(loss)(trained)

    return run(frozen, trained)


@every_method
@pytest.mark.parametrize("storage", [nf4(), nf4(32, double=False), int8()], ids=repr)
def test_it_is_the_method_on_the_dequantised_kernel(method, storage):
    ours = attached(quantized(method, storage))
    dense = attached(method, rounded(W, storage))
    jax.tree.map(np.testing.assert_array_equal, ours[1], dense[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
        outcome(*ours),
        outcome(*dense),
    )
    merged = lj.merge(*ours)["w"], lj.merge(*dense)["w"]
    np.testing.assert_array_equal(*merged)


def test_a_fresh_adapter_is_the_dequantised_base():
    for method in METHODS.values():
        frozen, trained = attached(quantized(method, nf4()), moved=0)
        y = lj.factored(apply)(lj.bind(frozen, trained), X)
        np.testing.assert_allclose(y, apply({"w": rounded(W, nf4())}, X), atol=2e-6)


def test_a_bfloat16_base_is_cast_once():
    w = W.astype(jnp.bfloat16)
    frozen, trained = attached(quantized(METHODS["lora"], nf4()), w)
    merged = lj.merge(frozen, trained)["w"]
    full = nf4().dequantise(nf4().quantise(w, {}), w.shape)
    update = 5 / 3 * trained["w"]["a"] @ trained["w"]["b"]
    assert merged.dtype == jnp.bfloat16 and trained["w"]["a"].dtype == jnp.float32
    np.testing.assert_array_equal(merged, (full + update).astype(jnp.bfloat16))


def test_no_kernel_is_held_and_all_parameters_are_counted():
    frozen, trained = attached(quantized(METHODS["lora"], nf4()))
    held = [x for x in jax.tree.leaves(frozen) if x.size >= W.size // 4]
    assert [x.dtype for x in held] == ["uint8"]
    assert f"all params: {W.size + 3 * 64}" in lj.summary(frozen, trained).replace(",", "")


def saved_kernels(function, frozen, trained):
    """The floating-point arrays of a kernel's size that a backward pass would find kept."""
    _, pull = jax.vjp(function, trained)
    sites = [node.site for node in lj.adapted(frozen).values()]
    kernels = {(site.d_in, site.d_out) for site in sites}
    kernels |= {shape[::-1] for shape in kernels}
    floats = [x for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
    return [x.shape for x in floats if x.shape[-2:] in kernels]


@every_method
def test_the_backward_pass_keeps_no_kernel(method):
    frozen, trained = attached(quantized(method, nf4()))

    def loss(x, trained):
        return lj.factored(apply)(lj.bind(frozen, trained), x)

    _, pull = jax.vjp(loss, X, trained)
    floats = [x for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert not [x.shape for x in floats if x.size >= W.size]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "tied"), [("none", True), ("full", False)])
def test_scanned_layers_keep_no_kernel_either(remat, tied):
    model = tiny_llama.model(tie_word_embeddings=tied)
    model = type(model)(model.config, model.params, remat=remat)
    sites = lj.find_sites(model.apply, model.params, IDS)
    targets = {path: path.split("/")[-2] in ("q_proj", "down_proj", "embed") for path in sites}
    methods = {True: quantized(METHODS["lora"], nf4()), False: quantized(fixed(), nf4())}
    rules = {path: methods[target] for path, target in targets.items()}
    frozen, trained = lj.attach(jax.random.key(0), model.params, rules, sites)
    trained = jax.tree.map(lambda x: x + 0.05, trained)

    def run(transform):
        return lambda t: jnp.sum(jnp.sin(transform(model.apply)(lj.bind(frozen, t), IDS)))

    assert not saved_kernels(run(lj.factored), frozen, trained)
    ours, theirs = (jax.jit(jax.value_and_grad(run(t)))(trained) for t in TRANSFORMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


TRANSFORMS = lj.factored, lj.materialised


def test_qpissa_quantises_the_residual():
    start = lj.lora(rank=4, alpha=8.0, init="pissa")
    plain, packed = (lj.attach(jax.random.key(5), {"w": W}, {"w": m}, SITES) for m in
                     (start, quantized(start, nf4())))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, plain[1], packed[1])
    residual = lj.adapted(plain[0])["w"].frozen["w"]
    update = 2 * packed[1]["w"]["a"] @ packed[1]["w"]["b"]
    merged = lj.merge(*packed)["w"]
    np.testing.assert_allclose(merged, rounded(residual, nf4()) + update, atol=1e-5)
    gap = [jnp.linalg.norm(x - W) for x in (merged, rounded(W, nf4()))]
    assert gap[0] < gap[1]


SAVED = {
    **METHODS,
    "fixed": fixed(),
    "pissa": lj.lora(rank=3, init="pissa"),
    "each layer": None,
}
WRAPS = {
    "nf4": lambda method: quantized(method, nf4()),
    "int8": lambda method: quantized(method, int8()),
}


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("name", SAVED)
def test_files_hold_the_adapter_alone_and_give_the_same_bits(name, wrap, tmp_path):
    params = {"layers": jax.random.normal(jax.random.key(3), (2, 32, 32))}
    sites = lj.find_sites(scanned, params, jnp.ones((2, 32)))
    method = SAVED[name]
    rule = wrap(method) if method else [wrap(lj.lora(rank=1)), wrap(lj.lora(rank=2))]
    start = jax.jit(lambda p: lj.attach(jax.random.key(0), p, {"layers": rule}, sites))
    for frozen, trained in (
        start(params),
        lj.attach(jax.random.key(0), params, {"layers": rule}, sites),
    ):
        folder = save_adapter(tmp_path / "a", frozen, trained)
        again = load_adapter(folder, params, sites)
        jax.tree.map(np.testing.assert_array_equal, (frozen, trained), again)
        notes = json.loads((folder / NOTES).read_text())["adapted"]["layers"]["method"]
        assert (notes["name"] if method else notes[0]["name"]) == "quantized"
        assert (folder / WEIGHTS).stat().st_size < 6000


def loftq_error(steps, scale="exact", alpha=32.0):
    inner = lj.lora(rank=4, alpha=alpha)
    method = loftq(inner, nf4(double=False), steps=steps, scale=scale)
    frozen, trained = attached(method, moved=0)
    node = lj.adapted(frozen)["w"]
    base = nf4(double=False).dequantise(
        {name: node.frozen[f"w.{name}"] for name in ("codes", "absmax")}, W.shape
    )
    return float(jnp.linalg.norm(lj.merge(frozen, trained)["w"] - W)), W - base


def test_loftq_leaves_the_tail_of_what_the_codes_lose():
    plain, _ = loftq_error(0)
    errors = []
    for steps in (1, 2, 5):
        error, lost = loftq_error(steps)
        tail = np.linalg.svd(lost, compute_uv=False)[4:]
        np.testing.assert_allclose(error, np.sqrt((tail**2).sum()), rtol=1e-4)
        errors.append(error)
    assert plain > errors[0] > errors[1] > errors[2]


def test_loftq_as_peft_scales_it_needs_a_scale_of_one():
    assert loftq_error(1, "peft", alpha=4.0)[0] == pytest.approx(loftq_error(1)[0], rel=1e-5)
    assert loftq_error(1, "peft")[0] > loftq_error(0)[0]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_loftq_is_saved_and_read(steps, tmp_path):
    method = loftq(lj.lora(rank=4, freeze_a=True), nf4(), steps=steps)
    made = attached(method)
    again = load_adapter(save_adapter(tmp_path / "a", *made), {"w": W}, SITES)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    assert lj.adapted(again[0])["w"].methods == method


def test_experts_of_fewer_ranks_and_equal_configurations():
    method = quantized(lj.lora(rank=4, active_experts=2), nf4())
    assert method == quantized(lj.lora(rank=4, active_experts=2), nf4())
    assert method.forward == quantized(lj.lora(rank=4, alpha=1.0, active_experts=2), nf4()).forward
    assert method != quantized(lj.lora(rank=4, active_experts=2), nf4(32))

    def run(params, x):
        return jnp.einsum("ecd,edf->ecf", x, params["w"])

    params, x = {"w": jax.random.normal(jax.random.key(0), (3, 8, 6))}, jnp.ones((3, 2, 8))
    sites = lj.find_sites(run, params, x)
    _, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    assert trained["w"]["a"].shape == (3, 8, 2)


def test_an_index_out_of_range_is_as_in_the_base():
    def take(params, ids):
        return jnp.take(params["w"], ids, axis=0)

    ids = jnp.asarray([1, 40, 39])
    sites = lj.find_sites(take, {"w": W}, ids)
    frozen, trained = lj.attach(
        jax.random.key(0), {"w": W}, {"w": quantized(METHODS["lora"], nf4())}, sites
    )
    y = lj.factored(take)(lj.bind(frozen, trained), ids)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(take({"w": W}, ids)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantized(lj.full(), nf4()), "trains the parameter itself"),
        (lambda: quantized(quantized(fixed(), nf4()), nf4()), "is quantised already"),
        (lambda: quantized(nf4(), lj.lora()), "give a method and a storage"),  # type: ignore
        (lambda: quantized(lj.lora(init="lora_ga"), nf4()), "subtracts from the base"),
        (lambda: quantized(lj.lora(init="corda"), nf4()), "subtracts from the base"),
        (lambda: loftq(lj.dora(), nf4()), "give a lora without init"),
        (lambda: loftq(lj.lora(init="pissa"), nf4()), "give a lora without init"),
        (lambda: loftq(lj.lora(), nf4(), steps=-1), "give 0 or more"),
        (lambda: loftq(lj.lora(), nf4(), scale="none"), "give 'exact' or 'peft'"),
        (lambda: attached(loftq(lj.lora(rank=25), nf4())), "has 24 singular values"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_named(bad):
    with pytest.raises(InputError, match="'w' from its own values"):
        attached(quantized(fixed(), nf4()), W.at[3, 2].set(bad))
