"""LoRA-drop: scores in both forms, the minimal prefix, the rules that come out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import slow_but

import lora_jax as lj
from lora_jax.lora_drop import importance, importance_from, lora_drop, selection

L, D, F, OUT, B, T = 3, 6, 7, 5, 2, 4


def apply(params, x):
    def body(h, layer):
        return h + jnp.tanh(h @ layer["up"]) @ layer["down"], None

    h = jax.lax.scan(body, x, params["layers"])[0]
    h = h.mean(1) if "pooled" in params else h
    return h @ params["block0"]["w"] @ params["block1"]["w"] @ params["head"]


def model(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    draw = lambda *shape: 0.4 * jax.random.normal(next(keys), shape)  # noqa: E731
    params = {
        "layers": {"up": draw(L, D, F), "down": draw(L, F, D)},
        "block0": {"w": draw(D, D)},
        "block1": {"w": draw(D, D)},
        "head": draw(D, OUT),
    }
    return params, lj.find_sites(apply, params, jnp.ones((B, T, D)))


def loss(params, batch):
    off = apply(params, batch["x"]) - batch["y"]
    seen = batch["mask"][..., None]
    return jnp.sum(seen * off**2), jnp.sum(batch["mask"]).astype(jnp.float32)


def mask_of(batch):
    return batch["mask"]


def batches(count=2):
    keys = jax.random.split(jax.random.key(5), count)
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    x = [jax.random.normal(key, (B, T, D)) for key in keys]
    return [{"x": v, "y": jnp.sin(v[..., :OUT]), "mask": mask} for v in x]


def moved(rules):
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)
    rng = np.random.default_rng(0)
    drift = lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return frozen, jax.tree.map(drift, trained)


def inputs_of(frozen, trained, batch):
    """The input of every kernel, layer by layer, in the merged model."""
    merged, h = lj.merge(frozen, trained), batch["x"]
    ups, downs = [], []
    for i in range(L):
        ups.append(h)
        downs.append(jnp.tanh(h @ merged["layers"]["up"][i]))
        h = h + downs[-1] @ merged["layers"]["down"][i]
    second = h @ merged["block0"]["w"]
    return {
        "layers/up": jnp.stack(ups),
        "layers/down": jnp.stack(downs),
        "block0/w": h,
        "block1/w": second,
        "head": second @ merged["block1"]["w"],
    }


@pytest.mark.parametrize("masked", slow_but([True, False], [True]))
@pytest.mark.parametrize("method", [lj.lora(rank=2, alpha=3.0), lj.lora(rank=3, freeze_a=True)])
def test_both_forms_of_the_score_are_the_sum_over_tokens(method, masked):
    frozen, trained = moved({".*": method})
    found = importance(loss, frozen, trained, batches(), mask=mask_of if masked else None)
    direct, squares = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    for batch in batches():
        seen = (batch["mask"] if masked else jnp.ones((B, T)))[..., None]
        for path, x in inputs_of(frozen, trained, batch).items():
            node = lj.adapted(frozen)[path]
            f = node.frozen | trained[path]
            scale = np.reshape(f["scale"], (-1, *(1,) * 3))[(...,) if x.ndim == 4 else 0]
            a, b = (f[n][:, None] if x.ndim == 4 else f[n] for n in "ab")
            update = scale * (x @ a @ b) * seen
            direct[path] += np.sum(np.square(update), axis=(-3, -2, -1))
            squares[path] += jnp.einsum("...bti,...btj->...ij", x * seen, x * seen)
    for path in found:
        np.testing.assert_allclose(found[path], direct[path], rtol=2e-5)
    again = importance_from(squares, frozen, trained)
    for path in found:
        np.testing.assert_allclose(found[path], again[path], rtol=2e-5)


def test_rows_after_pooling_have_no_padding():
    frozen, trained = moved({".*": lj.lora(rank=2)})
    batch = batches(1)[0]

    def pooled(params, batch):
        return jnp.sum(apply({**params, "pooled": ()}, batch["x"]) ** 2), jnp.float32(B)

    found = importance(pooled, frozen, trained, [batch], mask=mask_of)
    whole = importance(pooled, frozen, trained, [batch])
    np.testing.assert_allclose(found["head"], whole["head"], rtol=1e-6)
    assert np.all(found["layers/up"] < whole["layers/up"])
    with pytest.raises(lj.InputError, match="the mask has shape"):
        importance(pooled, frozen, trained, [batch], mask=lambda batch: jnp.ones((T, B)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0, 1e-6])
def test_the_selection_is_the_shortest_prefix(seed, threshold):
    scores = np.random.default_rng(seed).exponential(size=9)
    kept = selection(scores, threshold)
    shares = scores / scores.sum()
    ordered = sorted(shares[list(kept)])
    assert sum(ordered) >= threshold - 1e-9
    assert sum(ordered[1:]) < threshold - 1e-9
    assert min(shares[list(kept)]) >= max(np.delete(shares, kept), default=0)


def test_edges_of_the_selection():
    assert selection([2.0, 2.0, 2.0, 2.0], 0.5) == (0, 1)
    assert selection([0.0, 3.0, 1.0], 1.0) == (1, 2)
    with pytest.raises(lj.InputError, match="train the probe first"):
        selection([0.0, 0.0])
    with pytest.raises(lj.InputError, match=r"in \(0, 1\]"):
        selection([1.0], threshold=90)


def drop(rules, **options):
    params, sites = model()
    adam = optax.adam(1e-2)
    key = jax.random.key(3)
    return lora_drop(key, loss, params, rules, sites, batches(), optimizer=adam, **options)


def test_as_one_call():
    method = lj.lora(rank=2)
    everything = {"layers/.*": method, "block.*": method, "head": lj.full()}
    rules, shares = drop(everything, threshold=0.6, epochs=3)
    for paths in (["layers/up"], ["layers/down"], ["block0/w", "block1/w"]):
        assert sum(np.sum(shares[path]) for path in paths) == pytest.approx(1)
    assert rules["head"] == lj.full()
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
    for path, width in (("up", D + F), ("down", F + D)):
        kept = len(selection(shares[f"layers/{path}"], 0.6))
        own = lj.tree.count(trained[f"layers/{path}"])
        pool = trained.get(lj.adapted(frozen)[f"layers/{path}"].pool, {})
        assert own + lj.tree.count(pool) == (kept + (kept < L)) * 2 * width
    again = lj.factored(loss)(lj.bind(frozen, trained), batches(1)[0])[0]
    assert again == pytest.approx(float(loss(params, batches(1)[0])[0]), rel=1e-6)


def test_a_threshold_of_one_keeps_every_layer_and_a_tiny_one_a_single():
    method = lj.lora(rank=2)
    rules, _ = drop({"layers/.*": method}, threshold=1.0)
    assert rules == {"layers/up": method, "layers/down": method}
    rules, shares = drop({"layers/up": method}, threshold=1e-9)
    assert [m == method for m in rules["layers/up"]].index(True) == np.argmax(shares["layers/up"])


def test_kinds_may_be_ranked_together():
    rules, shares = drop({"layers/.*": lj.lora(rank=2)}, threshold=0.5, scope="layer")
    np.testing.assert_array_equal(shares["layers/up"], shares["layers/down"])
    same = [[m == lj.lora(rank=2) for m in rules[f"layers/{name}"]] for name in ("up", "down")]
    assert same[0] == same[1]
    with pytest.raises(lj.InputError, match="not every kind is in every layer"):
        drop({"layers/.*": lj.lora(rank=2), "head": lj.lora(rank=2)}, scope="layer")


def test_what_is_refused():
    with pytest.raises(lj.InputError, match="give it one"):
        drop({"layers/up": [lj.lora(), None, lj.lora()]})
    with pytest.raises(lj.InputError, match="give 'kind' or 'layer'"):
        drop({"layers/up": lj.lora()}, scope="both")
    with pytest.raises(lj.InputError, match="train the probe first"):
        drop({"layers/up": lj.lora()}, epochs=0)
