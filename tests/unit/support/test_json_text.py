"""JSON of others, nested deeper than anybody means it: refused by name wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ssv.ab.journal import JournalReader
from ssv.ab.openai_endpoint import _parsed
from ssv.ab.questions import read_questions
from ssv.builder.place import bundle_at
from ssv.builder.preflight import read_calibration
from ssv.builder.tokenizer import end_tokens, load_tokenizer
from ssv.bundle.manifest import read_manifest
from ssv.model.checkpoint import read_hf_folder
from ssv.model.unified import load_any
from ssv.runtime.tokenizer_files import FileTokenizer
from ssv.support.errors import UserError
from ssv.support.json_text import MAX_DEPTH, parse_json, read_json_lines, read_json_object
from ssv.support.prompts import read_prompts


def write_tokenizer(folder: Path) -> None:
    backend = Tokenizer(WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", chat_template=template).save_pretrained(folder)


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


DEPTHS = (MAX_DEPTH + 1, 900, 100_000)


@pytest.mark.parametrize("levels", DEPTHS)
def test_what_is_nested_too_deeply_is_no_value(levels: int) -> None:
    for text in (nested(levels), '{"a":' * levels + "1" + "}" * levels):
        with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH} levels"):
            parse_json(text)
    assert parse_json(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    assert parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="Expecting property name"):
        parse_json("{")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.json": ("config.json", lambda path: read_hf_folder(path.parent)),
    "config.json of a quantized checkpoint": ("config.json", lambda path: load_any(path.parent)),
    "config.json of a tokenizer": ("config.json", lambda path: load_tokenizer(path.parent)),
    "generation_config.json": (
        "generation_config.json",
        lambda path: end_tokens(path.parent, load_tokenizer(path.parent)),
    ),
    "tokenizer_config.json": ("tokenizer_config.json", lambda path: load_tokenizer(path.parent)),
    "special_tokens_map.json": ("special_tokens_map.json", lambda path: load_tokenizer(path.parent)),
    "tokenizer_config.json of a bundle": ("tokenizer_config.json", lambda path: FileTokenizer.load(path.parent)),
    "manifest.json": ("manifest.json", lambda path: read_manifest(path.parent)),
    "manifest.json of another": ("manifest.json", lambda path: bundle_at(path.parent)),
    "calibration.json": ("calibration.json", read_calibration),
    "prompts": ("prompts.jsonl", read_prompts),
    "questions": ("questions.jsonl", read_questions),
}


@pytest.mark.parametrize("levels", DEPTHS)
@pytest.mark.parametrize("name", READERS)
def test_files_that_are_nested_too_deeply_are_named(name: str, levels: int, tmp_path: Path) -> None:
    file, read = READERS[name]
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(nested(levels) + "\n")
    with pytest.raises(UserError, match=file.replace(".", r"\.")) as raised:
        read(tmp_path / file)
    assert "nested deeper than" in str(raised.value) or file == "prompts.jsonl"


def test_an_index_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(nested(100_000))
    with pytest.raises(UserError, match=r"model.safetensors.index.json is damaged"):
        read_hf_folder(tmp_path)


def test_what_a_server_or_a_journal_says_is_no_value_then(tmp_path: Path) -> None:
    assert _parsed(nested(100_000)) is None
    (tmp_path / "journal").write_text(nested(100_000) + "\n" + '{"a": 1}\n')
    journal = JournalReader(tmp_path / "journal")
    assert journal.read() == [{"a": 1}] and journal.torn == 1


# --- objects and lines ----------------------------------------------------------------------------------------------


class Broken(UserError):
    """Stands for the error of a domain."""


def test_a_file_is_an_object_or_what_is_asked_for_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    for data, says in ((b"[1]", "is not a JSON object"), (b"{", "is not JSON (Expecting"), (b"\xff", "is not JSON (")):
        path.write_bytes(data)
        with pytest.raises(Broken) as raised:
            read_json_object(path, Broken, "mend it")
        assert str(raised.value).startswith(f"{path} {says}")
        assert raised.value.cure == "mend it"
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "none", Broken)


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "\u2028"}\r\n\n  \n[2]'.encode())
    assert list(read_json_lines(path)) == [(1, {"a": "\u2028"}), (4, [2])]
    path.write_text('{"a": 1}\n\n{"a": \n')
    lines = read_json_lines(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match=r"a\.jsonl:3: it is not JSON \("):
        next(lines)
