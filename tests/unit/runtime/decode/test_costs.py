"""What pays, on costs made by hand."""

from __future__ import annotations

from fakes import FakeDraft, FakeTarget
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode.costs import DRAFT_SIZES, FIRST_GUESS, PASS_SIZES, Prices, measure, place


def prices(further: float, draft: float, num_rows: int = 1) -> Prices:
    """A pass of one token costs 1, each further one `further`, a draft step `draft` and a tenth of that for each further node."""
    target = Curve(tokens=(1, 101), seconds=(1.0, 1.0 + 100 * further))
    return Prices(Costs(target=target, draft=Curve(tokens=(1, 11), seconds=(draft, 2 * draft))), num_rows)


def test_nodes_are_verified_while_they_raise_the_rate() -> None:
    # Rates: 1; 1.9 / 1.1 = 1.727; 2.4 / 1.2 = 2; 2.6 / 1.3 = 2; 2.7 / 1.4 = 1.93
    assert prices(0.1, 0.1).worth_verifying([0.9, 0.5, 0.19, 0.1]) == 2
    assert prices(0.1, 0.1).worth_verifying([0.9, 0.5, 0.21, 0.1]) == 3
    assert prices(0.0, 0.1).worth_verifying([0.9, 0.01]) == 2
    assert prices(0.5, 0.1).worth_verifying([0.4, 0.3]) == 0
    assert prices(0.5, 0.1).worth_verifying([]) == 0


def test_a_step_of_the_draft_must_bring_more_than_its_cost() -> None:
    assert prices(0.1, 0.1).worth_opening((), (1.0,)) == 1
    # A first guess brings FIRST_GUESS tokens at 1 token a second.
    assert prices(0.1, FIRST_GUESS - 0.11).worth_opening((), (1.0,)) == 1
    assert prices(0.1, FIRST_GUESS - 0.09).worth_opening((), (1.0,)) == 0
    # So far 1.9 tokens in 1.2 seconds: a rate of 1.583. Of the nodes only such pay whose children bring 1.583 (0.1 + 0.01).
    assert prices(0.1, 0.1).worth_opening([0.9], [0.9, 0.26, 0.24], spent=0.1) == 2
    assert prices(0.1, 0.1).worth_opening([0.9], [0.2], spent=0.1) == 0


def test_rows_share_a_pass() -> None:
    """With eight rows a further token costs as much as before and the pass has been shared: it has to bring more."""
    assert prices(0.1, 0.1, 1).worth_verifying([0.5, 0.2]) == 2
    assert prices(0.1, 0.1, 8).worth_verifying([0.5, 0.2]) == 1
    assert prices(0.3, 0.1, 8).worth_verifying([0.5, 0.2]) == 0


def test_costs_are_measured_at_all_sizes() -> None:
    target = FakeTarget(max_length=200, tap=True)
    draft = FakeDraft(target, conditioned=True)
    costs = measure(target, draft, repeats=2)
    assert (costs.target.tokens, costs.draft.tokens) == (PASS_SIZES, DRAFT_SIZES)
    assert sorted({call.tokens for call in target.calls[1:]}) == list(PASS_SIZES)
    assert len(draft.calls) == 1 + 2 * len(DRAFT_SIZES)


def test_a_place_names_what_costs_depend_on() -> None:
    places = {place("torch", "int8", "cpu", 2), place("torch", "int8", "cpu", 1), place("torch", "fp32", "cpu", 2)}
    assert len(places) == 3
    assert all(name.startswith("torch ") and " on " in name for name in places)
