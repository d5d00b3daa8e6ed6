"""Rounds that the CUDA engines run by themselves give what the host's own rounds give: the same text, and of chains the
same drafted, accepted and trusted tokens. Needs any NVIDIA GPU of compute capability 8.0.

make test-gpu
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny import random_draft, tiny_decoder

from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.model.scorer import Scorer
from ssv.runtime.counters import Counters
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.engines.contract import NOT_CORRECTED, EngineError, RoundRow, RoundShape, TreeShape
from ssv.runtime.engines.cuda.lane import CudaLane
from ssv.runtime.engines.cuda.make import cuda_engines
from ssv.runtime.engines.cuda.rounds import CudaRounds
from ssv.runtime.methods import AUTOREGRESSIVE
from ssv.runtime.request import Request, SamplingParams

ROWS, LENGTH = 4, 400
NONE = (NOT_CORRECTED, NOT_CORRECTED)

CHAINS = {
    "plain": AUTOREGRESSIVE,
    "chain of 5": verify_all(5),
    "chain of 12": verify_all(12),
    "lossy": Policy(accept_below=0.45, verify_above=0.6, risk_budget=0.8, max_pending=6),
    "hasty": Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.7, max_pending=8),
}
TREES = {
    "bushy": verify_all(12, children=(4,), beam=3, max_depth=3),
    "wide": verify_all(15, children=(9,), beam=7, max_depth=4),
    "deep": verify_all(15, children=(2,), beam=2, max_depth=9),
}
TRUSTING = {
    name: policy.model_copy(update={"accept_below": threshold})
    for name, policy, threshold in (("bushy", TREES["bushy"], 0.45), ("deep", TREES["deep"], 0.5))
}


class Counted(CudaRounds):
    """Counts its rounds."""

    num = 0

    def run(self, shape: RoundShape) -> None:
        super().run(shape)
        self.num += 1


def engines() -> tuple[Any, Any]:
    decoder = tiny_decoder(max_positions=1024)
    draft = random_draft(decoder, "conditioned", None)
    torch.manual_seed(3)
    scorer = Scorer(torch.randn(decoder.spec.hidden_size + 3) / 4, torch.tensor(0.1), True)
    return cuda_engines(decoder, draft, scorer, max_batch=ROWS, max_length=LENGTH + 2 * MAX_PENDING, device="cuda")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return engines()


lane_of = cache(CudaLane)


def decoded(
    pair: tuple[Any, Any], requests: Sequence[Request], policies: Sequence[Policy], rounds: CudaRounds | None
) -> tuple[list[tuple[int, ...]], list[Counters]]:
    """The outputs' tokens, and what was counted; prompts run beside rounds of the engines."""
    lane = lane_of(*pair) if rounds is not None else None
    batch = DecodeBatch(*pair, [1], LENGTH, prefill_chunk=64, rounds=rounds, lane=lane)
    loop = DecodeLoop(batch, frozenset([1]))
    for index, (request, policy) in enumerate(zip(requests, policies, strict=True)):
        loop.submit(index, request, policy, None)
    tokens: dict[int, tuple[int, ...]] = {}
    counters: dict[int, Counters] = {}
    while loop.has_work:
        for chunk in loop.step():
            tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
            counters[chunk.index] = chunk.counters
    return [tokens[i] for i in range(len(requests))], [counters[i] for i in range(len(requests))]


def requests(count: int, **params: Any) -> list[Request]:
    """Prompts and outputs of many lengths, some across a block of keys."""
    return [
        Request(
            tuple(5 + (7 * b + 3 * i) % 40 for i in range(3 + 61 * b % 200)),
            "premium",
            SamplingParams(max_tokens=20 + 17 * b % 60, ignore_eos=b % 3 != 2, **params),
        )
        for b in range(count)
    ]


def facts(counters: Counters) -> list[Any]:
    c = counters
    return [c.drafted, c.accepted, c.trusted, c.judged, c.rolled_back, c.target_passes, dict(c.passes_by_kept)]


def decoded_as_by_the_host(
    pair: tuple[Any, Any], policies: Sequence[Policy]
) -> tuple[list[tuple[int, ...]], list[Counters]]:
    """Tokens and counters, once rounds of the engines have given what the host's give."""
    many, rounds = requests(len(policies)), Counted(*pair)
    expected, counted = decoded(pair, many, policies, None)
    found, counted_here = decoded(pair, many, policies, rounds)
    assert found == expected
    assert [facts(c) for c in counted_here] == [facts(c) for c in counted]
    assert rounds.num > 5
    return found, counted


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_the_hosts(pair: tuple[Any, Any], name: str, count: int) -> None:
    _, counted = decoded_as_by_the_host(pair, [CHAINS[name]] * count)
    if name == "lossy":
        assert sum(c.trusted for c in counted) > 0


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("name", TREES)
def test_trees_give_plain_text(pair: tuple[Any, Any], name: str, count: int) -> None:
    expected, _ = decoded(pair, requests(count), [AUTOREGRESSIVE] * count, None)
    rounds = Counted(*pair)
    found, counted = decoded(pair, requests(count), [TREES[name]] * count, rounds)
    assert found == expected
    assert rounds.num > 5 and (count == 1 or sum(c.accepted for c in counted) > 0)
    _, by_host = decoded(pair, requests(count), [TREES[name]] * count, None)
    # Ties aside, the same nodes are kept.
    accepted, of_host = (sum(c.accepted for c in each) for each in (counted, by_host))
    assert abs(accepted - of_host) <= 0.05 * of_host + 2


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("name", TRUSTING)
def test_trees_trust_what_the_hosts_trust(pair: tuple[Any, Any], name: str, count: int) -> None:
    found, counted = decoded_as_by_the_host(pair, [TRUSTING[name]] * count)
    assert sum(c.trusted for c in counted) > 0
    assert found != decoded(pair, requests(count), [AUTOREGRESSIVE] * count, None)[0]


SAMPLED = ({"temperature": 0.8}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.2, "top_k": 9, "top_p": 0.8})


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("name", ["plain", "chain of 5", *TREES])
def test_sampled_rows_give_plain_text(pair: tuple[Any, Any], name: str, count: int) -> None:
    """Beside greedy ones, each with its own seed and settings; and the host's rounds draw the same."""
    many = [
        replace(each, params=replace(each.params, seed=2**63 + 7 * b, **SAMPLED[b % 3])) if b % 4 != 3 else each
        for b, each in enumerate(requests(count))
    ]
    expected, _ = decoded(pair, many, [AUTOREGRESSIVE] * count, None)
    rounds = Counted(*pair)
    found, counted = decoded(pair, many, [{**CHAINS, **TREES}[name]] * count, rounds)
    assert found == expected
    assert expected != decoded(pair, requests(count), [AUTOREGRESSIVE] * count, None)[0]
    assert rounds.num > 5
    if name != "plain":
        _, by_host = decoded(pair, many, [{**CHAINS, **TREES}[name]] * count, None)
        accepted, of_host = (sum(c.accepted for c in each) for each in (counted, by_host))
        assert of_host == 0 or accepted >= 0.9 * of_host - 2


def test_rows_that_come_and_go_and_change_hands(pair: tuple[Any, Any]) -> None:
    """Sampled rows and other policies between them: the host's rounds and the engines' own take turns."""
    many = requests(12)
    many[4] = Request(many[4].prompt_ids, "premium", SamplingParams(max_tokens=30, temperature=0.8, seed=5))
    policies = [CHAINS["chain of 5"], TREES["bushy"], AUTOREGRESSIVE] * 4
    expected, _ = decoded(pair, many, [AUTOREGRESSIVE] * 12, None)
    rounds = Counted(*pair)
    assert decoded(pair, many, policies, rounds)[0] == expected
    assert decoded(pair, many, [CHAINS["chain of 5"]] * 12, rounds)[0] == expected


def test_what_there_is_no_room_for_is_refused(pair: tuple[Any, Any]) -> None:
    rounds = CudaRounds(*pair)
    rounds.begin([RoundRow(3, 5, 100, limit=70, draft_length=2, pending=[5])] * 2, torch.zeros(2, 1, 64), NONE)
    with pytest.raises(EngineError, match="room for 64"):
        rounds.run(RoundShape(TreeShape(5, 4, 4), 40))
    with pytest.raises(EngineError, match="no room for their levels"):
        rounds.run(RoundShape(TreeShape(16, 16, 16), 20))
