"""A tokenizer read from its files gives what `transformers` gives."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssv.runtime.tokenizer import BundleTokenizer
from ssv.runtime.tokenizer_files import FileTokenizer, TokenizerFileError

TEXTS = [
    "a simple sentence, with a comma",
    "  spaces  and\nlines\n\n",
    "numbers 12345 and 'quotes' don't matter",
    "grüße, 漢字 and 🙂",
]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who's <there>?\n"},
    {"role": "assistant", "content": "nobody"},
    {"role": "user", "content": "grüße"},
]
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def like_sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    train(tokenizer, trainers.BpeTrainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    train(tokenizer, trainers.WordPieceTrainer)
    return tokenizer


def train(tokenizer: Tokenizer, trainer: type[Any], **settings: Any) -> None:
    special = [AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")]
    tokenizer.train_from_iterator(TEXTS, trainer(vocab_size=400, special_tokens=special, **settings))


def save(folder: Path, tokenizer: Tokenizer, template: Any = CHAT) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names).save_pretrained(folder)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("make", [byte_level, like_sentencepiece, word_piece])
def test_text_and_tokens_are_those_of_transformers(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    folder = save(tmp_path, make())
    ours, theirs = FileTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "<s>a control token</s> in text", "unseen ☃ and \ud7ff"):
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(theirs.vocab_size) for _ in range(draw.randrange(12))]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}|{% endfor %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ unk_token }}",
        "{{ tools is none }} {{ documents is none }} {{ pad_token is defined }} {{ strftime_now('%%') }}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "{{ messages[1]['content'].strip() | tojson(indent=2) }}{{ dict(a=1) }}",
    ],
)
def test_templates_see_what_they_see_in_transformers(template: str, tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), template)
    ours, theirs = FileTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt) == expected


def test_template_in_the_config_among_others_and_tokens_with_how_they_match(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": CHAT}]
    change_config(folder, lambda c: c.update(chat_template=named, eos_token={"content": "</s>", "lstrip": False}))
    text = FileTokenizer.load(folder).apply_chat_template(MESSAGES[:1])
    assert text == "<s><system> be brief</s>\n"


def test_a_template_of_a_file_of_its_own(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), "the folder's")
    path = tmp_path / "chat.jinja"
    path.write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")
    assert FileTokenizer.load(folder, path).apply_chat_template(MESSAGES[:1]) == MESSAGES[0]["content"]
    path.write_bytes(b"\xff")
    with pytest.raises(TokenizerFileError, match=f"{path} cannot be read"):
        FileTokenizer.load(folder, path)


def test_what_a_template_refuses_says_why(tmp_path: Path) -> None:
    tokenizer = FileTokenizer.load(save(tmp_path, byte_level(), "{{ raise_exception('no system, please') }}"))
    with pytest.raises(TemplateError, match="no system, please"):
        tokenizer.apply_chat_template(MESSAGES)


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateError, match="unsafe"):
        FileTokenizer.load(save(tmp_path, byte_level(), template)).apply_chat_template(MESSAGES)
    template = "{{ messages.append(messages[0]) }}"
    with pytest.raises(TemplateError, match="append"):
        FileTokenizer.load(save(tmp_path, byte_level(), template)).apply_chat_template(MESSAGES)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        FileTokenizer.load(save(tmp_path, byte_level(), None)).apply_chat_template(MESSAGES)


def test_prompts_are_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = byte_level()
    expected = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FileTokenizer.load(tmp_path).encode(TEXTS[0]) == expected


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerFileError, match=r"tokenizer_config.json is not a JSON object: build"):
        FileTokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerFileError, match=r"tokenizer_config.json is not JSON"):
        FileTokenizer.load(folder)
    (folder / "tokenizer.json").write_text('{"version": "9.0"}')
    with pytest.raises(TokenizerFileError, match=r"tokenizer.json cannot be read \(.*\): build the bundle again"):
        FileTokenizer.load(folder)


def test_a_bundle_s_tokenizer_is_read_from_its_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "tokenizer", byte_level())
    tokenizer = BundleTokenizer.load(tmp_path)
    assert isinstance(tokenizer.inner, FileTokenizer)
    ids = tokenizer.chat_ids(MESSAGES)
    assert (
        list(ids)
        == AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.decode(ids).startswith("<system> be brief\n")
