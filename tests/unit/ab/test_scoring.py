"""How answers are read: words of all scripts, numbers as people and models write them, and what was thought before."""

# Letters and signs that look alike are what this is about.
# ruff: noqa: RUF001

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from ssv.ab.questions import Question, read_questions
from ssv.ab.scoring import numbers_at_the_end, parse_number, without_thinking, words


def score(answer: str, text: str, check: str = "contains") -> float | None:
    return Question("1", "?", (answer,), check).score(text)


# Words.


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("上海", "首都不是上海，而是別的。"),
        ("京都", "それは京都でしょう"),
        ("コーヒー", "熱いコーヒーです"),
        ("เชียงใหม่", "ฉันอยู่เชียงใหม่ครับ"),
        ("ລາວ", "ປະເທດລາວ"),
        ("ភ្នំពេញ", "នៅភ្នំពេញ"),
        ("မန္တလေး", "သူသည်မန္တလေးမှ"),
        ("부산", "답은 부산이에요."),
        ("부산", "부산"),  # decomposed
        ("मुंबई", "वह मुंबई में है"),
        ("தமிழ்", "இது தமிழ் மொழி"),
        ("naïve", "how nai\u0308ve!"),
        ("naïve", "NAÏVE"),
        ("GROSS", "groß"),
        ("résumé", "_résumé_"),
        ("ＸＹ９", "xy9"),
        ("ｶﾒﾗ", "新しいカメラだ"),  # half-width
        ("ﬁnal", "the final one"),
        ("co\u00adoperate", "cooperate"),
        ("\u202bשלום\u202c", "שלום"),
        ("1000", "1,000 people"),
        ("3.5", "about 3.50 m"),
        ("18", "答案是18。"),
        ("v2", "**v2**"),
        ("Straße 5", "STRASSE 5."),
    ],
)
def test_an_answer_stands_in_a_text_of_any_script(answer: str, text: str) -> None:
    assert score(answer, text) == 1.0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Rome", "Romeo"),
        ("大坂", "坂大"),
        ("5", "3.5"),
        ("3", "3.5"),
        ("12", "1,200"),
        ("cafe", "café"),
        ("दल", "दिल्ली"),  # the letters alone are not the word
        ("ก", "กิ"),  # nor a character without its marks
        ("v2", "v 2"),
    ],
)
def test_another_word_is_not_the_answer(answer: str, text: str) -> None:
    assert score(answer, text) == 0.0


def test_words_are_what_the_rule_says() -> None:
    assert words("It's 1,234.50 USD, not 3,4.") == ["it", "s", "1234.5", "usd", "not", "3", "4"]
    assert words("東京タワー333m") == ["東", "京", "タ", "ワ", "ー", "333m"]
    assert words("กี่คน") == ["กี่", "ค", "น"]
    assert words("2024-12-25 25.12.2024") == ["2024", "12", "25", "25", "12", "2024"]
    assert words("\u0301 !?") == []


def test_f1_and_exact_go_by_the_same_words() -> None:
    assert score("東京", "東京。", "exact") == 1.0
    assert score("東京", "東京です", "exact") == 0.0
    assert score("東京", "東京です", "f1") == pytest.approx(2 * 2 / (2 + 4))
    assert score("서울", "부산", "f1") == 0.0
    assert score("1,000 m", "1000 m", "exact") == 1.0


# Numbers.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Signs, and dashes that are none.
        ("It takes 5-7 days.", 7),
        ("from 20–30", 30),
        ("20‑30", 30),
        ("20 - 30", 30),
        ("COVID-19", 19),
        ("10%-12%", 12),
        ("3°-5°", 5),
        ("(4)-6", 6),
        ("10€-12€", 12),
        ("$10-$12", 12),
        ("in 2021-03-07", 7),
        ("it is -7", -7),
        ("it is −7", -7),
        ("it is –7", -7),
        ("it is ‐7", -7),
        ("it is －7", -7),
        ("x=-7", -7),
        ("(-7)", -7),
        ("**-7**", -7),
        ("$-7$", -7),
        ("-$7", -7),
        ("−€7.50", "-7.5"),
        ("$-7", -7),
        ("+7", 7),
        ("- 7", 7),  # an item of a list
        ("9-4 = 5", 5),
        ("the answer—7", 7),
        # Points, exponents, powers.
        (".25", "0.25"),
        ("y = -.25", "-0.25"),
        ("No.5", 5),
        ("0.250", "0.25"),
        ("It is 7.", 7),
        ("2.5e3", 2500),
        ("2.5E+3", 2500),
        ("2e-3", "0.002"),
        ("2.5 × 10^3", 2500),
        ("2.5×10³", 2500),
        ("2.5 x 10^{3}", 2500),
        (r"2.5 \times 10^{-3}", "0.0025"),
        ("6·10⁻²", "0.06"),
        ("10²", 100),
        ("2^5", 32),
        ("2^5 = 32", 32),
        ("12 m²", 12),
        ("12 cm^2", 12),
        ("12 kg/m^{3}", 12),
        ("3 x 10", 10),
        ("7 eggs", 7),
        ("7e", 7),
        ("x₁ = 9 of x₂", 9),
        # Fractions.
        ("3/4", "3/4"),
        ("3 / 4", "3/4"),
        ("3⁄4", "3/4"),
        ("¾", "3/4"),
        ("2¾", "11/4"),
        ("2 3/4", "11/4"),
        ("-3/4", "-3/4"),
        ("-¾", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac34", "-3/4"),
        ("12/25/2024", 2024),
        ("3/0", 0),
        # Groups.
        ("2,345", 2345),
        ("2,345,678.9", "2345678.9"),
        ("2.345.678", 2345678),
        ("2.345,6", "2345.6"),
        ("2 345 678", 2345678),
        ("2\u00a0345,6", "2345.6"),
        ("2\u202f345", 2345),
        ("2'345.6", "2345.6"),
        ("2’345", 2345),
        ("2_345", 2345),
        (r"2{,}345", 2345),
        (r"2\,345", 2345),
        ("12,34,567", 1234567),
        ("2.345", "2.345"),
        ("$2,345.60", "2345.6"),
        ("2,345,", 2345),
        ("1,2,3", 3),
        ("1,2,345", 345),
        ("1,2.5", "2.5"),
        ("3.14.15", 15),
        ("25.12.2024", 2024),
        ("in 2020 100", 100),
        ("10:30", 30),
        # Digits of other scripts, and what stands beside.
        ("٣٤", 34),
        ("٣٫٥", "3.5"),
        ("３，０００", 3000),
        ("१२", 12),
        ("答えは34です", 34),
        ("34 %", 34),
        ("34th", 34),
        (r"34\%", 34),
        # A box is the answer, whatever follows.
        (r"\boxed{34} as shown in step 2", 34),
        (r"first \boxed{1}, so \boxed{\frac{1}{2}}.", "1/2"),
        (r"\boxed{34", 34),
        (r"34 \boxed{\text{none}}", 34),
    ],
)
def test_the_last_number_is_read_as_the_rule_says(text: str, value: int | str) -> None:
    assert numbers_at_the_end(text) == {Fraction(value)}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("7,5", ["7.5", 5]),
        ("0,500", ["0.5", 500]),
        ("12,50 €", ["12.5", 50]),
        ("3 100", [3100, 100]),
        ("-7,5", ["-7.5", -5]),
    ],
)
def test_what_can_be_read_in_two_ways_is_right_in_both(text: str, values: list[int | str]) -> None:
    assert numbers_at_the_end(text) == set(map(Fraction, values))
    for value in values:
        assert score(str(value), text, "number") == 1.0


def test_values_are_compared_exactly() -> None:
    assert score("9007199254740993", "9007199254740993", "number") == 1.0
    assert score("9007199254740993", "9007199254740992", "number") == 0.0
    assert score("0.1", "1/10", "number") == 1.0
    assert score("0.33", "1/3", "number") == 0.0
    assert score("5", "no digits", "number") == score("5", "", "number") == 0.0


@pytest.mark.parametrize("text", ["1e999999999", "9^99999999", "9" * 5000, "0^-1", "10^" + "9" * 400])
def test_what_would_take_long_to_work_out_is_no_number(text: str) -> None:
    assert numbers_at_the_end(text) <= {Fraction(0), Fraction(-1)}
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("−7", -7),
        ("1,000", 1000),
        ("1 000", 1000),
        ("3,4", "3.4"),
        ("$5", 5),
        ("50%", 50),
        ("1/2", "1/2"),
        ("1e-07", "1e-7"),
        ("1,2,3", None),
        ("10-12", None),
        ("7 apples", None),
        ("seven", None),
        ("nan", None),
        ("", None),
    ],
)
def test_an_answer_to_be_checked_as_a_number_is_one(text: str, value: int | str | None) -> None:
    assert parse_number(text) == (None if value is None else Fraction(value))


def test_a_file_may_hold_any_of_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    given = [{"prompt": "?", "check": "number", "answer": answer} for answer in ("1/2", "−3", "1.5e3", 1e-7)]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in given), encoding="utf-8")
    scores = [question.score("1/2 −3 1500") for question in read_questions(path)]
    assert scores == [0.0, 0.0, 1.0, 0.0]


# Thinking.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>Rome? No.</think>Oslo", "Oslo"),
        ("<think>Rome? No.</think>\n\nOslo", "\n\nOslo"),
        ("Rome? No.</think>Oslo", "Oslo"),  # its opening was in the prompt
        ("<think>Rome? I am not", ""),
        ("Oslo<think>Rome?", "Oslo"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<THINKING>a</THINKING>b", "b"),
        ("<reasoning>a</reasoning>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<think></think>b", "b"),
        ("I think < that", "I think < that"),
    ],
)
def test_what_was_thought_before_is_not_the_answer(text: str, answer: str) -> None:
    assert without_thinking(text) == answer


def test_only_the_answer_is_scored() -> None:
    text = "<think>Is it Rome, or 12?</think>It is Oslo, and 7."
    assert score("Rome", text) == 0.0
    assert score("Oslo", text) == 1.0
    assert score("12", text, "number") == 0.0
    assert score("Rome", "<think>Rome, surely") == 0.0
