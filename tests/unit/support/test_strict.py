"""What is said of settings that somebody else wrote."""

from __future__ import annotations

import pytest
from pydantic import ValidationError, field_validator, model_validator

from ssv.support.strict import Strict, problems


class Part(Strict):
    size: int

    @field_validator("size")
    @classmethod
    def _is_even(cls, size: int) -> int:
        if size % 2:
            raise ValueError(f"{size} is odd")
        return size


class Whole(Strict):
    parts: list[Part]

    @model_validator(mode="after")
    def _has_parts(self) -> Whole:
        if not self.parts:
            raise ValueError("parts are missing")
        return self


@pytest.mark.parametrize(
    ("given", "called", "said"),
    [
        ({"parts": [{"size": 2}, {"size": 3}]}, "", "parts.1.size: 3 is odd"),
        ({"parts": []}, "recipe", "recipe: parts are missing"),
        ({"parts": []}, "", "parts are missing"),
        ({"parts": [], "x": 1}, "recipe", "x: Extra inputs are not permitted"),
        (
            {"parts": [{"size": 1}, {}]},
            "recipe",
            "parts.0.size: 1 is odd; parts.1.size: Field required",
        ),
    ],
)
def test_each_problem_is_said_with_its_key_in_our_own_words(given: object, called: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(given)
    assert problems(caught.value, called) == said
