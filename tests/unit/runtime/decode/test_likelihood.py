"""Likelihoods of texts: the same however they are cut into steps, and whatever was asked before."""

from __future__ import annotations

import pytest

from fakes import FakeTarget
from ssv.runtime.decode.likelihood import Likelihoods

TEXTS = [([1, 2, 3, 4, 5], 3), ([1, 2, 3, 4, 6, 2], 3), ([1, 2, 3, 4, 6, 2], 5), ([1, 2], 1), ([7, 1, 2, 3], 2)]


def expected(target: FakeTarget, ids: list[int], first: int) -> tuple[float, bool]:
    logprob, is_greedy = 0.0, True
    for place in range(first, len(ids)):
        logits_V = target.next_logits(ids[:place]).double()
        logprob += float(logits_V.log_softmax(dim=0)[ids[place]])
        is_greedy = is_greedy and int(logits_V.argmax()) == ids[place]
    return logprob, is_greedy


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_they_are_the_targets(chunk: int) -> None:
    target = FakeTarget(max_batch=1, max_length=16)
    likelihoods = Likelihoods(target, chunk)
    for ids, first in TEXTS:
        found = likelihoods.of(ids, first)
        assert (found.logprob, found.is_greedy) == pytest.approx(expected(target, ids, first))


def test_what_is_greedy() -> None:
    target = FakeTarget(max_batch=1, max_length=16)
    ids = [1, 2]
    ids += [int(target.next_logits(ids).argmax())]
    ids += [int(target.next_logits(ids).argmax())]
    assert Likelihoods(target, 4).of(ids, 2).is_greedy
    other = (ids[-1] + 1) % target.vocab_size
    assert not Likelihoods(target, 4).of([*ids[:-1], other], 2).is_greedy


def test_what_two_texts_begin_with_is_run_once() -> None:
    target = FakeTarget(max_batch=1, max_length=16)
    likelihoods = Likelihoods(target, 64)
    likelihoods.of([1, 2, 3, 4, 5], 4)
    likelihoods.of([1, 2, 3, 4, 6], 4)
    likelihoods.of([1, 2, 3, 9, 9, 9], 4)
    # Of the second the last token before the continuation, whose logits are asked for; of the third what differs.
    assert [(call.position[0], call.tokens) for call in target.calls] == [(0, 4), (3, 1), (3, 2)]
    assert [[slot for _, slot in call.gathered] for call in target.calls] == [[3], [3], [3, 4]]
