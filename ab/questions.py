"""Prompts of a comparison, and what a right answer to them looks like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssv.ab import scoring
from ssv.support.errors import UserError
from ssv.support.json_text import read_json_lines

RIGHT_OR_WRONG = ("exact", "contains", "number")
CHECKS = (*RIGHT_OR_WRONG, "f1")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt.

    Attributes:
        answers: any of them is right; none if answers cannot be checked.
        check: `exact`: the text is an answer; `contains`: an answer's words stand in it; `number`: its last number is
            the answer; `f1`: share of words in common, from 0 to 1. What a word and a number is, `ssv.ab.scoring` says.
    """

    id: str
    prompt: str
    answers: tuple[str, ...] = ()
    check: str = "contains"

    def score(self, text: str) -> float | None:
        """1 for right and 0 for wrong, between them for `f1`; None if it cannot be checked."""
        if not self.answers:
            return None
        text = scoring.without_thinking(text)
        return max(_SCORES[self.check](text, answer) for answer in self.answers)


def read_questions(path: Path) -> list[Question]:
    """Prompts of a JSON lines file: `prompt`, and where wanted `id`, `answer` (a text, a number, or several) and
    `check`.

    Raises:
        UserError: the file cannot be read; a line that is not so, naming it; an id that comes twice; no prompts.
    """
    questions: list[Question] = []
    for number, given in read_json_lines(path):
        try:
            questions.append(_question(given, number))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not questions:
        raise UserError(f"{path} holds no prompts")
    most, times = Counter(q.id for q in questions).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: the id {most!r} comes {times} times", "give each prompt its own")
    return questions


def _question(given: Any, number: int) -> Question:
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str) or not given["prompt"].strip():
        raise ValueError("expected a JSON object with a `prompt` that is not empty")
    answer = given.get("answer", [])
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(a, str | int | float) and not isinstance(a, bool) and str(a).strip() for a in answers):
        raise ValueError("`answer` must be a text, a number, or a list of them")
    is_number = bool(answers) and all(isinstance(a, int | float) for a in answers)
    check = given.get("check", "number" if is_number else "contains")
    if check not in CHECKS:
        raise ValueError(f"unknown check {check!r}; known: {', '.join(CHECKS)}")
    if check == "number" and not all(scoring.parse_number(str(a)) is not None for a in answers):
        raise ValueError("check `number` needs answers that are numbers")
    if check != "number" and not all(scoring.words(str(a)) for a in answers):
        raise ValueError("`answer` holds no word or number, which is what is compared")
    return Question(str(given.get("id", number)), given["prompt"], tuple(map(str, answers)), check)


_SCORES = {"exact": scoring.exact, "contains": scoring.contains, "number": scoring.number, "f1": scoring.f1}
