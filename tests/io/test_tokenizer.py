"""Tokenizers out of folders and GGUF metadata, and chat templates that can do no harm."""

import json

import gguf
import pytest
import tiny_llama
from tokenizers import pre_tokenizers

from lora_jax.errors import InputError
from lora_jax.io.chat import render
from lora_jax.io.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

HELLO = [{"role": "user", "content": "ab"}]


def metadata(tmp_path, **changes):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    tiny_llama._add_tokenizer(writer)
    stored = {name: value.value for fields in writer.kv_data for name, value in fields.items()}
    return {**stored, **changes}


def test_digits_are_split_before_the_merges_of_smollm(tmp_path):
    tokenizer = tokenizer_from_gguf(metadata(tmp_path), "a.gguf")
    plain = tokenizer_from_gguf(metadata(tmp_path, **{"tokenizer.ggml.pre": "gpt-2"}), "a.gguf")
    tokens = [tokenizer.token(index) for index in tokenizer.encode("ab 12 ab</s>")]
    assert tokens == ["ab", "Ġ", "1", "2", "Ġab", "</s>"]
    assert [plain.token(index) for index in plain.encode("12 12")] == ["12", "Ġ", "12"]
    ids = tokenizer.encode("ab 12 ab</s>")
    assert tokenizer.decode(ids) == "ab 12 ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab 12 ab</s>"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == 29


def test_llama_3_splits_numbers_in_threes(tmp_path):
    given = metadata(tmp_path, **{"tokenizer.ggml.pre": "llama-bpe"})
    splitter = tokenizer_from_gguf(given, "a.gguf").backend.pre_tokenizer
    assert isinstance(splitter, pre_tokenizers.PreTokenizer)
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("It's 12345, I'm  ok")]
    assert pieces == ["It", "'s", "Ġ", "123", "45", ",", "ĠI", "'m", "Ġ", "Ġok"]


def test_kinds_that_are_not_rebuilt(tmp_path):
    assert tokenizer_from_gguf({}, "a.gguf") is None
    with pytest.raises(InputError, match=r"a.gguf: its tokenizer is of kind 'llama'"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "llama"}, "a.gguf")
    with pytest.raises(InputError, match="by the rules of 'qwen9'"):
        tokenizer_from_gguf(metadata(tmp_path, **{"tokenizer.ggml.pre": "qwen9"}), "a.gguf")


def test_files_give_the_same_tokenizer_back(tmp_path):
    tokenizer = tokenizer_from_gguf(metadata(tmp_path), "a.gguf")
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    again = tokenizer_from_folder(tmp_path)
    assert again.encode("ab 12 cd</s>") == tokenizer.encode("ab 12 cd</s>")
    assert (again.bos_id, again.eos_id, again.chat_template) == (1, 2, tiny_llama.TEMPLATE)
    assert again.files() == tokenizer.files()


def test_what_stands_beside_a_tokenizer_json(tmp_path):
    assert tokenizer_from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(tiny_llama.tokenizer().files()["tokenizer.json"])
    bare = tokenizer_from_folder(tmp_path)
    assert (bare.eos_id, bare.chat_template) == (None, None)
    with pytest.raises(InputError, match="no chat template"):
        bare.chat(HELLO)
    templates = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    beside = {"eos_token": {"content": "</s>"}, "chat_template": templates, "model_max_length": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    full = tokenizer_from_folder(tmp_path)
    assert (full.eos_id, full.chat(HELLO)) == (2, "y")
    assert json.loads(full.files()["tokenizer_config.json"])["model_max_length"] == 7
    (tmp_path / "chat_template.jinja").write_text("z{{ eos_token }}")
    assert tokenizer_from_folder(tmp_path).chat(HELLO) == "z</s>"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer"):
        tokenizer_from_folder(tmp_path)


def test_templates_see_what_transformers_gives_them():
    template = """{% for m in messages %}
    {% if loop.last %}{% break %}{% endif %}
    {% endfor %}
{{ messages | tojson }}{{ strftime_now('%Y')|length }}{% if add_generation_prompt %}>{% endif %}"""
    assert render(template, [{"content": "<é>"}]) == '[{"content": "<é>"}]4>'
    assert render("{{ eos_token }}", HELLO, special={"eos_token": "</s>"}) == "</s>"
    with pytest.raises(InputError, match="refuses these messages: only one turn"):
        render("{{ raise_exception('only one turn') }}", HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_templates_reach_nothing_outside(template):
    with pytest.raises(InputError, match="the chat template refuses"):
        print(render(template, HELLO))
