"""Corrections of what a draft says of its guesses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ssv.bundle.survival import LEAST, Survival


def test_nothing_is_corrected_where_nothing_is_known() -> None:
    for share in (0.0, 0.3, 1.0):
        assert Survival().corrected(share, 0, greedy=True) == share
        assert Survival().corrected(share, 5, greedy=False) == share


def test_log_odds_are_moved_and_stretched() -> None:
    survival = Survival(greedy=((0.0, 1.0), (1.0, 0.5)), sampled=((-1.0, 1.0),))
    assert survival.corrected(0.3, 0, greedy=True) == pytest.approx(0.3)
    # 1 + 0.5 ln(0.2 / 0.8) = 0.306853: e^x / (1 + e^x) = 0.576117
    assert survival.corrected(0.2, 1, greedy=True) == pytest.approx(0.576117, abs=1e-6)
    # Further ranks are corrected as the last one.
    assert survival.corrected(0.2, 3, greedy=True) == survival.corrected(0.2, 1, greedy=True)
    assert (
        survival.corrected(0.5, 0, greedy=False)
        == survival.corrected(0.5, 2, greedy=False)
        == pytest.approx(0.268941, abs=1e-6)
    )


def test_certainties_stay_finite() -> None:
    survival = Survival(greedy=((0.0, 1.0),))
    assert survival.corrected(1.0, 0, greedy=True) == pytest.approx(1 - LEAST)
    assert survival.corrected(0.0, 0, greedy=True) == pytest.approx(LEAST)


@pytest.mark.parametrize("table", [((0.0, 0.0),), ((0.0, -1.0),), ((0.0,),)])
def test_a_share_that_rises_never_falls(table: object) -> None:
    with pytest.raises(ValidationError):
        Survival.model_validate({"greedy": table})
