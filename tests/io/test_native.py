"""Any adapter on any model, written and read again: the same bits, or a message."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io.native import NOTES, WEIGHTS, load_adapter, save_adapter
from lora_jax.method import Method

LORA, DORA = lj.lora(rank=2, alpha=6.0, rslora=True), lj.dora(rank=3, alpha=4.0, dropout=0.1)


def apply(params, ids):
    x = params["table"][ids]
    x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]
    return x @ params["head"]["kernel"].astype(x.dtype) + params["head"]["bias"]


def base(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "table": jax.random.normal(keys[0], (11, 5)),
        "layers": jax.random.normal(keys[1], (3, 5, 5)),
        "head": {
            "kernel": jax.random.normal(keys[2], (5, 7)).astype(dtype),
            "bias": jnp.zeros(7),
        },
    }


def sites_of(params):
    return lj.find_sites(apply, params, jax.ShapeDtypeStruct((2, 4), jnp.int32))


def attached(rules, dtype=jnp.float32, seed=3):
    params = base(dtype=dtype)
    frozen, trained = lj.attach(jax.random.key(seed), params, rules, sites_of(params))
    return frozen, jax.tree.map(lambda x: x + jnp.asarray(0.37, x.dtype), trained)


def same(ours, theirs):
    ours, theirs = jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs)
    assert len(ours) == len(theirs)
    for (path, x), (other, y) in zip(ours, theirs, strict=True):
        assert path == other and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


RULES = {
    "lora": {"layers": LORA, "table": LORA},
    "frozen a": {"layers": lj.lora(rank=2, alpha=2.0, freeze_a=True)},
    "dora": {"layers": DORA, "head/kernel": DORA},
    "full": {"head/.*": lj.full(), "layers": LORA},
    "each layer": {"layers": [lj.lora(rank=1), None, lj.lora(rank=4)]},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_was_written(rules, dtype, tmp_path):
    frozen, trained = attached(rules, dtype)
    folder = save_adapter(tmp_path / "a", frozen, trained)
    assert sorted(file.name for file in folder.iterdir()) == [WEIGHTS, NOTES]
    params = base(dtype=dtype)
    again = load_adapter(folder, params, sites_of(params))
    same((frozen, trained), again)
    assert {p: n.methods for p, n in lj.adapted(again[0]).items()} == {
        p: n.methods for p, n in lj.adapted(frozen).items()
    }
    same(lj.merge(frozen, trained), lj.merge(*again))


def test_the_same_adapter_gives_the_same_bytes_and_no_base_weights(tmp_path):
    for name in ("a", "b"):
        save_adapter(tmp_path / name, *attached(RULES["lora"]))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / WEIGHTS).stat().st_size < 4 * (2 * (3 * 10 + 16) + 4) + 700


def residual(start=1.0):
    """A method that keeps another kernel than it was given, as PiSSA does."""

    def init(key, w):
        return {"w": w - start}, {"c": jnp.full(w.shape, start)}

    return Method("residual", init, lambda frozen, t: frozen["w"] + t["c"], hyper={"start": start})


def test_a_residual_kernel_and_a_method_of_ones_own(tmp_path):
    frozen, trained = attached({"layers": residual(0.3)})
    folder = save_adapter(tmp_path / "a", frozen, trained)
    sites = sites_of(base())
    again = load_adapter(folder, base(), sites, factories={"residual": residual})
    same((frozen, trained), again)
    with pytest.raises(InputError, match="is no method that is known here"):
        load_adapter(folder, base(), sites)


@pytest.fixture
def folder(tmp_path):
    provenance = {"source": "hf://some/base", "fingerprint": "a" * 64}
    return save_adapter(tmp_path / "a", *attached(RULES["full"]), provenance=provenance)


def test_another_base_is_refused(folder):
    params = base()
    with pytest.raises(InputError, match=r"for hf://some/base .*not for this base"):
        load_adapter(folder, params, sites_of(params), base_fingerprint="b" * 64)
    load_adapter(folder, params, sites_of(params), base_fingerprint="a" * 64)


def test_a_base_of_other_parameters_is_told_by_all_differences(folder):
    params = base()
    del params["head"]["bias"]
    params["head"]["kernel"] = jnp.zeros((5, 9))
    sites = lj.find_sites(lambda p, x: x @ p["head"]["kernel"], params, jnp.ones((2, 5)))
    with pytest.raises(InputError) as error:
        load_adapter(folder, params, sites)
    assert "missing: head/bias" in str(error.value)
    assert "head/kernel is [5, 9], should be [5, 7]" in str(error.value)


def test_arrays_missing_surplus_and_of_another_shape(folder):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / WEIGHTS)
    arrays["layers::trained/c"] = arrays.pop("layers::trained/a")
    arrays["layers::trained/b"] = arrays["layers::trained/b"][:, :1]
    save_file(arrays, folder / WEIGHTS)
    with pytest.raises(InputError) as error:
        load_adapter(folder, base(), sites_of(base()))
    for words in ("missing: layers::trained/a", "surplus: layers::trained/c", "[3, 1, 5]"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "is not a whole safetensors file"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no adapter.safetensors"),
        (lambda folder: (folder / NOTES).write_text("{"), "is not JSON"),
        (lambda folder: (folder / NOTES).write_text('{"format": 9}'), "has format 9"),
        (lambda folder: shutil.rmtree(folder), "no adapter.safetensors"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_adapter(folder, base(), sites_of(base()))


def test_a_peft_folder_is_told_apart(folder):
    (folder / WEIGHTS).rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match="use load_peft"):
        load_adapter(folder, base(), sites_of(base()))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    frozen, trained = attached(RULES["full"])
    trained["head/bias"]["w"] = trained["head/bias"]["w"] * np.nan
    save_adapter(tmp_path / "a", frozen, trained)
    with pytest.raises(InputError, match="'head/bias::trained/w' holds numbers that are not"):
        load_adapter(tmp_path / "a", base(), sites_of(base()))


def test_the_notes_are_readable(folder):
    notes = json.loads((folder / NOTES).read_text())
    assert notes["adapted"]["head/bias"] == {"method": {"name": "full"}, "shape": [7]}
    assert notes["adapted"]["layers"]["method"]["rank"] == 2
    assert notes["provenance"]["source"] == "hf://some/base"


def test_parts_of_a_fused_kernel(tmp_path):
    def apply(params, x):
        query, key = jnp.split(params["qk"], [4], axis=1)
        return x @ query, x @ key

    params = {"qk": jax.random.normal(jax.random.key(0), (3, 9))}
    sites = lj.find_sites(apply, params, jnp.ones((2, 3)))
    part = next(path for path in sites if path.startswith("qk/"))
    frozen, trained = lj.attach(jax.random.key(1), params, {part: LORA}, sites)
    trained = jax.tree.map(lambda x: x + 0.5, trained)
    again = load_adapter(save_adapter(tmp_path / "a", frozen, trained), params, sites)
    same((frozen, trained), again)
    same(lj.merge(frozen, trained), lj.merge(*again))
