"""Prompts, and what a right answer to them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssv.ab.questions import Question, read_questions
from ssv.support.errors import UserError
from ssv.support.prompts import read_prompts


def file_of(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_prompt_alone_is_numbered_by_its_line_and_cannot_be_checked(tmp_path: Path) -> None:
    first, second = read_questions(file_of(tmp_path, {"prompt": "Hi"}, "", {"prompt": "Ho", "id": "x"}))
    assert (first.id, first.prompt, first.answers) == ("1", "Hi", ())
    assert second.id == "x"
    assert first.score("anything") is None


def test_other_fields_of_a_line_do_not_matter(tmp_path: Path) -> None:
    (question,) = read_questions(file_of(tmp_path, {"prompt": "Hi", "category": "x", "id": 7}))
    assert question.id == "7"


def test_a_number_is_checked_as_one_and_a_text_by_its_words(tmp_path: Path) -> None:
    given = [{"prompt": "a", "answer": answer} for answer in (4, 2.5, "4", [1, 2], ["one", 1])]
    questions = read_questions(file_of(tmp_path, *given))
    assert [q.check for q in questions] == ["number", "number", "contains", "number", "contains"]
    assert [q.answers for q in questions] == [("4",), ("2.5",), ("4",), ("1", "2"), ("one", "1")]


def test_line_separators_within_a_text_are_text(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0cd"
    path = tmp_path / "prompts.jsonl"
    path.write_bytes((json.dumps({"prompt": text}, ensure_ascii=False).replace("\\f", "\\u000c") + "\r\n").encode())
    assert [q.prompt for q in read_questions(path)] == [text]
    assert read_prompts(path) == [text]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert [q.prompt for q in read_questions(path)] == read_prompts(path) == [text]


@pytest.mark.parametrize(
    ("check", "answer", "text", "score"),
    [
        ("exact", "New York", "new york!", 1),
        ("exact", "New York", "New York City", 0),
        ("exact", "New York", "", 0),
        ("contains", "New York", "It is NEW-YORK, of course.", 1),
        ("contains", "York", "Yorkshire", 0),
        ("contains", "New York", "York New", 0),
        ("contains", "Straße", "die STRASSE", 1),
        ("number", "4", "2 + 2 is 4.", 1),
        ("number", "4", "4 is not 5", 0),
        ("number", "1234.5", "It is 1,234.50", 1),
        ("number", "1,000", "1000", 1),
        ("number", "-3", "minus: -3", 1),
        ("number", "3", "-3", 0),
        ("number", "4", "four", 0),
        ("f1", "the cat sat", "the cat sat", 1),
        ("f1", "the cat sat", "the cat", 0.8),
        ("f1", "a b c d", "a a x y", 0.25),
        ("f1", "a", "", 0),
    ],
)
def test_an_answer_is_right_as_its_check_says(check: str, answer: str, text: str, score: float) -> None:
    assert Question("1", "?", (answer,), check).score(text) == pytest.approx(score)


def test_any_of_several_answers_is_right() -> None:
    question = Question("1", "?", ("USA", "United States"))
    assert [question.score(text) for text in ("the United States", "in the USA", "America")] == [1, 1, 0]
    assert Question("1", "?", ("a b", "a"), "f1").score("a") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object with a `prompt`"),
        ('"Hi"', "expected a JSON object with a `prompt`"),
        ({"text": "Hi"}, "expected a JSON object with a `prompt`"),
        ({"prompt": 5}, "expected a JSON object with a `prompt`"),
        ({"prompt": "  "}, "that is not empty"),
        ({"prompt": "a", "answer": True}, "`answer` must be a text, a number, or a list"),
        ({"prompt": "a", "answer": None}, "`answer` must be a text, a number, or a list"),
        ({"prompt": "a", "answer": [["b"]]}, "`answer` must be a text, a number, or a list"),
        ({"prompt": "a", "answer": " "}, "`answer` must be a text, a number, or a list"),
        ({"prompt": "a", "answer": "?!"}, "`answer` holds no word or number"),
        ({"prompt": "a", "answer": "b", "check": "regex"}, "unknown check 'regex'; known: exact, contains, number, f1"),
        ({"prompt": "a", "answer": "four", "check": "number"}, "needs answers that are numbers"),
        ('{"prompt": "a", "answer": NaN}', "needs answers that are numbers"),
        ({"prompt": "a", "answer": "b", "check": ["f1"]}, "unknown check"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: ") as caught:
        read_questions(file_of(tmp_path, {"prompt": "fine"}, line))
    assert message in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompts"):
        read_questions(file_of(tmp_path, "", "  "))


def test_an_id_comes_once(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"}]
    with pytest.raises(UserError, match="the id 'x' comes 2 times: give each prompt its own"):
        read_questions(file_of(tmp_path, *lines))
    with pytest.raises(UserError, match="the id '2' comes 2 times"):
        read_questions(file_of(tmp_path, {"prompt": "a", "id": 2}, {"prompt": "b"}))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read_questions(tmp_path / "none.jsonl")
