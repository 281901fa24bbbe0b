"""VeRA, LoHa, LoKr, VB-LoRA, RandLoRA, MiSS, FourierFT: what is said of them holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import slow_but

import lora_jax as lj
from lora_jax import methods
from lora_jax.io.native import load_adapter, save_adapter

loha, lokr, miss, vera = methods.loha, methods.lokr, methods.miss, methods.vera
fourierft, randlora, vblora = methods.fourierft, methods.randlora, methods.vblora

D_IN, D_OUT = 24, 20
SMALL_BANK = {"vectors": 5, "length": 4}
METHODS = {
    "vera": vera(rank=3),
    "vera, a seed": vera(rank=3, projection="seed"),
    "loha, thin": loha(rank=2, alpha=3),
    "loha, formed": loha(rank=4),
    "lokr": lokr(rank=1),
    "lokr, formed": lokr(rank=3),
    "lokr, w2 whole": lokr(rank=3, factor=20),
    "lokr, both": lokr(rank=1, decompose_both=True),
    "lokr, factor": lokr(rank=2, factor=2, zero="w2"),
    "lokr, lycoris": lokr(rank=1, factor=20, zero="w2"),
    "vblora": vblora(rank=2, **SMALL_BANK),
    "randlora": randlora(rank=6, alpha=6),
    "randlora, paper": randlora(rank=7, alpha=6, variant="paper", bases="sparse"),
    "miss": miss(rank=7),
    "miss, mini": miss(rank=6, mini_rank=4),
    "miss, bat": miss(rank=4, bat=True),
    "fourierft, thin": fourierft(n=3, alpha=150),
    "fourierft, formed": fourierft(n=11, init="zeros"),
}
NOT_NEUTRAL = ("vblora", "fourierft, thin")


class Rows:
    """An array in the place of an operand."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __matmul__(self, m):
        return self.array @ m.astype(self.dtype)

    def dropout(self, rate):
        return self

    def rows(self, vector):
        return vector


def started(method, d_in=D_IN, d_out=D_OUT, dtype=jnp.float32):
    """The method's arrays on one kernel: frozen, trained, and after some training."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((d_in, d_out)), dtype)
    frozen, trained = method.init(jax.random.key(1), w)
    if method.common:
        shapes = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}
        shared, also = method.common(jax.random.key(2), shapes)
        frozen, trained = frozen | shared, trained | also
    moved = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), trained)
    return frozen, trained, moved


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_is_neutral_but_for_the_exceptions(name):
    frozen, trained, _ = started(METHODS[name])
    change = METHODS[name].weight(frozen, trained) - frozen["w"]
    assert (np.abs(change).max() > 0) == (name in NOT_NEUTRAL)


@pytest.mark.parametrize("shape", slow_but([(D_IN, D_OUT), (D_OUT, D_IN)], [(D_IN, D_OUT)]))
@pytest.mark.parametrize("name", METHODS)
def test_apply_is_the_definition_forward_and_backward(name, shape):
    method = METHODS[name]
    frozen, _, trained = started(method, *shape)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, shape[0])), jnp.float32)
    ours = lambda t, x: jnp.sin(method.apply(frozen, t, Rows(x)))  # noqa: E731
    definition = lambda t, x: jnp.sin(x @ method.weight(frozen, t))  # noqa: E731
    np.testing.assert_allclose(ours(trained, x), definition(trained, x), atol=2e-4)
    total = lambda f: lambda *args: f(*args).sum()  # noqa: E731
    found, wanted = (jax.grad(total(f), (0, 1))(trained, x) for f in (ours, definition))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), found, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_factors_are_the_update(name):
    method = METHODS[name]
    if method.factors is None:
        assert name == "miss, bat"
        return
    frozen, _, trained = started(method)
    a, b = method.factors(frozen, trained)
    update = method.weight(frozen, trained) - frozen["w"]
    np.testing.assert_allclose(a @ b, update, atol=1e-5 * np.abs(update).max())


@pytest.mark.parametrize("name", METHODS)
def test_a_narrow_base_keeps_small_updates(name):
    frozen, _, trained = started(METHODS[name], dtype=jnp.bfloat16)
    assert {x.dtype for x in trained.values()} == {jnp.dtype("float32")}
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, D_IN)), jnp.bfloat16)
    ours = np.float32(METHODS[name].apply(frozen, trained, Rows(x)))
    wide = METHODS[name].weight({**frozen, "w": frozen["w"].astype(jnp.float32)}, trained)
    definition = np.float32(x) @ wide
    np.testing.assert_allclose(ours, definition, atol=5e-2 * np.abs(definition).max())


def counted(method, d_in, d_out):
    _, trained = jax.eval_shape(
        method.init, jax.random.key(0), jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)
    )
    return lj.tree.count(trained)


WORKED = {  # q and v of 12 blocks of width 768: 24 kernels, and what they share
    "vera": (vera(rank=1024), 43_008),
    "loha": (loha(rank=8), 589_824),
    "lokr": (lokr(rank=8), 26_112),
    "vblora": (vblora(), 212_992 - 256 * 256),
    "randlora": (randlora(), 460_800),
    "miss": (miss(), 1_179_648),
    "fourierft": (fourierft(), 24_000),
}


@pytest.mark.parametrize("name", WORKED)
def test_trainable_counts_of_a_worked_stack(name):
    method, expected = WORKED[name]
    assert 24 * counted(method, 768, 768) == expected


def test_further_counts():
    assert counted(lokr(rank=1), 24, 20) == 4 * 4 + (6 + 5)
    assert counted(lokr(rank=3), 24, 20) == 4 * 4 + 6 * 5
    assert 24 * counted(vera(), 1024, 1024) + 24 * counted(vera(), 1024, 1024) == 61_440
    assert 4 * 5 + counted(vblora(rank=2, **SMALL_BANK), 12, 8) == 70
    assert counted(miss(rank=4, mini_rank=2), 12, 8) == 8
    assert counted(miss(rank=4, bat=True), 12, 8) == 32


WRONG = {
    "rank=0": lambda: loha(rank=0),
    "rank=1.5": lambda: vera(rank=1.5),
    "rank=True": lambda: miss(rank=True),
    "n=-1": lambda: fourierft(n=-1),
    "alpha=0": lambda: lokr(alpha=0),
    "alpha=nan": lambda: randlora(alpha=float("nan")),
    "dropout=1": lambda: vera(dropout=1),
    "d_initial=0": lambda: vera(d_initial=0),
    "projection='disk'": lambda: vera(projection="disk"),
    "factor=0": lambda: lokr(factor=0),
    "zero='w3'": lambda: lokr(zero="w3"),
    "top_k=6": lambda: vblora(vectors=5, top_k=6),
    "variant='x'": lambda: randlora(variant="x"),
    "bases='x'": lambda: randlora(bases="x"),
    "mini_rank=2": lambda: miss(mini_rank=2, bat=True),
    "init='x'": lambda: fourierft(init="x"),
    "length=5": lambda: counted(vblora(length=5), 10, 12),
    "rank=13": lambda: counted(miss(rank=13), 12, 8),
    "mini_rank=3": lambda: counted(miss(rank=4, mini_rank=3), 12, 8),
    "rank=3, bat": lambda: counted(miss(rank=3, bat=True), 12, 8),
    "n=97": lambda: counted(fourierft(n=97), 12, 8),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_settings_are_refused(said):
    with pytest.raises(lj.InputError) as refusal:
        WRONG[said]()
    assert said in str(refusal.value)


TWO = {"q": jnp.ones((6, 12)), "k": jnp.ones((8, 4))}
X = jnp.ones((2, 6)), jnp.ones((2, 8))


def two(params, x, y):
    return x @ params["q"], y @ params["k"]


SITES = lj.find_sites(two, TWO, *X)


@pytest.mark.parametrize("method", [vera(rank=3), vera(rank=3, projection="seed")], ids=repr)
def test_sites_of_unlike_shapes_share_the_leading_block_of_one_projection(method):
    frozen, trained = lj.attach(jax.random.key(0), TWO, {".*": method}, SITES)
    nodes = lj.bind(frozen, trained)
    a, b = zip(*(_halves(method, nodes[name]) for name in ("q", "k")), strict=True)
    np.testing.assert_array_equal(a[0], a[1][:6])
    np.testing.assert_array_equal(b[0][:, :4], b[1])
    assert np.abs(a[1]).max() <= np.sqrt(6 / 8) and np.abs(b[0]).max() <= np.sqrt(6 / 3)
    assert np.abs(a[1]).max() > 0.8 * np.sqrt(6 / 8)
    stored = [lj.tree.count(frozen[name].common) for name in ("q", "k")]
    assert sorted(stored) == ([0, 4] if method.hyper["projection"] == "seed" else [0, 3 * (8 + 12)])
    assert set(trained) == {"q", "k"}


def _halves(method, node):
    ones = jax.tree.map(jnp.ones_like, node.trained)
    return method.factors(*node.matrices()[:1], ones)


def test_a_key_gives_the_same_numbers_stored_or_drawn_again():
    frozen, _, trained = started(METHODS["vera"])
    again = started(METHODS["vera, a seed"])[0]
    ours, theirs = METHODS["vera"], METHODS["vera, a seed"]
    np.testing.assert_array_equal(ours.weight(frozen, trained), theirs.weight(again, trained))


def test_a_seed_fixes_the_projections_whatever_the_key():
    rules = {".*": vera(rank=3, seed=5)}
    one, other = (lj.attach(jax.random.key(k), TWO, rules, SITES)[0] for k in (0, 1))
    np.testing.assert_array_equal(*(f["k"].common["shared_a"] for f in (one, other)))


@pytest.mark.parametrize("other", [vera(rank=4), vera(rank=3, seed=1)], ids=repr)
def test_rules_that_cannot_share_projections_are_refused(other):
    with pytest.raises(lj.InputError, match=r"two sets of common arrays"):
        lj.attach(jax.random.key(0), TWO, {"q": vera(rank=3), "k": other}, SITES)


def test_rules_that_differ_otherwise_share_projections():
    rules = {"q": vera(rank=3), "k": vera(rank=3, d_initial=0.2, dropout=0.1)}
    frozen, trained = lj.attach(jax.random.key(0), TWO, rules, SITES)
    assert frozen["q"].pool == frozen["k"].pool
    assert [trained[name]["d"][0].item() for name in "qk"] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("method", [vera(rank=2), vblora(rank=1, **SMALL_BANK)], ids=repr)
def test_scanned_layers_share_and_files_hold_what_is_shared_once(method, tmp_path):
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8)), jnp.float32)}
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]  # noqa: E731
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8)), jnp.float32)
    sites = lj.find_sites(apply, params, x)
    frozen, trained = lj.attach(jax.random.key(0), params, {"w": method}, sites)
    trained = jax.tree.map(lambda a: a + 0.5, trained)
    y = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), x)
    np.testing.assert_allclose(y, apply(lj.merge(frozen, trained), x), atol=1e-5)
    save_adapter(tmp_path / "a", frozen, trained)
    again = load_adapter(tmp_path / "a", params, sites)
    np.testing.assert_array_equal(lj.merge(*again)["w"], lj.merge(frozen, trained)["w"])
    named = {"vera": 2 * 16, "vblora": 5 * 4}[method.name]
    shared = frozen["w"].common or trained[frozen["w"].pool]
    assert lj.tree.count(shared) == named


def rank_of(method, d_in=D_IN, d_out=D_OUT):
    frozen, _, trained = started(method, d_in, d_out)
    return np.linalg.matrix_rank(np.float64(method.weight(frozen, trained) - frozen["w"]), 1e-4)


def test_ranks():
    assert rank_of(vera(rank=3)) == 3
    assert rank_of(loha(rank=3)) == 9
    assert rank_of(randlora(rank=6)) == rank_of(randlora(rank=6, variant="paper")) == D_OUT
    assert rank_of(lokr(rank=1)) == 4  # a whole w1 of 4 x 4 by one of rank 1
    assert rank_of(fourierft(n=3)) <= 6
    assert rank_of(vblora(rank=2, **SMALL_BANK)) == 2


def test_lokr_is_the_kronecker_product_seen_by_reshaping():
    frozen, _, t = started(lokr(rank=1))
    w2 = t["a2"] @ t["b2"]
    x = np.random.default_rng(0).standard_normal((3, 4, 6))
    y = np.einsum("tcd,ca,db->tab", x, t["w1"], w2).reshape(3, -1) * frozen["scale"]
    update = lokr(rank=1).weight(frozen, t) - frozen["w"]
    np.testing.assert_allclose(x.reshape(3, -1) @ update, y, atol=1e-4)


def test_only_chosen_logits_and_bank_rows_have_gradients():
    method = METHODS["vblora"]
    frozen, _, trained = started(method)
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(method.weight(frozen, t))))(trained)
    chosen, touched = set(), {}
    for name in ("logits_a", "logits_b"):
        best = np.argsort(trained[name], axis=-1)[..., -2:]
        touched[name] = np.zeros(trained[name].shape, bool)
        np.put_along_axis(touched[name], best, True, axis=-1)
        np.testing.assert_array_equal(np.asarray(grads[name]) != 0, touched[name])
        chosen |= set(best.ravel().tolist())
    rows = np.flatnonzero(np.abs(grads["bank"]).sum(axis=1))
    assert set(rows.tolist()) == chosen


@pytest.mark.parametrize("rank", [4, 7])
def test_miss_is_a_lora_of_zeros_and_ones(rank):
    frozen, _, trained = started(miss(rank=rank))
    a, b = miss(rank=rank).factors(frozen, trained)
    assert {*np.unique(a)} == {0, 1} and (np.asarray(a).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(np.argmax(a, axis=1), np.arange(D_IN) % rank)
    tiled = np.tile(b, (-(-D_IN // rank), 1))[:D_IN]
    np.testing.assert_allclose(a @ b, tiled, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 50])
def test_energy_of_a_spectrum(n):
    frozen, _, trained = started(fourierft(n=n))
    update = fourierft(n=n).weight(frozen, trained) - frozen["w"]
    bound = 150**2 * np.sum(np.square(trained["c"])) / (D_IN * D_OUT)
    assert 0 < np.sum(np.square(update)) <= bound * (1 + 1e-4)


def test_waves_keep_their_phase_over_long_sides():
    from lora_jax.methods.fourierft import _waves

    size, f = 100_003, np.array([99_991, 65_537])
    cos, sin = _waves(size, f, jnp.float32)
    turns = np.arange(size)[:, None] * f[None] % size * (2 * np.pi / size)
    np.testing.assert_allclose(cos, np.cos(turns), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(turns), atol=1e-6)


def test_bases_have_unit_deviation_and_the_zeros_they_promise():
    for bases, kept in (("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 20)):
        method = randlora(rank=10, bases=bases)
        shapes = {"w": jax.ShapeDtypeStruct((400, 500), jnp.float32)}
        found, _ = method.common(jax.random.key(0), shapes)
        b = np.asarray(found["bases_b"])
        assert b.shape == (500, 40, 10) and found["bases_a"].shape == (10, 400)
        assert np.std(b, ddof=1) == pytest.approx(1, rel=1e-4)
        assert np.mean(b != 0) == pytest.approx(kept, rel=0.02)
