"""peft and transformers read what we save, and we read what they save, with the same logits."""

import random

import numpy as np
import pytest
from peft_bases import IDS, adapter, base, base_folder, distance, logits

import lora_jax as lj
from lora_jax.io.peft import load_peft, save_peft
from lora_jax.methods import (
    adalora,
    boft,
    delta_lora,
    fourierft,
    hra,
    ia3,
    ia3_rules,
    loha,
    lokr,
    miss,
    oft,
    randlora,
    tied,
    vblora,
    vera,
)

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
    "adalora": {Q: adalora(rank=4, alpha=6), DOWN: adalora(rank=2, alpha=6, initial_rank=4)},
    "vera": {p: vera(rank=3) for p in (Q, DOWN, K)},
    "loha": {UP: loha(rank=2, alpha=3), O: loha(rank=3)},
    "lokr": {UP: lokr(rank=2, factor=4), O: lokr(rank=1, alpha=3, factor=4)},
    "lokr, both": {p: lokr(rank=1, decompose_both=True) for p in (Q, DOWN)},
    "ia3": {K: ia3(), V: ia3(), DOWN: ia3(feedforward=True)},
    "vblora": {p: vblora(rank=2, vectors=7, length=4) for p in (Q, K, UP)},
    "randlora": {p: randlora(rank=3, alpha=40) for p in (Q, K, DOWN)},
    "randlora, sparse": {p: randlora(rank=3, alpha=9, bases="sparse") for p in (Q, UP)},
    "miss": {p: miss(rank=3) for p in (Q, DOWN)},
    "miss, bat": {p: miss(rank=4, bat=True) for p in (Q, K)},
    "miss, mini": {p: miss(rank=3, mini_rank=4) for p in (Q, UP)},
    "fourierft": {Q: fourierft(n=9, alpha=40), DOWN: fourierft(n=5, alpha=40)},
    "hra": {p: hra(rank=4) for p in (Q, DOWN)},
    "hra, orthonormal": {p: hra(rank=3, apply_gs=True) for p in (Q, DOWN)},
    "oft": {p: oft(block_size=4) for p in (Q, DOWN)},
    "oft, exact": {p: oft(block_size=8, cayley="exact") for p in (Q, DOWN)},
    "oft, shared": {p: oft(block_size=4, block_share=True, coft=True, eps=0.5) for p in (Q, K)},
    "boft": {p: boft(block_size=4) for p in (Q, DOWN)},
    "norms alone": {"norm/scale": lj.full(), "layers/mlp_norm/scale": lj.full()},
    "per layer, loha": {UP: [loha(rank=2), loha(rank=2, alpha=5)], O: [None, loha(rank=2)]},
    "pissa": {Q: lj.lora(rank=3, alpha=4, init="pissa"), V: lj.lora(rank=2, init="olora")},
    "delta": {Q: delta_lora(rank=2), V: lj.lora(rank=3)},
    "tied": {Q: tied(lj.lora(rank=2))},
    "mixture": {Q: lj.lora(rank=2), K: loha(rank=2), V: miss(rank=3), O: vera(rank=3)},
    "seeded": {p: vera(rank=3, projection="seed") for p in (Q, V)},
    "paper": {p: randlora(rank=5, alpha=20, variant="paper") for p in (Q, V)},
    "biases": {Q: lj.lora(rank=2), "layers/attn/q_proj/bias": lj.full()},
    "all biases": {V: vera(rank=2), "layers/attn/._proj/bias": lj.full()},
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


BASES = {"biases": "llama_bias", "all biases": "llama_bias"}
FURTHER = {"table": {TABLE: lj.lora(rank=2), Q: lj.lora(rank=3)}}
CASES = [(BASES.get(name, "llama"), name) for name in RULES]
CASES += [("llama_tied", "dora"), ("llama_tied", "per layer"), ("llama_bias", "dora")]
CASES += [("llama_tied", "table"), ("llama_bias", "ia3, biases"), ("llama_bias", "boft")]


def chosen(rules, name):
    if rules == "ia3, biases":
        model, sites = base(name)
        kernels = ".*/(k|v|down)_proj/kernel"
        return ia3_rules(sites, model.params, kernels, feedforward=".*/down_proj/kernel")
    return (RULES | FURTHER)[rules]


@pytest.mark.parametrize(("name", "rules"), CASES)
def test_peft_reads_what_we_save(name, rules, theirs, tmp_path):
    model, _ = base(name)
    frozen, trained = adapter(chosen(rules, name), name, size=0.2)
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


def further_config(kind, seed):
    """A config of another type with values drawn at random."""
    draw = random.Random(seed)
    some = draw.sample(NAMES, 3)
    layers = draw.choice([None, [1]])
    common = {"task_type": "CAUSAL_LM", "target_modules": some}
    placed = common | {"layers_to_transform": layers}
    rank, alpha = draw.randint(1, 4), draw.choice([3, 8])
    ranks = {"r": rank, "rank_pattern": {some[0]: 2}}
    count = draw.choice([1, 2])
    values = {
        "AdaLora": placed | {"init_r": rank, "lora_alpha": alpha, "total_step": 9},
        "Vera": placed | {"r": rank, "save_projection": draw.random() < 0.5},
        "LoHa": placed | ranks | {"alpha": alpha, "alpha_pattern": {some[1]: 5}},
        "LoKr": placed
        | ranks
        | {"decompose_factor": draw.choice([-1, 4, 3]), "decompose_both": draw.random() < 0.5},
        "IA3": common | {"feedforward_modules": some[:count]},
        "VBLoRA": common  # its layers share a bank, so all of a stack have it
        | {"r": rank, "num_vectors": 6, "vector_length": 4, "topk": count + 1}
        | {"save_only_topk_weights": draw.random() < 0.5},
        "RandLora": placed
        | {"r": rank, "save_projection": draw.random() < 0.5, "randlora_alpha": 20},
        "Miss": placed | {"r": 4, "mini_r": 2, "init_weights": draw.choice([False, "bat", "mini"])},
        "FourierFT": placed
        | {"n_frequency": 9, "n_frequency_pattern": {some[2]: 4}, "random_loc_seed": seed},
        "HRA": placed | {"r": rank, "apply_GS": draw.random() < 0.5},
        "OFT": placed
        | {"oft_block_size": draw.choice([4, 5, 0]), "coft": draw.random() < 0.3, "eps": 0.3}
        | {"use_cayley_neumann": draw.random() < 0.5, "block_share": draw.random() < 0.3},
        "BOFT": placed | {"boft_block_size": 4},
        "LNTuning": common | {"target_modules": draw.choice([["norm"], ["input_layernorm"]])},
    }[kind]
    if values.get("oft_block_size") == 0:
        values["r"] = 4
    return getattr(peft, f"{kind}Config")(**values)


KINDS = ["AdaLora", "Vera", "LoHa", "LoKr", "IA3", "VBLoRA", "RandLora", "Miss", "FourierFT"]
KINDS += ["HRA", "OFT", "BOFT", "LNTuning"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_peft_saves_of_every_type(kind, seed, theirs, tmp_path):
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(theirs(), further_config(kind, seed)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(theirs(), tmp_path / "theirs").eval()
    model, sites = base()
    frozen, trained = load_peft(tmp_path / "theirs", model.params, sites)
    expected = their_logits(again)
    assert distance(logits(model, frozen, trained), expected) < 1e-4
    assert distance(expected, their_logits(theirs())) > 1e-5
    save_peft(tmp_path / "ours", frozen, trained, base_name="org/tiny")
    back = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    assert distance(their_logits(back), expected) < 1e-4
