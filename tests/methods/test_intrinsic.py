"""Intrinsic dimension: the projection's facts, DID and SAID over whole trees, and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import slow_but

import lora_jax as lj
from lora_jax.io.native import load_adapter, save_adapter
from lora_jax.methods.fastfood import fastfood, fwht, permutation
from lora_jax.methods.intrinsic import intrinsic

L, D, F, OUT = 3, 6, 17, 5
POOL = "shared/intrinsic"


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 5, 9])
def test_the_transform(bits):
    n = 2**bits
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    np.testing.assert_allclose(fwht(jnp.asarray(x)), hadamard(n) @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(fwht(fwht(jnp.asarray(x))), n * x, rtol=1e-4, atol=1e-3)


def test_the_transform_of_integers_is_exact():
    x = jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(fwht(x), [4, 2, 0, -2, 0, 2, 0, 2])


@pytest.mark.parametrize("length", [1, 2, 4, 64, 4096])
def test_a_permutation_holds_every_number_once(length):
    orders = [permutation(jax.random.key(seed), length) for seed in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(length))
    if length == 4096:
        assert np.corrcoef(orders[0], np.arange(length))[0, 1] == pytest.approx(0, abs=0.05)
        assert np.mean(np.asarray(orders[0]) == np.asarray(orders[1])) < 0.01


def matrix(size, d, seed=0):
    """P itself: the projection of every unit vector."""
    project = lambda theta: fastfood(theta, jax.random.key(seed), size) / np.sqrt(size)  # noqa: E731
    return np.asarray(jax.vmap(project)(jnp.eye(d))).T


def test_unit_columns():
    exact = np.linalg.norm(matrix(256, 40), axis=0)
    np.testing.assert_allclose(exact, 1, rtol=1e-5)
    near = np.linalg.norm(matrix(200, 40), axis=0)
    assert near.min() > 0.9 and near.max() < 1.1 and np.abs(near.mean() - 1) < 0.03


def test_columns_are_nearly_orthogonal():
    gram = matrix(4096, 24).T @ matrix(4096, 24)
    assert np.abs(gram - np.eye(24)).max() < 0.09


def test_fastfood_is_its_formula():
    size, d, length, key = 20, 5, 32, jax.random.key(3)
    signs, gaussians, mixing = jax.random.split(key, 3)
    theta = jnp.arange(1.0, 6.0)
    beta = np.asarray(jax.random.rademacher(signs, (d,), jnp.float32))
    g = np.asarray(jax.random.normal(gaussians, (length,)))
    order = np.asarray(permutation(mixing, length))
    padded = np.zeros(length)
    padded[:d] = beta * theta
    h = hadamard(length)
    expected = (h @ (g * (h @ padded)[order]))[:size] / np.sqrt(length * np.sum(g**2))
    expected /= np.sqrt(size / length)
    np.testing.assert_allclose(fastfood(theta, key, size) / np.sqrt(size), expected, rtol=1e-4)


def apply(params, x):
    def block(h, p):
        return jnp.tanh(h @ p["up"] + p["bias"][None]) @ p["down"], None

    return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]


def tree_of(dtype=jnp.float32):
    shapes = {"up": (L, D, F), "down": (L, F, D), "bias": (L, F)}
    keys = iter(jax.random.split(jax.random.key(0), 4))
    blocks = {n: jax.random.normal(next(keys), s, dtype) for n, s in shapes.items()}
    return {"blocks": blocks, "head": jax.random.normal(next(keys), (D, OUT), dtype)}


X = jax.random.normal(jax.random.key(9), (4, D))


def attached(method, seed=1, dtype=jnp.float32):
    params = tree_of(dtype)
    sites = lj.find_sites(apply, params, X.astype(dtype))
    return params, sites, *lj.attach(jax.random.key(seed), params, {".*": method}, sites)


OPTIONS = [
    {},
    {"said": True},
    {"said": True, "layers": L},
    {"global_": True},
    {"projection": "dense"},
    {"projection": "sparse", "layers": L},
    {"projection": "dense", "global_": True, "said": True},
    {"projection": "sparse", "global_": True},
    {"reference_gradient": True},
]
USUAL = [OPTIONS[i] for i in (2, 6)]
each = pytest.mark.parametrize("options", slow_but(OPTIONS, USUAL), ids=str)
some = pytest.mark.parametrize("options", slow_but(OPTIONS[2:7], USUAL), ids=str)


def moved(trained, size=0.3):
    drift = lambda x: x + size * jax.random.normal(jax.random.key(5), x.shape)  # noqa: E731
    return jax.tree.map(drift, trained)


@each
def test_a_fresh_one_changes_nothing_and_trains_the_dimension(options):
    dtype = jnp.bfloat16 if "said" in options else jnp.float32
    params, _, frozen, trained = attached(intrinsic(20, **options), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, lj.merge(frozen, trained), params)
    assert lj.tree.count(trained) == 20
    assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype("float32")}


@some
def test_saved_and_loaded_it_is_the_same_from_a_few_words(options, tmp_path):
    params, sites, frozen, trained = attached(intrinsic(20, **options))
    trained = moved(trained)
    save_adapter(tmp_path / "adapter", frozen, trained)
    again = load_adapter(tmp_path / "adapter", params, sites)
    merged = lj.merge(frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, lj.merge(*again), merged)
    tensors = 4 + 3 * (L - 1) * ("layers" in options)
    extra = [node.frozen["key"].size for node in lj.adapted(frozen).values()]
    assert sum(extra) == 2 * tensors  # the key's two words
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), merged, params)
    assert min(jax.tree.leaves(apart)) > 1e-3


def test_said_counts_and_scales_tensors_or_layers():
    trained = attached(intrinsic(20, said=True))[3]
    assert trained[POOL]["theta"].shape == (16,) and trained["blocks/up"]["scale"].shape == ()
    params, _, frozen, trained = attached(intrinsic(20, said=True, layers=L))
    assert trained[POOL]["theta"].shape == (10,) and trained["blocks/up"]["scale"].shape == (L,)
    trained[POOL]["theta"] += 1.0
    base, whole = params["blocks"]["up"], lj.merge(frozen, trained)["blocks"]["up"]
    trained["blocks/up"]["scale"] = jnp.array([0.0, 1.0, -2.0])
    scaled = lj.merge(frozen, trained)["blocks"]["up"]
    wanted = jnp.array([0.0, 1.0, -2.0]).reshape(L, 1, 1) * (whole - base)
    np.testing.assert_allclose(scaled - base, wanted, atol=1e-5)


def test_layers_and_tensors_have_their_own_draws():
    params, _, frozen, trained = attached(intrinsic(20, layers=L))
    trained[POOL]["theta"] += 1.0
    updates = jax.tree.map(jnp.subtract, lj.merge(frozen, trained), params)["blocks"]
    rows = [*updates["up"].reshape(L, -1), *updates["down"].reshape(L, -1)]
    assert np.abs(np.corrcoef(np.stack(rows)) - np.eye(2 * L)).max() < 0.6


@some
def test_the_gradient_is_the_transpose(options):
    _, _, frozen, trained = attached(intrinsic(20, **options))
    trained = moved(trained)

    def loss(trained):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(lj.merge(frozen, trained)))

    along = jax.tree.map(jnp.ones_like, trained)
    grads, slope = jax.grad(loss)(trained), jax.jvp(loss, (trained,), (along,))[1]
    np.testing.assert_allclose(sum(map(jnp.sum, jax.tree.leaves(grads))), slope, rtol=1e-3)
    up, down = (loss(jax.tree.map(lambda x, h=h: x + h, trained)) for h in (1e-2, -1e-2))
    np.testing.assert_allclose((up - down) / 2e-2, slope, rtol=2e-2, atol=2e-2)


def test_the_reference_gradient_is_smaller_by_the_padded_size():
    grads = []
    for slow in (False, True):
        params = {"w": jnp.ones((5, 5))}
        sites = lj.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        rules = {"w": intrinsic(8, reference_gradient=slow)}
        frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
        loss = lambda t, f=frozen: jnp.sum(jnp.sin(lj.merge(f, t)["w"]))  # noqa: E731
        grads.append(jax.grad(loss)(trained)[POOL]["theta"])
    np.testing.assert_allclose(grads[0], 32 * grads[1], rtol=1e-5)


@pytest.mark.parametrize("projection", slow_but(["fastfood", "dense", "sparse"], ["sparse"]))
def test_all_columns_together_have_unit_length(projection):
    method = intrinsic(9, projection=projection, global_=True)
    params = {"w": jnp.zeros((40, 50)), "v": jnp.zeros((30, 20)), "b": jnp.zeros(3)}
    sites = lj.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 40)))
    frozen, trained = lj.attach(jax.random.key(0), params, {".*": method}, sites)

    def flat(theta):
        merged = lj.merge(frozen, trained | {POOL: {"theta": theta}})
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(merged)])

    norms = np.linalg.norm(jax.vmap(flat)(jnp.eye(9)), axis=1)
    assert np.abs(norms - 1).max() < (0.25 if projection == "sparse" else 0.1)


@pytest.mark.parametrize("projection", ["dense", "sparse"])
def test_every_tensor_has_unit_columns(projection):
    params, _, frozen, trained = attached(intrinsic(5, projection=projection))
    trained[POOL]["theta"] = trained[POOL]["theta"].at[2].set(1.0)
    updates = jax.tree.map(jnp.subtract, lj.merge(frozen, trained), params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(jnp.linalg.norm(update), 1, rtol=1e-4)


def test_dimension_zero_trains_nothing():
    params, _, frozen, trained = attached(intrinsic(0))
    jax.tree.map(np.testing.assert_array_equal, lj.merge(frozen, trained), params)
    assert lj.tree.count(trained) == 0


def test_equal_ones_share_a_compilation():
    assert intrinsic(7, said=True) == intrinsic(7, said=True) != intrinsic(7)
    forward = jax.jit(lambda bound, x: lj.factored(apply)(bound, x))
    for seed in (1, 2):
        _, _, frozen, trained = attached(intrinsic(20), seed)
        forward(lj.bind(frozen, trained), X)
    assert forward._cache_size() <= 1


def test_bad_arguments():
    with pytest.raises(lj.InputError, match="dimension=-1"):
        intrinsic(-1)
    with pytest.raises(lj.InputError, match=r"projection='fast'.*fastfood, dense, sparse"):
        intrinsic(4, projection="fast")
    with pytest.raises(lj.InputError, match="layers=0"):
        intrinsic(4, layers=0)
    with pytest.raises(lj.InputError, match="4 tensors take a number each"):
        attached(intrinsic(4, said=True))
    with pytest.raises(
        lj.InputError, match=r"'blocks/bias' has tensors of 17 numbers.*room for 32"
    ):
        attached(intrinsic(33, layers=L))
    with pytest.raises(lj.InputError, match=r"dimension=100.*global_=True"):
        attached(intrinsic(100))
    attached(intrinsic(100, global_=True))
