"""Measured costs between and beyond the sizes that were measured."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ssv.bundle.profile import Curve


def test_between_and_beyond() -> None:
    curve = Curve(tokens=(1, 2, 8), seconds=(1.0, 1.5, 4.5))
    assert [curve.at(n) for n in (1, 1.5, 2, 4, 8, 10)] == pytest.approx([1.0, 1.25, 1.5, 2.5, 4.5, 5.5])


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        ((1,), (1.0,)),
        ((1, 2), (1.0,)),
        ((2, 1), (1.0, 2.0)),
        ((1, 1), (1.0, 2.0)),
        ((1, 2), (2.0, 1.0)),
        ((1, 2), (0.0, 1.0)),
    ],
)
def test_what_is_no_curve(tokens: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        Curve(tokens=tokens, seconds=seconds)
