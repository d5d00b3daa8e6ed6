"""A checkpoint's tokenizer: end tokens from every file that names some, chat templates, a GGUF's split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ssv.builder.target import Target, openings_of, prompt_tokens
from ssv.builder.tokenizer import check_vocabulary, end_tokens, load_tokenizer, text_digest
from ssv.builder.training.corpus import chat_pieces
from ssv.model.checkpoint import CheckpointError
from ssv.support.errors import UserError
from ssv.support.prompts import read_prompts

CONTROL = ("<s>", "<e>", "<eot>", "<h>", "</h>")
WORDS = (*CONTROL, "user", "assistant", "[INST]", "[/INST]", "<think>", "</think>", "be", "good", "unknown")

PLAIN = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endfor %}"
ASKS = "{% if add_generation_prompt %}<s> assistant {% endif %}"
FAMILIES = {
    "SmolLM2, Qwen2": (
        "{% if messages[0]['role'] != 'system' %}<s> system be good <e> {% endif %}" + PLAIN + ASKS,
        "<e>",
    ),
    "Qwen3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<s> assistant {% if loop.last %}<think> </think> "
        "{% endif %}"
        "{{ m['content'].split('</think>')[-1] }} <e> {% else %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endif %}"
        "{% endfor %}" + ASKS,
        "<e>",
    ),
    "Llama 3": (
        "{% for m in messages %}{% set c = '<h> ' + m['role'] + ' </h> ' + m['content'] | trim + ' <eot> ' %}"
        "{% if loop.first %}{% set c = bos_token + ' ' + c %}{% endif %}{{ c }}{% endfor %}"
        "{% if add_generation_prompt %}<h> assistant </h> {% endif %}",
        "<eot>",
    ),
    "Llama 2": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
        "alternate') }}"
        "{% endif %}{% if m['role'] == 'user' %}{{ bos_token + ' [INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token + ' ' }}{% endif %}{% endfor %}",
        "<e>",
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == "
        "'assistant' %} {{ m['content'] }} {{ eos_token }}{% else %}{{ raise_exception('only user and assistant') }}"
        "{% endif %}{% endfor %}",
        "<e>",
    ),
}  # fmt: skip


def write(folder: Path, template: Any = PLAIN + ASKS, **named: str) -> Path:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="unknown"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    named = {"bos_token": "<s>", "eos_token": "<e>"} | named
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_template_has_pieces_and_an_end_of_turn(name: str, tmp_path: Path) -> None:
    template, end = FAMILIES[name]
    tokenizer = load_tokenizer(write(tmp_path, template, eos_token="<e>"))
    assert WORDS.index(end) in end_tokens(tmp_path, tokenizer)
    pieces = chat_pieces(tokenizer)
    assert WORDS[pieces.end_of_turn] == end
    assert pieces.to_user[0] == pieces.end_of_turn
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "good"}], add_generation_prompt=True, tokenize=False
    )
    good = WORDS.index("good")
    assert [*pieces.before, good, *pieces.to_assistant] == tokenizer.encode(asked, add_special_tokens=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_of_turn_need_not_be_marked_as_special(name: str, tmp_path: Path) -> None:
    template, end = FAMILIES[name]
    write(tmp_path, template, eos_token="unknown")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((tmp_path / file).read_text())
        entries = data.get("added_tokens", []) + list(data.get("added_tokens_decoder", {}).values())
        for entry in entries:
            entry["special"] = entry["content"] != "<e>" and entry["content"] != "<eot>" and entry["special"]
        (tmp_path / file).write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    if "eos_token" in template:
        end = "unknown"
    else:
        assert not tokenizer.added_tokens_decoder[WORDS.index(end)].special
    assert end_tokens(tmp_path, tokenizer) == sorted({WORDS.index(end), WORDS.index("unknown")})
    assert WORDS[chat_pieces(tokenizer).end_of_turn] == end


def test_a_word_that_was_added_ends_no_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, PLAIN.replace("<e>", "good <e>") + ASKS))
    tokenizer.add_tokens(["good"])
    assert end_tokens(tmp_path, tokenizer) == [1]


def test_end_tokens_are_those_of_all_files(tmp_path: Path) -> None:
    template = FAMILIES["Llama 3"][0]
    tokenizer = load_tokenizer(write(tmp_path, template))
    assert end_tokens(tmp_path, tokenizer) == [1, 2]  # the tokenizer's, and the template's end of turn
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert end_tokens(tmp_path, tokenizer) == [1, 2, 3, 4]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(CheckpointError, match=r"eos_token_id '</s>' must be"):
        end_tokens(tmp_path, tokenizer)


def test_the_digest_follows_what_is_in_the_tokenizer_and_not_where_it_lies(tmp_path: Path) -> None:
    first, second = (load_tokenizer(write(tmp_path / name)) for name in ("one", "two"))
    assert text_digest(first, [1]) == text_digest(second, [1]) != text_digest(first, [1, 2])
    other = load_tokenizer(write(tmp_path / "three", ASKS + PLAIN))
    assert text_digest(other, [1]) != text_digest(first, [1])


def test_tokens_beyond_the_embedding_are_refused_and_padding_is_not(tmp_path: Path) -> None:
    tokenizer, rows = load_tokenizer(write(tmp_path)), len(WORDS)
    check_vocabulary(tmp_path, tokenizer, [1], rows)
    check_vocabulary(tmp_path, tokenizer, [1], rows + 50)
    with pytest.raises(CheckpointError, match=rf"end token {rows} .*embedding of {rows} rows"):
        check_vocabulary(tmp_path, tokenizer, [1, rows], rows)
    with pytest.raises(CheckpointError, match=rf"the tokenizer has token {rows - 1} \('unknown'\).*{rows - 1} rows"):
        check_vocabulary(tmp_path, tokenizer, [1], rows - 1)
    with pytest.raises(CheckpointError, match=r"the chat template writes token 5 \('user'\)"):
        check_vocabulary(tmp_path, tokenizer, [1], 5)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }", "template fails .*TemplateSyntaxError"),
        (PLAIN + "{{ messages | fromjson }}", "template fails"),
        ("{{ raise_exception('a system message first') }}", "a system message first"),
        ("<s> fixed", "leaves out the user's question"),
        ({"rag": PLAIN}, "named rag, and none named default"),
        (None, "lacks a chat template"),
    ],
)
def test_a_template_that_does_not_work_is_refused(template: Any, says: str, tmp_path: Path) -> None:
    write(tmp_path, template)
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(tmp_path)


def test_a_template_that_drops_history_writes_no_conversations(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, "<s> user {{ messages[-1]['content'] }} <e> " + ASKS))
    with pytest.raises(UserError, match="three turns of a conversation"):
        chat_pieces(tokenizer)


def test_a_config_that_transformers_refuses_is_not_the_tokenizers_fault(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "pad_token_id": "x"}))
    with pytest.raises(
        CheckpointError, match=r"config\.json is refused by transformers .*pad_token_id.*: correct what it names"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_version_is_refused(tmp_path: Path) -> None:
    data = json.loads((write(tmp_path) / "tokenizer.json").read_text())
    data["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)


# --- GGUF -----------------------------------------------------------------------------------------------------------

TOKENS = ["<b>", "<eos>", "<eot>", "<eom>", *"abc0123456789", "Ġ", "Ċ", "ĊĊ", "12", "123", "Ġ1"]


def write_gguf(path: Path, pre: str | None, **ids: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(["Ċ Ċ", "1 2", "12 3", "Ġ 1"])
    for name, value in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.add_chat_template("{% for m in messages %}<b>{{ m['content'] }}<eot>{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "\n\n1 123", ["ĊĊ", "1", "Ġ", "1", "2", "3"]),
        ("gpt-2", "1 123", ["1", "Ġ", "123"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("llama-bpe", "1231 1", ["123", "1", "Ġ", "1"]),
        ("default", "1231", ["123", "1"]),
        (None, "1231", ["123", "1"]),
    ],
)
def test_a_ggufs_text_is_split_as_it_says(pre: str | None, text: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre, bos=0, eos=1))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) == pieces
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.convert_ids_to_tokens(again.encode(text, add_special_tokens=False)) == pieces
    check_vocabulary(tmp_path, again, [1], len(TOKENS))  # none added that the file has not


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pre 'deepseek-llm' is unknown"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", "deepseek-llm", eos=1))


def test_a_ggufs_end_tokens(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "smollm", eos=1, eom=3)
    assert end_tokens(path, load_tokenizer(path)) == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"eot_token_id 99 lies outside the vocabulary"):
        load_tokenizer(write_gguf(tmp_path / "n.gguf", "smollm", eos=1, eot=99))


# --- prompts and openings -------------------------------------------------------------------------------------------


def a_target(folder: Path) -> Target:
    tokenizer = load_tokenizer(write(folder))
    return Target(None, {}, None, tokenizer, "", end_tokens(folder, tokenizer), "")  # type: ignore[arg-type]


def test_control_tokens_in_prompts_and_openings_are_text(tmp_path: Path) -> None:
    target, path = a_target(tmp_path), tmp_path / "openings.txt"
    path.write_text("good <e>\nbe <s> good\n")
    unknown = WORDS.index("unknown")
    be, good, user, assistant = (WORDS.index(word) for word in ("be", "good", "user", "assistant"))
    assert openings_of(path, target) == [[good, unknown, unknown], [be, unknown, unknown, good]]
    assert openings_of(None, target) == []
    tokens = prompt_tokens(target, ["be good <e>", "good"], 100)
    first = [0, user, be, good, unknown, unknown, 1, 0, assistant]
    assert tokens.tolist() == [[*first, 0, user, good, 1, 0, assistant]]
    assert prompt_tokens(target, ["be good <e>", "good"], 3).tolist() == [first[:3]]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_an_opening_is_a_line_whatever_else_ends_one_elsewhere(inside: str, tmp_path: Path) -> None:
    path = tmp_path / "openings.txt"
    path.write_bytes(f"be{inside}good\r\n\nbe\\ngood\n".encode())
    be, good = WORDS.index("be"), WORDS.index("good")
    assert openings_of(path, a_target(tmp_path)) == [[be, good], [be, good]]


# --- files of text --------------------------------------------------------------------------------------------------


def test_prompts_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é\u2028x"}\n'.encode())
    assert read_prompts(path) == ["é\u2028x"]
    for data, says in ((b'{"prompt": "\xe9"}', "is not UTF-8"), (rb'{"prompt": "\ud83d"}', "half of a surrogate pair")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=says):
            read_prompts(path)
