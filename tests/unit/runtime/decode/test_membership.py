"""Rows that join, and whether a draft is made ready for them."""

from __future__ import annotations

import pytest
from drive import start

from fakes import EOS, FakeDraft, FakeTarget
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs
from ssv.runtime.counters import Counters
from ssv.runtime.decode.membership import ALONE
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.methods import PREMIUM, PROMPT_LOOKUP, SUFFIX
from ssv.runtime.request import SamplingParams

LENGTH = 120
COSTS = Costs.model_validate(
    {
        "target": {"tokens": [1, 64], "seconds": [1.0, 1.2]},
        "draft": {"tokens": [1, 64], "seconds": [0.02, 0.02]},
    }
)


class Reluctant(Pace):
    """Rows that join would not draft; those that are there may."""

    def __init__(self) -> None:
        super().__init__(None)

    def would_draft(self, *_: object) -> bool:
        return False


def joined(policy: Policy) -> DecodeBatch:
    """Rows of one policy, the last of which joined others that do not draft."""
    target = FakeTarget(max_batch=ALONE + 1, max_length=LENGTH + 2 * MAX_PENDING, eos_bias=-9.0)
    draft = FakeDraft(target, conditioned=True)
    batch = DecodeBatch(target, draft, [EOS], LENGTH, costs=COSTS, pace=Reluctant())
    for b in range(ALONE + 1):
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        start(batch, [1, 2, 3, 4 + b, 5, 6] * 6, Row(params, policy, lambda _: False, Counters()))
    return batch


@pytest.mark.parametrize("policy", [PROMPT_LOOKUP, SUFFIX], ids=["prompt-lookup", "suffix"])
def test_a_row_that_joins_rows_that_do_not_draft_keeps_a_drafter_that_needs_no_prompt(policy: Policy) -> None:
    batch = joined(policy)
    for _ in range(12):
        list(batch.run())
    assert all(row.counters.drafted > 0 for row in batch.rows)


def test_a_draft_that_will_hardly_be_asked_is_not_made_ready() -> None:
    batch = joined(PREMIUM)
    list(batch.run())
    *others, last = batch.rows
    assert last.has_lost_draft and not last.counters.drafted
    assert all(row.counters.drafted > 0 for row in others)
