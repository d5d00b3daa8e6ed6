"""What is said of settings that somebody else wrote."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from ssv.support.errors import UserError
from ssv.support.strict import Given, Strict, problems


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


class Sizes(Given):
    share: Annotated[float, Field(le=1)]
    sizes: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)

    @model_validator(mode="after")
    def _is_no_half(self) -> Sizes:
        if self.share == 0.5:
            raise ValueError("a half is too little. Give more")
        return self


class Box(Strict):
    sizes: Sizes


@pytest.mark.parametrize(
    ("given", "what", "cure"),
    [
        ({"share": 2}, "share 2 cannot be", "it must be less than or equal to 1"),
        ({"share": "x"}, "share 'x' cannot be", "it must be a valid number, unable to parse string as a number"),
        ({}, "share is missing", "give what is missing"),
        ({"share": 1, "shar": 1}, "shar is unknown", "known: share, sizes"),
        ({"share": 1, "sizes": ()}, "sizes () cannot be", "it must have at least 1 item after validation, not 0"),
        ({"share": 1, "sizes": (1, None)}, "sizes.1 None cannot be", "it must be a valid integer"),
        ({"share": 0.5}, "a half is too little. Give more", ""),
        (
            {"share": 2, "sizes": 2},
            "share 2 cannot be; sizes 2 cannot be",
            "it must be less than or equal to 1; it must",
        ),
    ],
)
def test_a_caller_hears_what_is_wrong_and_what_to_do(given: dict[str, Any], what: str, cure: str) -> None:
    with pytest.raises(UserError) as raised:
        Sizes(**given)
    assert raised.value.what == what
    assert raised.value.cure.startswith(cure)
    with pytest.raises(ValidationError) as refused:  # in a file, with its place there
        Box.model_validate({"sizes": given})
    assert problems(refused.value).startswith("sizes")
    with pytest.raises(ValidationError):
        Box.model_validate_json(json.dumps({"sizes": given}))


def test_what_is_right_is_made_in_each_way() -> None:
    made = Sizes(share=1, sizes=(1, 2))
    assert Sizes.model_validate(made.model_dump()) == Sizes.model_validate_json(made.model_dump_json()) == made
