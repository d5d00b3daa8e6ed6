"""How the text of an answer is compared with what is known to be right.

**What is compared.** The text without what the model thought before: blocks of `<think>`, `<thinking>`, `<thought>`,
`<reasoning>`, `<seed:think>`, `[THINK]` and `◁think▷`, nested ones too. A block that is never closed reaches to the end
of the text, one that is never opened (its opening was in the prompt) from the beginning.

**Words** (checks `exact`, `contains` and `f1`). Both texts are brought to Unicode's NFKC form and case-folded, so that
full-width letters, composed and decomposed accents and "STRASSE" are what they look like; format characters (joiners,
soft hyphens) are dropped. A word is a run of letters, digits and combining marks; everything else parts words and does
not count. Scripts that are written without spaces, or whose endings stick to the word, are compared character by
character, each with its marks: Han, Kana, Bopomofo, Hangul, Thai, Lao, Khmer, Burmese, Tibetan, Javanese, Balinese, Yi
and the Tai scripts. So "北京" stands in "答案是北京。", and "서울" in "서울입니다". A number with separators is one
word: "3" does not stand in "3.5", and "1,000" is "1000".

**Numbers** (check `number`). The last number of the last `\\boxed{...}`, or without one of the text, is the answer.

* A sign is one where nothing is subtracted from: "-5", "−5" (and other dashes but the long one), "x=-5", "-$5"; in
  "10-12", "297–348" and "2024-12-25" the dash stands between two numbers.
* ".5" is 0.5, "1.5e3" and "1.5 × 10^3" are 1500, "10²" is 100; an exponent behind a letter ("m²") is no number.
* "1/2", "1⁄2", "½", "1 1/2" and `\\frac{1}{2}` are fractions; "12/25/2024" is three numbers.
* Groups of three digits (or India's) are one number: "1,234.50", "1.234.567", "1.234,5", "1 234", "1'234". "1,234" is
  1234, "1.234" is not.
* What can be read in two ways is right if either reading is: "3,4" is 3.4, or two numbers of which 4 is the last;
  "3 100", with a space that may break, is 3100, or 3 and 100. "1,2,3" is a list.
* Digits of all scripts are digits. Words for numbers, units and percent signs are not worked out: "18 %" is 18,
  "2 million" is 2.
* Values are compared exactly: 3.0 is 3, and 1/3 is not 0.33.
"""

# Letters and signs that look alike are what this is about.
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

_TAGS = "think|thinking|thought|reasoning|seed:think"
_THINKING = re.compile(
    rf"(?P<open><(?:{_TAGS})>|\[THINK\]|◁think▷)|(?P<close></(?:{_TAGS})>|\[/THINK\]|◁/think▷)", re.IGNORECASE
)

_BY_CHARACTER = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf"
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u3130-\u318f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua000-\ua4cf\ua960-\ua97f\ua980-\ua9df\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff"
    "\U00016fe0-\U00018cff\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff]"
)

_MAX_DIGITS = 1000
"""Longer numbers, and exponents beyond, are none: working them out would take long."""

_CURRENCY = "$€£¥₹"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUBSCRIPT = re.compile("[₀-₎]+")
_NO_BREAK_SPACE = re.compile("(?<=\\d)[\u00a0\u2007\u2009\u202f](?=\\d{3}(?!\\d))")
_BEFORE_VULGAR = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")
_LOOK_ALIKES = str.maketrans("−‒–‐⁄∕٫٬’", "----//.,'")
_LATEX = (
    (re.compile(r"\\[dtc]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\{([.,])\}"), r"\1"),
    (re.compile(r"(?<=\d)(?:\\[,;: ]|_)(?=\d{3})"), "'"),
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"\\([$%])"), r"\1"),
)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")

_RUN = re.compile(r"\d+(?:[.,']\d+| \d{3}(?!\d))*|(?<![\w.])\.\d+")
_MIXED = re.compile(r"(\d+) (\d+)/(\d+)(?![\d/])")
_POWER = r"\s?\^\s?(?:\{\s?)?([+-]?\d+)(?:\s?\})?"
_SCIENTIFIC = re.compile(rf"\s?[×*·⋅xX]\s?10{_POWER}|[eE]([+-]?\d+)(?!\w)")
_FRACTION = re.compile(r"\s?/\s?(\d+(?:\.\d+)?)(?![\d/])")
_RAISED = re.compile(_POWER)
_IS_EXPONENT = re.compile(r"\^\s?(?:\{\s?)?[+-]?$")
_SIGNED = re.compile(rf"(?:^|[^\w)\]}}%°{_CURRENCY}]|(?<!\d)[{_CURRENCY}])-[{_CURRENCY}]?$")
_BESIDE_A_NUMBER = re.compile(rf"[\s+%{_CURRENCY}-]*")

_SEPARATED = re.compile(r"(\d+(?:[.,']\d+)+)")


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in a text, with all that it can be read as.

    Attributes:
        start, end: in the text, the sign included.
        values: one for each reading, the first one's that it is a single number, if there is such a reading (`is_one`).
    """

    start: int
    end: int
    values: tuple[Fraction, ...]
    is_one: bool


def without_thinking(text: str) -> str:
    """What the model answered, without what it wrote between tags of thinking before."""
    kept, at = "", 0
    for start, end in thinking(text):
        kept, at = kept + text[at:start], end
    return kept + text[at:]


def thinking(text: str) -> list[tuple[int, int]]:
    """Where it was thinking, tags included: starts and ends, in order."""
    spans: list[tuple[int, int]] = []
    depth = begun = 0
    for match in _THINKING.finditer(text):
        if match["open"]:
            begun = match.start() if depth == 0 else begun
            depth += 1
        elif depth == 0:
            spans = [(0, match.end())]  # its opening was in the prompt
        else:
            depth -= 1
            spans += [(begun, match.end())] if depth == 0 else []
    return [*spans, (begun, len(text))] if depth else spans


def words(text: str) -> list[str]:
    """Words as the rule above has them."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = []
    for number, piece in enumerate(_SEPARATED.split(text)):
        found += _number_words(piece) if number % 2 else _plain_words(piece)
    return found


def numbers_at_the_end(text: str) -> set[Fraction]:
    """The number that a text ends with, in each way in which it can be read; empty without one."""
    text = _readable(text)
    boxes = [_balanced(text[match.end() :]) for match in _BOXED.finditer(text)]
    for part in (*reversed(boxes), text):
        if found := _numbers(part):
            return set(found[-1].values)
    return set()


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is a number, and nothing else but a currency or a percent sign."""
    text = _readable(text)
    found = _numbers(text)
    if len(found) != 1 or not found[0].is_one:
        return None
    beside = text[: found[0].start], text[found[0].end :]
    return found[0].values[0] if all(map(_BESIDE_A_NUMBER.fullmatch, beside)) else None


def exact(text: str, answer: str) -> float:
    """1 if a text has the answer's words and no others, else 0."""
    return float(words(text) == words(answer))


def contains(text: str, answer: str) -> float:
    """1 if the answer's words stand in a text, one behind the other, else 0."""
    return float(f" {' '.join(words(answer))} " in f" {' '.join(words(text))} ")


def number(text: str, answer: str) -> float:
    """1 if a text ends with the number that is the answer, else 0."""
    return float(parse_number(answer) in numbers_at_the_end(text))


def f1(text: str, answer: str) -> float:
    """Share of words in common, as SQuAD's (Rajpurkar et al. 2016)."""
    given, wanted = Counter(words(text)), Counter(words(answer))
    common = sum((given & wanted).values())
    return 2 * common / (given.total() + wanted.total())


def _plain_words(text: str) -> list[str]:
    found: list[str] = []
    is_open = False  # whether a letter goes on with the last word, and not only a mark
    is_word = False
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind[0] == "M":
            if is_word:
                found[-1] += character
        elif kind[0] in "LN":
            alone = _BY_CHARACTER.match(character) is not None
            if is_open and not alone:
                found[-1] += character
            else:
                found.append(character)
            is_open, is_word = not alone, True
        else:
            is_open = is_word = False
    return found


def _number_words(text: str) -> list[str]:
    """The words that digits with separators are: one, without separators of groups, if they can only be one number."""
    one, last = _readings(text)
    if one is None or last is not None:
        return re.split(r"\D", text)
    return [one.rstrip("0").rstrip(".") if "." in one else one]


def _readable(text: str) -> str:
    """With one spelling of digits, dashes, exponents and fractions."""
    text = _SUBSCRIPT.sub(" ", _BEFORE_VULGAR.sub(" ", text))
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = unicodedata.normalize("NFKC", _NO_BREAK_SPACE.sub("'", text)).translate(_LOOK_ALIKES)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def _numbers(text: str) -> list[_Number]:
    found, at = [], 0
    while match := _RUN.search(text, at):
        start, at = match.span()
        if _IS_EXPONENT.search(text[max(0, start - 5) : start]):
            continue
        one, last = _readings(match[0])
        readings, is_one = [reading for reading in (one, last) if reading is not None], one is not None
        shift, factor = 0, Fraction(1)
        try:
            if (mixed := _MIXED.match(text, start)) and int(mixed[3]):
                at, is_one = mixed.end(), True
                values = [int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3]))]
            else:
                if scientific := _SCIENTIFIC.match(text, at):
                    at, shift = scientific.end(), int(scientific[1] or scientific[2])
                elif text[start - 1 : start] != "/" and (under := _FRACTION.match(text, at)) and Fraction(under[1]):
                    at, factor = under.end(), 1 / Fraction(under[1])
                raised = _RAISED.match(text, at)
                power = int(raised[1]) if raised else 1
                at = raised.end() if raised else at
                if max(abs(shift), abs(power), len(match[0])) > _MAX_DIGITS:
                    continue
                values = [(Fraction(reading) * Fraction(10) ** shift) ** power * factor for reading in readings]
        except (ValueError, ZeroDivisionError):  # more digits than Python reads, or 0 to a power below 0
            continue
        sign = _SIGNED.search(text[max(0, start - 4) : start])
        if sign:
            start = text.rindex("-", 0, start)
        found.append(_Number(start, at, tuple(-value if sign else value for value in values), is_one))
    return found


def _readings(run: str) -> tuple[str | None, str | None]:
    """Digits and separators as one number, and as the last of several; None for what they cannot be."""
    groups = re.split(r"[.,' ]", run)
    separators = re.findall(r"[.,' ]", run)
    if not separators or run.startswith("."):
        return run, None
    one, last = _grouped(groups, separators), None
    if one is None and len(separators) == 1 and separators[0] in ".,":
        one = ".".join(groups)
        last = groups[-1] if separators == [","] else None
    elif one is None:
        # Of "1,2.5" and "3.4,5" the last is a number with a point.
        tail = re.split(r"[,' ]", run)[-1]
        last = tail if tail.count(".") == 1 and len(separators) > 1 and tail != run else groups[-1]
    elif separators == [" "]:
        last = groups[-1]
    return one, last


def _grouped(groups: list[str], separators: list[str]) -> str | None:
    """The number that is written in groups of digits, with or without decimals; None if they are no such groups."""
    by = separators[0]
    count = next((n for n, separator in enumerate(separators) if separator != by), len(separators))
    decimals = groups[count + 1 :]
    if separators[count:] not in ([], ["."], [","]) or (by == "." and count == 1 and not decimals):
        return None
    first, *others = groups[: count + 1]
    by_thousands = len(first) <= 3 and all(len(group) == 3 for group in others)
    by_lakhs = by == "," and count > 1 and len(first) <= 2 and [len(g) for g in others] == [2] * (count - 1) + [3]
    if first.startswith("0") or not (by_thousands or by_lakhs):
        return None
    return "".join((first, *others)) + "".join("." + digits for digits in decimals)


def _balanced(text: str) -> str:
    """Up to the brace that closes what was opened before; all of a text that was cut."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text
