"""Every start changes nothing, keeps its own promise, and comes back from a file bit for bit."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import inits
from lora_jax.io.native import load_adapter, save_adapter

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())
D_IN, D_OUT, RANK, ALPHA = 12, 8, 2, 6.0
SCALE = ALPHA / RANK


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return np.sin(0.37 * n**2 + k).reshape(shape)


W = closed_form((D_IN, D_OUT), 2) / 2
GRADIENT = closed_form((D_IN, D_OUT), 3)
X = closed_form((40, D_IN), 7)
CENTRED = X - X.mean(0)
DATA = {
    "lora_ga": inits.lora_ga({"w": GRADIENT}),
    "corda": inits.corda({"w": X.T @ X}),
    "corda_kpm": inits.corda({"w": X.T @ X}, mode="kpm"),
    "eva": inits.eva({"w": CENTRED.T @ CENTRED}),
}
KERNEL = ["pissa", "pissa_niter_16", "pissa_niter_1", "olora", "mica"]
RANDOM = ["kaiming", "gaussian", "orthogonal"]
RESIDUAL = [*KERNEL[:4], "lora_ga", "corda", "corda_kpm"]
ALL = [*RANDOM, *KERNEL, *DATA]


def product(params, x):
    return x @ params["w"]


def start(init, rank=RANK, alpha=ALPHA, w=W, make=lj.lora, seed=0):
    """One site's (node, trained), in the kernel's precision."""
    params = {"w": jnp.asarray(w)}
    sites = lj.find_sites(product, params, jnp.ones((3, w.shape[0]), w.dtype))
    method = make(rank=rank, alpha=alpha, init=DATA.get(init, init) if init in DATA else init)
    frozen, trained = lj.attach(jax.random.key(seed), params, {"w": method}, sites)
    return frozen, trained


def factors(frozen, trained):
    both = {**frozen["w"].frozen, **trained["w"]}
    return np.asarray(both["a"]), np.asarray(both["b"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("init", ALL)
@pytest.mark.parametrize("make", [lj.lora, lj.dora])
def test_a_fresh_adapter_changes_nothing(init, make):
    if make is lj.dora and init == "mica":
        with pytest.raises(lj.InputError, match="it freezes a factor; use it with lora"):
            lj.dora(init="mica")
        return
    frozen, trained = start(init, make=make)
    y = lj.factored(product)(lj.bind(frozen, trained), jnp.asarray(X))
    np.testing.assert_allclose(y, X @ W, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lj.merge(frozen, trained)["w"], W, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_golden(init):
    frozen, trained = start(init)
    a, b = factors(frozen, trained)
    found = {"AB": a @ b, "residual": frozen["w"].frozen["w"], "absA": abs(a), "absB": abs(b)}
    for quantity, array in found.items():
        flat = np.asarray(array).ravel()
        ours = [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]
        np.testing.assert_allclose(
            ours, GOLDEN[init][quantity], rtol=2e-6, atol=2e-6
        )  # theirs are float32


def test_pissa_leaves_the_minor_components():
    frozen, trained = start("pissa")
    values = np.linalg.svd(W, compute_uv=False)
    rest = np.linalg.svd(frozen["w"].frozen["w"], compute_uv=False)
    np.testing.assert_allclose(rest[0], values[RANK], rtol=1e-9)
    np.testing.assert_allclose((rest**2).sum(), (values[RANK:] ** 2).sum(), rtol=1e-9)
    a, b = factors(frozen, trained)
    for square in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(square, np.diag(values[:RANK] / SCALE), atol=1e-9)


def test_randomised_pissa_approaches_the_exact_one():
    exact, near, far = (
        np.matmul(*factors(*start(init))) for init in ("pissa", "pissa_niter_128", "pissa_niter_1")
    )
    np.testing.assert_allclose(near, exact, atol=1e-6)
    assert np.abs(far - exact).max() > 1e-4
    other = np.matmul(*factors(*start("pissa_niter_1", seed=1)))
    assert np.abs(far - other).max() > 1e-6  # it depends on the key


def test_olora_takes_the_first_input_features():
    frozen, trained = start("olora", alpha=float(RANK))
    np.testing.assert_allclose(frozen["w"].frozen["w"][:RANK], 0, atol=1e-12)
    a, b = factors(*start("olora"))
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-12)
    np.testing.assert_allclose(a @ b, W @ b.T @ b, atol=1e-12)


def test_mica_writes_along_the_smallest_components():
    frozen, trained = start("mica")
    assert set(trained["w"]) == {"a"} and lj.tree.count(trained) == RANK * D_IN
    a, b = factors(frozen, trained)
    _, _, right = np.linalg.svd(W)
    np.testing.assert_array_equal(a, 0)
    np.testing.assert_allclose(b.T @ b, right[-RANK:].T @ right[-RANK:], atol=1e-9)
    assert frozen["w"].frozen["w"] is not None and "a_0" not in frozen["w"].frozen


def test_orthogonal_factors_are_not_zero():
    a, b = factors(*start("orthogonal", rank=4))
    np.testing.assert_allclose(a @ b, 0, atol=1e-15)
    assert np.abs(a).max() > 0.01 < np.abs(b).max()
    with pytest.raises(lj.InputError, match="give an even rank"):
        start("orthogonal", rank=3)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_is_orthogonal_and_from_the_first_components(direction):
    DATA["ga"] = inits.lora_ga({"w": GRADIENT}, direction)
    a, b = factors(*start("ga"))
    zeta = D_OUT**0.25 / 4
    for square in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(square, zeta**2 * np.eye(RANK), atol=1e-9)
    v, _, ut = np.linalg.svd(GRADIENT, full_matrices=False)
    i, j = {
        "ArBr": ([1, 3], [0, 2]),
        "A2rBr": ([2, 3], [0, 1]),
        "ArB2r": ([0, 1], [2, 3]),
    }.get(direction, (None, None))
    if direction == "random":  # the four components, each on one side
        taken = [abs(v.T @ a).round(6) > 0.1, abs(ut @ b.T).round(6) > 0.1]
        np.testing.assert_array_equal(sum(t.sum(1) for t in taken), [1] * 4 + [0] * 4)
    else:
        np.testing.assert_allclose(abs(a), abs(zeta * v[:, i]), atol=1e-6)
        np.testing.assert_allclose(abs(b), abs(zeta * ut[j]), atol=1e-6)


def test_lora_ga_as_peft_has_it():
    DATA["ga"] = inits.lora_ga({"w": GRADIENT}, variant="peft", gamma=9)
    a, b = factors(*start("ga"))
    v, s, ut = np.linalg.svd(GRADIENT, full_matrices=False)
    np.testing.assert_allclose(abs(a), abs(v[:, :2]), atol=1e-6)
    np.testing.assert_allclose(abs(b), abs(D_OUT**0.25 / 3 * s[2:4, None] * ut[2:4]), atol=1e-6)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_ends_of_a_whole_that_is_the_kernel(mode):
    moment = X.T @ X
    DATA["all"] = inits.corda({"w": moment}, mode)
    a, b = factors(*start("all", rank=D_OUT, alpha=3.0))
    np.testing.assert_allclose(3 / D_OUT * a @ b, W, atol=1e-9)
    damped = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(D_IN)
    u, s, vt = np.linalg.svd(W.T @ damped, full_matrices=False)
    chosen = slice(RANK) if mode == "ipm" else slice(D_OUT - RANK, None)
    expected = (u[:, chosen] * s[chosen]) @ vt[chosen] @ np.linalg.inv(damped)
    a, b = factors(*start("all"))
    np.testing.assert_allclose(SCALE * a @ b, expected.T, atol=1e-9)


def test_corda_damps_until_the_inverse_is_one():
    c = np.diag([1.0] + [0.0] * 3).astype(np.float32)
    damped, inverse = inits.corda.__globals__["damped"](jnp.asarray(c))
    assert np.linalg.norm(damped @ inverse - np.eye(4)) < 0.05
    with pytest.raises(lj.InputError, match="'w' from its own values, and these give numbers"):
        DATA["broken"] = inits.corda({"w": np.full((D_IN, D_IN), np.nan)})
        start("broken")
    with pytest.raises(lj.InputError, match="look for nan or inf in the kernel or in the data"):
        DATA["broken"] = inits.eva({"w": np.full((D_IN, D_IN), np.nan)})
        start("broken")


def test_eva_takes_the_principal_components_of_centred_inputs():
    a, b = factors(*start("eva"))
    _, s, vt = np.linalg.svd(CENTRED, full_matrices=False)
    np.testing.assert_allclose(abs(a), abs(vt[:RANK].T), atol=1e-9)
    np.testing.assert_array_equal(b, 0)
    DATA["white"] = inits.eva({"w": CENTRED.T @ CENTRED}, whiten=True)
    a, _ = factors(*start("white"))
    np.testing.assert_allclose(abs(a), abs(vt[:RANK].T / np.sqrt(s[:RANK])), atol=1e-9)


@pytest.mark.parametrize("init", ALL)
def test_factors_are_those_of_the_update_on_the_original_base(init):
    frozen, trained = start(init)
    trained = jax.tree.map(lambda x: x + closed_form(x.shape, 5), trained)
    node = lj.adapted(lj.bind(frozen, trained))["w"]
    a, b = node.method.factors(node.frozen, node.trained)
    assert a.shape == (D_IN, RANK * (2 if init in RESIDUAL else 1))
    np.testing.assert_allclose(W + a @ b, lj.merge(frozen, trained)["w"], atol=1e-12)


@pytest.mark.parametrize("init", ALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_is_the_same_bit_for_bit(init, dtype, tmp_path):
    with jax.enable_x64(False):
        stacked = jnp.stack([jnp.asarray(W), jnp.asarray(2 * W[::-1])]).astype(dtype)
        params = {"w": stacked}

        def apply(params, x):
            return jax.lax.scan(lambda x, w: (jnp.pad(x @ w, ((0, 0), (0, 4))), None), x, params)[0]

        def scanned(params, x):
            return apply(params["w"], x)

        x = jnp.asarray(X, dtype)
        sites = lj.find_sites(scanned, params, x)
        method = lj.lora(rank=RANK, init=doubled(init))
        frozen, trained = lj.attach(jax.random.key(3), params, {"w": method}, sites)
        fresh = lj.factored(scanned)(lj.bind(frozen, trained), x)
        expected = np.float32(scanned(params, x))
        rounding = 1e-5 if dtype == "float32" else 5e-2
        np.testing.assert_allclose(
            np.float32(fresh), expected, atol=rounding * np.abs(expected).max()
        )
        save_adapter(tmp_path / "a", frozen, trained)
        again = load_adapter(tmp_path / "a", params, sites)
        assert again[0]["w"].frozen["w"].dtype == dtype
        jax.tree.map(np.testing.assert_array_equal, (frozen, trained), again)
        names = set((tmp_path / "a" / "adapter.safetensors").read_bytes().split(b'"'))
        assert b"w::frozen/w" not in names
        assert (b"w::frozen/a_0" in names) == (init in RESIDUAL)


def doubled(init):
    """A start whose data is that of two layers."""
    if init not in DATA:
        return init
    data = {path: np.stack([x, 2 * x]).astype(np.float32) for path, x in DATA[init].data.items()}
    return inits.Start(**{**vars(DATA[init]), "data": data})


@pytest.mark.parametrize("init", ALL)
def test_shapes_are_enough(init):
    """Loading, which has no data, asks for shapes; so does `sides`."""
    method = lj.lora(rank=RANK, init=init)
    w = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    frozen, trained = jax.eval_shape(method.init, jax.random.key(0), w)
    assert frozen["w"].shape == w.shape
    assert ({**frozen, **trained}["a"].shape, {**frozen, **trained}["b"].shape) == (
        (64, RANK),
        (RANK, 128),
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "mica", "corda", "lora_ga"])
def test_a_rank_with_too_few_components_is_refused(init):
    rank = 5 if init == "lora_ga" else 9
    message = f"init='{init}' with rank={rank}.*kernel of shape \\[12, 8\\].* 8 components"
    with pytest.raises(lj.InputError, match=message):
        start(init, rank=rank)


@pytest.mark.parametrize("init", [*KERNEL[:2], *KERNEL[3:]])
def test_nan_in_a_kernel_names_it(init):
    w = W.copy()
    w[3, 3] = np.nan
    with pytest.raises(lj.InputError, match=re.escape(f"init='{init}') starts 'w' from its own")):
        start(init, w=w)


def test_what_is_refused():
    with pytest.raises(lj.InputError, match="starts 'w' from data, and was given nothing"):
        method = lj.lora(init="corda")
        params = {"w": jnp.asarray(W)}
        sites = lj.find_sites(product, params, jnp.asarray(X))
        lj.attach(jax.random.key(0), params, {"w": method}, sites)
    with pytest.raises(lj.InputError, match=r"takes the gradient of shape \[12, 8\]"):
        DATA["wrong"] = inits.lora_ga({"w": X})
        start("wrong")
    for arguments, message in {
        "direction='ArB'": "lora_ga(direction='ArB'): unknown; give one of 'ArBr'",
        "gamma=0": "give gamma > 0",
        "variant='mine'": "give 'paper' or 'peft'",
    }.items():
        with pytest.raises(lj.InputError, match=re.escape(message)):
            eval(f"inits.lora_ga({{}}, {arguments})")
    with pytest.raises(lj.InputError, match="give 'ipm' or 'kpm'"):
        inits.corda(mode="both")
    with pytest.raises(lj.InputError, match="nothing is left to train"):
        lj.lora(init="mica", freeze_a=True)
    with pytest.raises(lj.InputError, match="gives each expert a factor of its own"):
        lj.lora(init="pissa", share="a")
    with pytest.raises(lj.InputError, match="unknown init; give one of 'kaiming'"):
        lj.lora(init="pissa_niter_few")


def test_starts_compare_by_what_they_do():
    assert lj.lora(init="pissa") == lj.lora(init=inits.pissa()) != lj.lora(init="pissa_niter_16")
    assert lj.lora(init="pissa").hyper["init"] == "pissa"
    here, there = ({"w": jnp.ones(3)} for _ in range(2))
    assert inits.eva(here) == inits.eva(here) != inits.eva(there)
    assert lj.lora(init=inits.lora_ga(here)).forward == lj.lora(init=inits.lora_ga(there)).forward


def test_embeddings():
    """Random starts have their zeros on the looked-up side; the others treat the table alike."""
    params, ids = {"w": jnp.asarray(W)}, jnp.array([[0, 3, 11], [7, 7, 1]])

    def apply(params, ids):
        return params["w"][ids]

    sites = lj.find_sites(apply, params, ids)
    for init in (*RANDOM, "pissa", "olora", "mica", DATA["lora_ga"]):
        method = lj.lora(rank=RANK, init=init)
        frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
        assert (init in RANDOM) == (not np.any({**frozen["w"].frozen, **trained["w"]}["a"])) or (
            init == "mica"
        )
        y = lj.factored(apply)(lj.bind(frozen, trained), ids)
        np.testing.assert_allclose(y, W[ids], atol=1e-12)
