"""What a draft guesses at each place of a text, and how often it is right."""

from __future__ import annotations

import pytest

from fakes import EOS, FakeDraft, FakeTarget
from ssv.builder.advice.positions import Node, Position, acceptance, drawn, watch
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.tree import ROOT


def batch_of(agreement: float, *, conditioned: bool = True) -> tuple[DecodeBatch, FakeDraft]:
    target = FakeTarget(max_length=400, eos_bias=-2.0)
    draft = FakeDraft(target, conditioned=conditioned, agreement=agreement)
    return DecodeBatch(target, draft, [EOS], 200), draft


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_draft_that_is_the_target_is_right_at_every_place(conditioned: bool) -> None:
    batch, draft = batch_of(1.0, conditioned=conditioned)
    texts = watch(batch, [(1, 2, 3), (4, 5)], 30)
    assert len(texts) == 2 and not batch.rows and draft.wrong_features == 0
    for text in texts:
        assert [position.rest for position in text] == list(range(28, 28 - len(text), -1))
        for position in text[:-2]:
            first = position.children(ROOT)[0]
            assert position.nodes[first].right and position.nodes[position.children(first)[0]].right
    table = acceptance(texts)
    assert len(table) > 4
    assert all(of_depth[0] == pytest.approx(1.0, abs=0.1) for of_depth in table[:2])


def test_a_draft_that_errs_is_found_out() -> None:
    batch, _ = batch_of(0.4)
    table = acceptance(watch(batch, [(n, n + 1) for n in range(1, 9)], 40))
    assert 0.2 < table[0][0] < 0.7
    assert sum(table[0]) <= 1 + 1e-9


def test_acceptance_counts_guesses_behind_what_is_right() -> None:
    nodes = [
        Node(5, ROOT, 0, 0.6, 0.4, right=False),
        Node(6, ROOT, 1, 0.3, 0.7, right=True),
        Node(7, 0, 0, 0.5, 0.5, right=False),  # nobody asks: its parent is wrong
        Node(8, 1, 0, 0.9, 0.1, right=True),
    ]
    other = [Node(5, ROOT, 0, 0.6, 0.4, right=True)]
    assert acceptance([[Position(9, nodes), Position(8, other)]]) == [[0.5, 1.0], [1.0]]


def test_places_that_are_drawn_are_as_a_calibration_saw_them() -> None:
    rows = [
        {"rows": "greedy", "rank": 0, "guesses": 100, "chosen": 0.5},
        {"rows": "greedy", "rank": 0, "guesses": 100, "chosen": 0.9},
        {"rows": "greedy", "rank": 1, "guesses": 100, "chosen": 0.15},
        {"rows": "sampled", "rank": 0, "guesses": 900, "chosen": 0.0},
    ]
    table = acceptance(drawn(rows, 3000))
    assert table[0] == pytest.approx([0.7, 0.15], abs=0.03)
    assert table[1] == pytest.approx([0.7, 0.15], abs=0.04)
    assert drawn(rows, 3)[0][0].nodes == drawn(rows, 3)[0][0].nodes  # the same at every call
