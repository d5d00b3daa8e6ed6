"""How each token came about: what is told agrees with the target, with the counters, and with what was drafted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args
from unittest.mock import Mock

import pytest
from changed_logits import LOSSLESS, asked, make_llm
from drive import run

from fakes import FakeTarget
from ssv.runtime.counters import Counters
from ssv.runtime.decode.ahead import Ahead
from ssv.runtime.decode.fates import fates_of
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.engines.contract import RoundResult, RoundsEngine
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_for
from ssv.runtime.request import Fate, Output, Request, SamplingParams, TokenFate

OWN = ("corrected", "target")
"""What the target itself chose."""


def tree_of(*nodes: tuple[int, int, float]) -> Tree:
    """A tree of (token, parent, risk)."""
    tree = Tree()
    for token, parent, risk in nodes:
        tree.add(token, risk, parent)
    return tree


TREE = tree_of((5, ROOT, 0.1), (6, ROOT, 0.9), (7, 0, 0.2), (8, 0, 0.7), (9, 2, 0.3), (4, 1, 0.4), (3, 1, 0.5))
"""Text | 5 (7 (9), 8) | 6 (4, 3)."""


def test_a_tree_by_hand() -> None:
    """The walk keeps 5 and 7, and the target says 1 in place of 9."""
    choices = [5, None, 7, 1, None, None, None, None]
    choices[1] = 7  # node 0 gives the token after 5
    assert fates_of(TREE, [0, 2], choices, 3, 1) == [
        TokenFate(5, "accepted", 3, 0.1, ((6, 4), (6, 3))),
        TokenFate(7, "accepted", 3, 0.2, ((8,),)),
        TokenFate(1, "corrected", 3, None, ((9,),)),
    ]


def test_what_is_kept_to_the_end_of_its_branch_has_a_bonus() -> None:
    choices = [6, 0, 4, 0, 0, 0, 2, 0]
    fates = fates_of(TREE, [1, 5], choices, 1, 2)
    assert [(fate.token, fate.fate, fate.dropped) for fate in fates] == [
        (6, "accepted", ((5, 8), (5, 7, 9))),
        (4, "accepted", ((3,),)),
        (2, "target", ()),
    ]


def test_nothing_drafted() -> None:
    assert fates_of(Tree(), [], [4], 2, 4) == [TokenFate(4, "target", 2)]


def test_all_wrong() -> None:
    (fate,) = fates_of(TREE, [], [1] * 8, 2, 1)
    assert (fate.fate, fate.dropped) == ("corrected", ((5, 8), (5, 7, 9), (6, 4), (6, 3)))


def test_tokens_that_leave_before_the_pass_are_told_once() -> None:
    nobody: list[int | None] = [None] * 8
    (before,) = fates_of(TREE, [0], nobody, 1)
    assert before == TokenFate(5, "trusted", 1, 0.1, ((6, 4), (6, 3)))
    after = fates_of(TREE, [0, 2], [None, 7, *nobody[2:]], 1, 1, told=1)
    assert [(fate.token, fate.fate) for fate in after] == [(7, "accepted"), (1, "corrected")]


def test_what_is_not_the_targets_choice_and_judged_is_typical() -> None:
    assert [fate.fate for fate in fates_of(TREE, [0, 3], [6, 8, 0, 0, 0, 0, 0, 0], 1, 0)][:2] == ["typical", "accepted"]


def check(llm: LLM, request: Request, output: Output) -> None:
    """What is told agrees with the output, the counters and itself."""
    fates, counters = output.fates, output.counters
    assert [fate.token for fate in fates] == list(output.token_ids)
    assert (fates[0].fate, fates[0].target_pass, fates[0].dropped) == ("target", 0, ())
    by_pass: dict[int, list[TokenFate]] = {}
    for fate in fates:
        by_pass.setdefault(fate.target_pass, []).append(fate)
        assert fate.fate in get_args(Fate)
        assert (fate.fate in OWN) == (fate.risk is None)
        assert (fate.fate == "corrected") == bool(fate.dropped) or fate.fate not in OWN
        assert fate.token not in {branch[0] for branch in fate.dropped}
    assert list(by_pass) == list(range(len(by_pass)))
    *whole, last = by_pass.values()
    assert all([fate.fate in OWN for fate in told] == [False] * (len(told) - 1) + [True] for told in whole)
    if last[-1].fate not in OWN or len(by_pass) - 1 < counters.target_passes:
        return  # the output ended within a pass, of which the counters have the rest too
    counted = Counter(fate.fate for fate in fates)
    assert (counted["trusted"], counted["accepted"] + counted["typical"]) == (counters.trusted, counters.accepted)
    assert counted["typical"] == counters.typical
    dropped = sum(len({branch[:n] for branch in fate.dropped for n in range(1, len(branch) + 1)}) for fate in fates)
    assert dropped == counters.rolled_back


@pytest.mark.parametrize("seed", range(4))
def test_every_token_has_one(seed: int) -> None:
    """Of lossless and lossy methods in one batch, greedy and sampled, among requests that ask for none."""
    rng, llm = random.Random(seed), make_llm(seed=seed)
    methods = [*LOSSLESS, "turbo", "turbo", "autoregressive", "medusa-typical"]
    requests = [
        Request(ids, rng.choice(methods), replace(params, fates=True, logprobs=rng.choice([None, None, 1])))
        for ids, params in asked(rng, 30)
    ]
    others = [replace(each, params=replace(each.params, fates=False)) for each in requests]
    outputs = run(llm, [each for pair in zip(requests, others, strict=True) for each in pair])
    for request, output, other in zip(requests, outputs[::2], outputs[1::2], strict=True):
        check(llm, request, output)
        assert (output.token_ids, output.text, output.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        )
        assert not other.fates
    told = Counter(fate.fate for output in outputs for fate in output.fates)
    assert {"accepted", "corrected", "target"} <= told.keys()


def chosen_by_target(llm: LLM, text: Sequence[int]) -> int:
    assert isinstance(llm.target, FakeTarget)
    return int(llm.target.next_logits(text).argmax())


def test_what_is_said_of_the_targets_choice_is_so() -> None:
    llm = make_llm(heads=False, agreement=0.8)
    params = SamplingParams(max_tokens=40, ignore_eos=True, fates=True)
    prompts = [(1, seed) for seed in range(8)]
    outputs = run(llm, [Request(prompt, "turbo", params) for prompt in prompts])
    kinds = Counter(fate.fate for output in outputs for fate in output.fates)
    assert min(kinds[fate] for fate in ("trusted", "accepted", "corrected")) > 10
    for prompt, output in zip(prompts, outputs, strict=True):
        text = list(prompt)
        for fate in output.fates:
            choice = chosen_by_target(llm, text)
            assert fate.fate == "trusted" or fate.token == choice
            if fate.fate == "corrected":
                assert choice not in {branch[0] for branch in fate.dropped}
            text.append(fate.token)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_they_come_with_their_tokens(logprobs: int | None) -> None:
    """In each chunk, also where trusted tokens leave before the pass."""
    llm = make_llm(heads=False, agreement=0.9)
    params = SamplingParams(max_tokens=40, ignore_eos=True, fates=True, logprobs=logprobs)
    chunks = list(llm.stream([Request((1, seed), "turbo", params) for seed in range(4)]))
    assert all([fate.token for fate in chunk.fates] == list(chunk.token_ids) for chunk in chunks)
    early = [chunk for chunk in chunks if chunk.fates and all(fate.fate == "trusted" for fate in chunk.fates)]
    assert bool(early) == (logprobs is None)


def test_typical_tokens_are_told_apart() -> None:
    llm = make_llm(seed=1)
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, fates=True)
    requests = [Request((1, seed), "medusa-typical", replace(params, seed=seed)) for seed in range(8)]
    outputs = run(llm, requests)
    for request, output in zip(requests, outputs, strict=True):
        check(llm, request, output)
    assert sum(fate.fate == "typical" for output in outputs for fate in output.fates) > 0


@pytest.mark.parametrize("fates", [False, True])
def test_who_asks_for_them_keeps_the_engines_from_rounds_by_themselves(fates: bool) -> None:
    """The host would not see what is drafted."""
    engine = Mock(RoundsEngine, most_tokens=8, in_flight=1)
    engine.take.return_value = [RoundResult([5], 0, 1, 0, None)]
    row = Row(SamplingParams(fates=fates), policy_for("autoregressive", {}), lambda _: False, Counters(), [1])
    gained = Ahead(engine, None, frozenset()).step([row])
    assert engine.begin.called == (not fates)
    assert gained == (None if fates else [[5]])
