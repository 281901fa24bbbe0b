"""HRA, OFT and BOFT: recorded numbers, what a rotation leaves alone, counts and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import slow_but
from test_golden import W, X, agree, closed_form, run

import lora_jax as lj
from lora_jax.methods import boft, hra, oft

GY = closed_form((3, 8), 6)
U = closed_form((12, 2), 26)
Q = 0.1 * closed_form((3, 6), 27)
R, S = 0.1 * closed_form((1, 3, 4, 4), 28), 1 + 0.1 * closed_form((8,), 29)
NOT_NEUTRAL = pytest.mark.filterwarnings("ignore:.*random reflections")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


TURNING = {
    "hra": (hra(rank=2), {"u": U}),
    "hra, more": (hra(rank=6), {"u": closed_form((12, 6), 1)}),
    "oft, exact": (oft(4, cayley="exact"), {"q": Q}),
    "oft, shared": (oft(4, cayley="exact", block_share=True), {"q": Q[:1]}),
    "boft": (boft(4), {"r": R, "s": np.ones(8)}),
    "boft, two": (boft(2, factors=2), {"r": closed_form((2, 6, 2, 2), 3), "s": np.ones(8)}),
}


@pytest.mark.parametrize(
    ("name", "method", "trained"),
    [
        ("hra", hra(rank=2), {"u": U}),
        ("oft_exact", oft(4, cayley="exact"), {"q": Q}),
        ("oft_neumann", oft(4), {"q": Q}),
        ("boft_m1", boft(4), {"r": R, "s": S}),
    ],
)
def test_recorded_outputs(name, method, trained):
    agree(run(method, trained)[0], name, "y")


@pytest.mark.parametrize("name", TURNING)
def test_rotations_keep_lengths_and_angles_of_the_columns(name):
    merged = run(*TURNING[name])[2]
    np.testing.assert_allclose(merged.T @ merged, W.T @ W, atol=1e-12)
    assert np.abs(merged - W).max() > 0.01


@NOT_NEUTRAL
@pytest.mark.parametrize("gs", [False, True])
@pytest.mark.parametrize("rank", slow_but([2, 5, 8], [5]))
def test_the_small_system_equals_the_chain_of_reflections(rank, gs):
    """apply and weight of HRA, forward and gradients; a column of zeros reflects nothing."""
    method, u = hra(rank, apply_gs=gs), closed_form((12, rank), rank)
    y, grads, merged = run(method, {"u": u})
    np.testing.assert_allclose(y - closed_form((8,), 3), X @ merged, atol=1e-12)

    def formed(u):
        return jnp.sum((X @ method.weight({"w": jnp.asarray(W)}, {"u": u})) * GY)

    np.testing.assert_allclose(grads["u"], jax.grad(formed)(jnp.asarray(u)), atol=1e-10)
    padded = jnp.pad(u, [(0, 0), (0, 2)])
    padded_y, grads, _ = run(hra(rank + 2, apply_gs=gs), {"u": padded})
    np.testing.assert_allclose(padded_y, y, atol=1e-12)
    assert np.isfinite(grads["u"]).all()


def test_reflections_are_their_own_inverse_in_reverse():
    there = run(hra(rank=2), {"u": U})[2]
    back = hra(rank=2).weight({"w": there}, {"u": jnp.asarray(U[:, ::-1])})
    np.testing.assert_allclose(back, W, atol=1e-12)


@pytest.mark.parametrize("method", [hra(4), oft(4), oft(4, cayley="exact"), boft(2, factors=2)])
def test_a_fresh_adapter_is_the_base(method):
    frozen, trained = method.init(jax.random.key(3), jnp.asarray(W))
    np.testing.assert_allclose(method.weight(frozen, trained), W, atol=1e-14)
    np.testing.assert_allclose(run(method, trained)[0], X @ W + closed_form((8,), 3), atol=1e-13)


def test_what_is_not_neutral_says_so():
    for method in (hra(3), hra(2, apply_gs=True)):
        with pytest.warns(UserWarning, match="random reflections"):
            frozen, trained = method.init(jax.random.key(0), jnp.asarray(W))
        assert np.abs(method.weight(frozen, trained) - W).max() > 0.01


def test_the_neumann_form_becomes_a_rotation_for_small_angles():
    def error(size):
        merged = np.asarray(run(oft(4), {"q": size * Q})[2])
        return np.abs(merged.T @ merged - W.T @ W).max()

    assert error(1.0) > 1e-5
    np.testing.assert_allclose(error(0.1) / error(0.2), 0.5**4, rtol=0.2)  # it errs by 2 q^4


def test_neumann_is_nearly_the_transpose_of_exact():
    exact = run(oft(4, cayley="exact"), {"q": -Q})[2]
    np.testing.assert_allclose(run(oft(4), {"q": Q})[2], exact, atol=2e-2)


def test_coft_stays_in_its_ball():
    """Far blocks are pulled to the surface, near ones stay, and the gradient is that there."""
    near = 1e-4 * Q
    q = np.stack([Q[0], near[1], 0 * Q[2]])
    ball = 0.01 / np.sqrt(3)
    inside = np.stack([Q[0] * ball / (np.sqrt(2) * np.linalg.norm(Q[0])), near[1], 0 * Q[2]])
    y, grads, _ = run(oft(4, coft=True, eps=0.01), {"q": q})
    expected, wanted, _ = run(oft(4), {"q": inside})
    np.testing.assert_allclose(y, expected, atol=1e-13)
    np.testing.assert_allclose(grads["q"], wanted["q"], atol=1e-12)


@pytest.mark.parametrize(("block", "taken"), [(5, 4), (7, 6), (9, 6), (32, 12), (3, 3)])
def test_a_block_that_does_not_divide_gives_way(block, taken, recwarn):
    _, trained = oft(block).init(jax.random.key(0), jnp.asarray(W))
    assert trained["q"].shape == (12 // taken, taken * (taken - 1) // 2)
    assert [f"{taken} is taken instead" in str(w.message) for w in recwarn] == [True] * (
        block != taken
    )


def test_butterfly_mixes_across_blocks():
    """With two factors an input feature reaches all of a group of 2 b; with one, of b."""
    reach = []
    for factors in (1, 2, 3):
        r = closed_form((factors, 4, 2, 2), 5)
        trained = {"r": jnp.asarray(r), "s": jnp.ones(8)}
        turned = boft(2, factors=factors).weight({"w": jnp.eye(8)}, trained)
        reach.append(int((np.abs(turned[:, 0]) > 1e-9).sum()))
    assert reach == [2, 4, 8]


COUNTS = {"hra": (hra(8), 147_456), "oft": (oft(32), 285_696), "boft": (boft(4), 92_160)}


@pytest.mark.parametrize("name", COUNTS)
def test_trainable_counts_of_a_worked_stack(name):
    """q and v of 12 blocks of width 768."""
    method, expected = COUNTS[name]
    w = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    _, trained = jax.eval_shape(method.init, jax.random.key(0), w)
    assert 24 * lj.tree.count(trained) == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hra(0), "hra\\(rank=0\\).*positive"),
        (lambda: oft(1), "block_size=1"),
        (lambda: oft(4, cayley="polar"), "'polar'.*'neumann' or 'exact'"),
        (lambda: oft(4, eps=0.0), "eps=0.0"),
        (lambda: boft(4, factors=0), "factors=0"),
        (lambda: boft(3, factors=2), "even block_size"),
    ],
)
def test_hyper_parameters_out_of_range(make, words):
    with pytest.raises(lj.InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (oft(5, strict=True), r"does not divide the 12.*\(12, 8\)"),
        (boft(8), r"groups of 8 .*\(12, 8\) has 12"),
        (boft(4, factors=2), "groups of 8"),
        (hra(13, apply_gs=True), r"13 columns of length 12"),
    ],
)
def test_kernels_that_do_not_fit(method, words):
    with pytest.raises(lj.InputError, match=words):
        method.init(jax.random.key(0), jnp.asarray(W))


def test_a_prime_width_has_no_blocks():
    with pytest.raises(lj.InputError, match="blocks of 1 have nothing to turn"):
        oft(3).init(jax.random.key(0), jnp.ones((11, 2)))
