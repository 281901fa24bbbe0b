"""Adapter folders that we save: there and back, whole or not at all."""

import json
from dataclasses import replace

import pytest
from peft_bases import adapter, base, base_folder, distance, params_and_sites, same
from tables import slow_but

import lora_jax as lj
from lora_jax import methods
from lora_jax.errors import InputError
from lora_jax.io import swap
from lora_jax.io.peft import load_peft, save_peft

Q, V, DOWN = (f"layers/{n}/kernel" for n in ("attn/q_proj", "attn/v_proj", "mlp/down_proj"))
RULES = {
    "lora": {Q: lj.lora(rank=3, alpha=7.5), DOWN: lj.lora(rank=5)},
    "rslora": {lj.all_linear: lj.lora(rank=3, alpha=4, rslora=True)},
    "dora": {lj.all_linear: lj.dora(rank=3, alpha=4, dropout=0.25)},
    "training": {Q: lj.lora(rank=3, dropout=0.1, init="gaussian"), V: lj.lora(rank=3, dropout=0.2)},
    "frozen a": {Q: lj.lora(rank=3, freeze_a=True), V: lj.lora(rank=2)},
    "frozen a, a layer": {Q: [None, lj.lora(rank=3, freeze_a=True)]},
    "frozen a, ranks": {Q: [lj.lora(rank=2, freeze_a=True), lj.lora(rank=3, freeze_a=True)]},
    "per layer": {Q: [lj.lora(rank=3), lj.lora(rank=2, alpha=9)], DOWN: [lj.lora(rank=1), None]},
    "per layer, dora": {Q: [lj.dora(rank=3), None], V: [lj.dora(rank=1), lj.dora(rank=2)]},
    "norms": {Q: lj.lora(rank=2), "norm/scale": lj.full(), "layers/mlp_norm/scale": lj.full()},
    "head": {"lm_head/kernel": lj.lora(rank=2), "embed/embedding": lj.lora(rank=3, alpha=2)},
    "head, whole": {V: lj.lora(rank=2), "lm_head/kernel": lj.full()},
}


def there_and_back(folder, frozen, trained, name="llama"):
    model, sites = base(name)
    save_peft(folder, frozen, trained, base_name="org/tiny")
    return load_peft(folder, model.params, sites)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_idle(frozen):
    """A frozen tree without the fresh factors of layers that no method adapts."""
    keep = lambda node: {k: v for k, v in node.frozen.items() if k != "idle"}  # noqa: E731
    nodes = {path: replace(node, frozen=keep(node)) for path, node in lj.adapted(frozen).items()}
    return lj.tree.replace(frozen, nodes, lambda x: isinstance(x, lj.Adapted))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_there_and_back(rules, tmp_path):
    frozen, trained = adapter(rules)
    again = there_and_back(tmp_path / "x", frozen, trained)
    assert same((without_idle(frozen), trained), (without_idle(again[0]), again[1]))
    (tmp_path / "x" / "lora_jax.json").unlink()  # peft's files alone mean the same function
    plain = load_peft(tmp_path / "x", *params_and_sites())
    weights, expected = (lj.tree.flatten(lj.merge(*x)) for x in (plain, (frozen, trained)))
    assert all(distance(weights[path], expected[path]) < 1e-6 for path in expected)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    card = {"seed": 1, "metrics": [{"name": "accuracy", "after": 0.9}]}
    for name in ("x", "y"):
        made = adapter(RULES["per layer"])
        known = {"source": "here", "fingerprint": "ab"}
        save_peft(tmp_path / name, *made, base_name="org/tiny", card=card, provenance=known)
    assert content(tmp_path / "x") == content(tmp_path / "y")
    assert sorted(content(tmp_path / "x")) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "lora_jax.json")
    ]


def test_what_the_card_says(tmp_path):
    made, known = adapter(RULES["per layer"]), {"source": "hf://org/tiny", "fingerprint": "ab12"}
    save_peft(tmp_path / "x", *made, base_name="org/tiny", card={"seed": 11}, provenance=known)
    text = (tmp_path / "x" / "README.md").read_text()
    assert "layer 0: lora, rank 3, alpha 8, scale 2.66667; layer 1: lora, rank 2" in text
    assert "| sha256 of the weights | ab12 |" in text and "| seed | 11 |" in text
    assert "trained parameters of" in text and 'load("hf://org/tiny")' in text


def test_the_code_on_the_card_runs(tmp_path):
    source = str(base_folder(tmp_path / "base"))
    made = adapter(RULES["lora"])
    folder = save_peft(tmp_path / "x", *made, base_name="org/tiny", provenance={"source": source})
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[2].split("```")[0].replace("THIS_FOLDER", str(folder))
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, 3, 48) and same(names["trained"], made[1])


def test_saving_onto_the_previous_adapter(tmp_path, monkeypatch):
    folder = save_peft(tmp_path / "x", *adapter(RULES["lora"]), base_name="org/tiny")
    before = content(folder)

    def full_disk(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(swap, "_write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_peft(folder, *adapter(RULES["dora"]), base_name="org/tiny")
    assert content(folder) == before and [p.name for p in tmp_path.iterdir()] == ["x"]
    save_peft(folder, *adapter(RULES["dora"]), base_name="org/tiny")
    assert content(folder) != before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_peft_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    bias = {Q: lj.lora(rank=2), "layers/attn/v_proj/bias": lj.full()}
    refused = [
        (adapter({Q: lj.lora(), V: lj.dora()}), "one use_dora"),
        (adapter({Q: lj.dora(init="pissa", rank=2)}), "no place in PEFT's format"),
        (adapter(bias, "llama_bias"), "all of the module"),
    ]
    for made, message in refused:
        with pytest.raises(InputError, match=message):
            save_peft(tmp_path / "x", *made, base_name="org/tiny")
    frozen, trained = adapter({Q: lj.lora()})
    with pytest.raises(InputError, match="does not belong"):
        save_peft(tmp_path / "x", frozen, {V: trained[Q]}, base_name="org/tiny")
    with pytest.raises(InputError, match="nearest: 'seed'"):
        save_peft(tmp_path / "x", frozen, trained, base_name="org/tiny", card={"sed": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_module_with_a_bias_is_saved_whole(tmp_path):
    rules = {Q: lj.lora(rank=2), "layers/attn/v_proj/.*": lj.full()}
    frozen, trained = adapter(rules, "llama_bias")
    _, again = there_and_back(tmp_path / "x", frozen, trained, "llama_bias")
    assert same(trained, again) and "layers/attn/v_proj/bias" in again


def test_an_adapter_for_another_base(tmp_path):
    model, sites = base()
    known = {"source": "hf://org/tiny", "fingerprint": model.source.fingerprint}
    folder = save_peft(
        tmp_path / "x", *adapter(RULES["lora"]), base_name="org/tiny", provenance=known
    )
    load_peft(folder, model.params, sites, base_fingerprint=model.source.fingerprint)
    other, other_sites = base("llama_bias")
    with pytest.raises(InputError, match="is an adapter for hf://org/tiny"):
        load_peft(folder, other.params, other_sites, base_fingerprint=other.source.fingerprint)


def test_the_two_descriptions_must_agree(tmp_path):
    model, sites = base()
    folder = save_peft(tmp_path / "x", *adapter(RULES["lora"]), base_name="org/tiny")
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 7.5', '"lora_alpha": 16'))
    with pytest.raises(InputError, match=r"disagree about 'layers/.*delete lora_jax\.json"):
        load_peft(folder, model.params, sites)
    notes = json.loads((folder / "lora_jax.json").read_text())
    notes["methods"][Q]["name"] = "of another version"
    (folder / "lora_jax.json").write_text(json.dumps(notes))
    with pytest.raises(InputError, match="no method that this version knows"):
        load_peft(folder, model.params, sites)


# --- further types -------------------------------------------------------------------------------

K, UP = "layers/attn/k_proj/kernel", "layers/mlp/up_proj/kernel"
TYPES = {
    "ADALORA": {Q: methods.adalora(rank=4, alpha=6), DOWN: methods.adalora(rank=4, alpha=6)},
    "BOFT": {p: methods.boft(block_size=4) for p in (Q, DOWN)},
    "FOURIERFT": {Q: methods.fourierft(n=9, alpha=40), DOWN: methods.fourierft(n=5, alpha=40)},
    "HRA": {p: methods.hra(rank=4) for p in (Q, DOWN)},
    "IA3": {K: methods.ia3(), DOWN: methods.ia3(feedforward=True)},
    "LN_TUNING": {"norm/scale": lj.full(), "layers/mlp_norm/scale": lj.full()},
    "LOHA": {UP: methods.loha(rank=3, alpha=5), Q: methods.loha(rank=2)},
    "LOKR": {p: methods.lokr(rank=1, decompose_both=True) for p in (Q, DOWN)},
    "MISS": {p: methods.miss(rank=4, bat=True) for p in (Q, K)},
    "OFT": {p: methods.oft(block_size=4, cayley="exact") for p in (Q, DOWN)},
    "RANDLORA": {p: methods.randlora(rank=3, alpha=40) for p in (Q, K)},
    "VBLORA": {p: methods.vblora(rank=2, vectors=7, length=4) for p in (Q, UP)},
    "VERA": {p: methods.vera(rank=3) for p in (Q, DOWN, K)},
}
CONVERTED = {
    "pissa": ({Q: lj.lora(rank=3, alpha=4, init="pissa"), V: lj.lora(rank=2)}, [6, 2]),
    "a layer of pissa": ({Q: [None, lj.lora(rank=3, init="pissa")]}, [6]),
    "olora": ({Q: lj.lora(rank=3, init="olora", rslora=True)}, [6]),
    "delta": ({Q: methods.delta_lora(rank=2)}, [4]),
    "tied": ({Q: methods.tied(lj.lora(rank=2)), V: lj.lora(rank=3)}, [2, 3]),
    "mixture": ({Q: methods.miss(rank=3), K: methods.loha(rank=2), V: lj.lora(rank=1)}, [3, 4, 1]),
    "seed": ({Q: methods.vera(rank=3, projection="seed")}, [3]),
    "paper": ({Q: methods.randlora(rank=4, variant="paper")}, [16]),
}


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", slow_but(TYPES, ("ADALORA", "OFT", "VERA")))
def test_there_and_back_as_another_type(kind, tmp_path):
    frozen, trained = adapter(TYPES[kind])
    again = there_and_back(tmp_path / "x", frozen, trained)
    assert same(trained, again[1])
    assert config_in(tmp_path / "x")["peft_type"] == kind
    weights, expected = (lj.tree.flatten(lj.merge(*x)) for x in (again, (frozen, trained)))
    assert all(distance(weights[path], expected[path]) < 1e-6 for path in expected)


@pytest.mark.parametrize("name", CONVERTED)
def test_what_peft_has_no_type_for_becomes_lora(name, tmp_path):
    rules, ranks = CONVERTED[name]
    frozen, trained = adapter(rules)
    again = there_and_back(tmp_path / "x", frozen, trained)
    found = {path: node.method.hyper["rank"] for path, node in lj.adapted(again[0]).items()}
    assert found == dict(zip(rules, ranks, strict=True))
    assert config_in(tmp_path / "x")["peft_type"] == "LORA"
    weights, expected = (lj.tree.flatten(lj.merge(*x)) for x in (again, (frozen, trained)))
    assert all(distance(weights[path], expected[path]) < 1e-5 for path in expected)


REFUSED = {
    "dora and loha": ({Q: lj.dora(), V: methods.loha(rank=2)}, "one use_dora"),
    "hra and lora": ({Q: methods.hra(rank=2), V: lj.lora()}, r"hra\(rank=2\) on .* no product"),
    "two block sizes": (
        {Q: methods.oft(block_size=4), V: methods.oft(block_size=8)},
        "one oft_block_size for all modules",
    ),
    "ia3 without biases": ({K: methods.ia3()}, "ia3_rules, which takes biases along"),
    "an adapted norm": ({"norm/scale": lj.full(), "layers/attn/q_proj/bias": lj.full()}, "biases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_type_can_hold_is_refused(name, tmp_path):
    rules, message = REFUSED[name]
    made = adapter(rules, "llama_bias" if "bias" in message else "llama")
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path / "x", *made, base_name="org/tiny")
    assert list(tmp_path.iterdir()) == []


def test_biases_beside_an_adapter(tmp_path):
    for rules, bias in (
        ({Q: lj.lora(rank=2), "layers/attn/q_proj/bias": lj.full()}, "lora_only"),
        ({V: methods.vera(rank=2), "layers/attn/._proj/bias": lj.full()}, "all"),
    ):
        frozen, trained = adapter(rules, "llama_bias")
        _, again = there_and_back(tmp_path / "x", frozen, trained, "llama_bias")
        assert same(trained, again) and config_in(tmp_path / "x")["bias"] == bias


def test_ia3_scales_biases_too(tmp_path):
    model, sites = base("llama_bias")
    rules = methods.ia3_rules(sites, model.params, ".*/[kv]_proj/kernel")
    frozen, trained = adapter(rules, "llama_bias")
    again = there_and_back(tmp_path / "x", frozen, trained, "llama_bias")
    assert same((frozen, trained), again) and "layers/attn/k_proj/bias" in again[1]


def test_the_card_names_the_method(tmp_path):
    save_peft(tmp_path / "x", *adapter(TYPES["HRA"]), base_name="org/tiny")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "hra, rank 4" in text and '"hra"' in text and "PeftModel.from_pretrained" in text
