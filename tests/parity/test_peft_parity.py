"""peft and transformers read what we save, and we read what they save, with the same logits."""

import random

import numpy as np
import pytest
from peft_bases import IDS, adapter, base, base_folder, distance, logits

import lora_jax as lj
from lora_jax.io.peft import load_peft, save_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
Q, K, V, O = (f"layers/attn/{name}_proj/kernel" for name in "qkvo")
UP, DOWN = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"
HEAD, TABLE = "lm_head/kernel", "embed/embedding"

RULES = {
    "lora": {Q: lj.lora(rank=3, alpha=7.5), V: lj.lora(rank=3, alpha=7.5)},
    "rslora": {lj.all_linear: lj.lora(rank=3, alpha=4, rslora=True)},
    "rslora in part": {Q: lj.lora(rank=3, alpha=4, rslora=True), K: lj.lora(rank=2, alpha=4)},
    "dora": {lj.all_linear: lj.dora(rank=3, alpha=4)},
    "ranks": {Q: lj.lora(rank=3), DOWN: lj.lora(rank=5, alpha=2), K: lj.lora(rank=1)},
    "per layer": {Q: [lj.lora(rank=3), lj.lora(rank=2, alpha=9)], DOWN: [lj.lora(rank=1), None]},
    "per layer, dora": {Q: [lj.dora(rank=3), None], V: [lj.dora(rank=1), lj.dora(rank=2)]},
    "one layer": {p: [None, lj.lora(rank=2)] for p in (Q, K, O)},
    "frozen a": {UP: lj.lora(rank=3, freeze_a=True), V: lj.lora(rank=2)},
    "norms": {Q: lj.lora(rank=2), "norm/scale": lj.full(), "layers/mlp_norm/scale": lj.full()},
    "head": {HEAD: lj.lora(rank=2), TABLE: lj.lora(rank=3, alpha=2), Q: lj.lora(rank=2)},
    "table, dora": {TABLE: lj.dora(rank=3, alpha=2)},
    "head, whole": {V: lj.lora(rank=2), HEAD: lj.full(), TABLE: lj.full()},
}


@pytest.fixture
def theirs(tmp_path):
    """A function: base name -> the transformers model with the golden weights."""

    def load(name="llama"):
        folder = base_folder(tmp_path / f"base_{name}", name)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return load


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(IDS), dtype=torch.long)).logits.numpy()


CASES = [("llama", name) for name in RULES]
CASES += [("llama_tied", "dora"), ("llama_tied", "per layer"), ("llama_bias", "dora")]


@pytest.mark.parametrize(("name", "rules"), CASES)
def test_peft_reads_what_we_save(name, rules, theirs, tmp_path):
    model, _ = base(name)
    frozen, trained = adapter(RULES[rules], name, size=0.2)
    folder = save_peft(tmp_path / "ours", frozen, trained, base_name="org/tiny")
    loaded = peft.PeftModel.from_pretrained(theirs(name), folder)
    ours = logits(model, frozen, trained)
    assert distance(ours, their_logits(loaded)) < 1e-4
    assert distance(ours, their_logits(theirs(name))) > 1e-3
    keys = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
    missing = {key for key in keys if key not in tensor_names(folder)}
    assert not missing  # peft has no factor that it did not find in our file


def test_the_code_on_the_card_runs(tmp_path):
    source = str(base_folder(tmp_path / "base"))
    made = adapter(RULES["lora"])
    folder = save_peft(tmp_path / "ours", *made, base_name=source)
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(folder))
    names: dict = {}
    exec(code, names)
    ours = logits(base()[0], *made)
    assert distance(ours, their_logits(names["model"].eval())) < 1e-4


def tensor_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        return set(file.keys())


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = [
    *NAMES,
    *(r"layers\.1\..*_proj", r".*\.0\.mlp\.(up|down)_proj", "self_attn.v_proj", ".*"),
    *("^model.layers.0.self_attn.q_proj", "proj", "o_pro", r"[qk]_proj", r"1\.self_attn\.q_proj"),
]


def random_config(seed):
    """A LoraConfig that a person might write, with overlapping patterns.

    peft writes patterns sorted and takes the first that matches, so that what it reads may differ
    from what it had: in alphas without a word, in ranks by failing, hence those are sorted here.
    """
    draw = random.Random(seed)
    some = lambda values: [(p, draw.choice(values)) for p in draw.sample(PATTERNS, 4)]  # noqa: E731
    targets = draw.choice(
        [
            draw.sample(NAMES, 3),
            "all-linear",
            r".*\.(self_attn|mlp)\.[qgd].*",
            ["lm_head", "q_proj"],
        ]
    )
    layers = draw.choice([None, None, [1], 0]) if isinstance(targets, list) else None
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=draw.randint(1, 5),
        lora_alpha=draw.choice([4, 8, 16]),
        rank_pattern=dict(sorted(some([1, 2, 3, 6]))),
        alpha_pattern=dict(some([2, 4, 32])),
        target_modules=targets,
        exclude_modules=draw.choice([None, ["layers.1.mlp.up_proj"], r".*\.0\..*k_proj"]),
        layers_to_transform=layers,
        layers_pattern=draw.choice([None, "layers"]) if layers is not None else None,
        use_rslora=draw.random() < 0.3,
        use_dora=draw.random() < 0.3,
        init_lora_weights=False,
    )


@pytest.mark.parametrize("seed", range(12))
def test_we_read_what_peft_saves(seed, theirs, tmp_path):
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(theirs(), random_config(seed)).eval()
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(theirs(), tmp_path / "theirs").eval()
    model, sites = base()
    frozen, trained = load_peft(tmp_path / "theirs", model.params, sites)
    assert distance(logits(model, frozen, trained), their_logits(again)) < 1e-4
