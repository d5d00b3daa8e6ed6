"""Medusa's heads as a drafter: the text of plain decoding in any company, the right hidden state, and trees as worked
out by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drive import text_of

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeHeads, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.counters import Counters
from ssv.runtime.decode.drafters.heads import HeadsDrafter
from ssv.runtime.decode.logits_processor import processor_of
from ssv.runtime.decode.row import Row
from ssv.runtime.llm import LLM
from ssv.runtime.methods import MEDUSA
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer


def heads(max_pending: int, **shape: Any) -> Policy:
    settings = {"accept_below": 0.0, "verify_above": 1.0, "risk_budget": 1.0} | shape
    return Policy(drafter="heads", max_pending=max_pending, **settings)


SHAPES = {
    "published": MEDUSA,
    "chain": heads(5),
    "cautious chain": heads(5, verify_above=0.5, risk_budget=0.7),
    "bushy": heads(16, children=(4,), beam=3, max_depth=3),
    "all": heads(MAX_PENDING, children=(VOCAB_SIZE,), beam=2),
    "pays": heads(40, children=(4,), beam=8, pays=True),
}
COSTS = Costs(target=Curve(tokens=(1, 64), seconds=(1.0, 3.0)), draft=Curve(tokens=(1, 64), seconds=(0.05, 0.3)))
LOSSY = Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12)


def make_llm(policy: Policy, *, seed: int = 0, max_batch: int = 1, draft: bool = True, **options: Any) -> LLM:
    """A tier `premium` of the heads in that shape, and a lossy `turbo` of a draft model."""
    target = FakeTarget(seed=seed, eos_bias=-1.0, max_batch=max_batch, max_length=48 + MAX_PENDING)
    return LLM(
        target,
        FakeDraft(target, seed=seed + 1000, conditioned=True) if draft else None,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={"premium": policy, "turbo": LOSSY},
        max_length=48,
        prefill_chunk=4,
        costs=COSTS,
        heads=FakeHeads(target, seed=seed, **({"noise": 0.7} | options)),
    )


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Checks the hidden state of every row that drafts, that of the token before its text's last one; counts them."""
    count, propose = [0], HeadsDrafter.propose

    def checked(self: HeadsDrafter, rows: Sequence[Row], limits: Sequence[int], *rest: Any) -> None:
        target = self._heads.target  # type: ignore[attr-defined]
        for b, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            if limit > 0:
                hash_, position = self._hidden[b].long().tolist()
                assert (hash_ % 1009, position) == (target.state(row.tokens[:-1]), len(row.tokens) - 2)
                count[0] += 1
        propose(self, rows, limits, *rest)

    monkeypatch.setattr(HeadsDrafter, "propose", checked)
    return count


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_give_the_text_of_plain_decoding(shape: str, shown: list[int]) -> None:
    """Alone, and among lossless and lossy company that comes and goes; greedy and sampled; ends of every kind."""
    rng = random.Random(shape)
    accepted = 0
    for seed in range(4):
        options: dict[str, Any] = {"seed": seed, "token_ids": [3, 0, 11, 6, 2, 9, 5] if seed == 3 else None}
        asked = [
            (
                tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 11))),
                SamplingParams(
                    temperature=rng.choice([0.0, 0.6, 1.2]),
                    top_k=rng.choice([0, 0, 4]),
                    top_p=rng.choice([1.0, 0.8]),
                    seed=rng.randrange(1000),
                    max_tokens=rng.randint(1, 24),
                    min_tokens=rng.choice([0, 0, 1]),
                    stop=rng.choice([(), (), ("b c",), ("E", "x")]),
                    ignore_eos=rng.random() < 0.3,
                ),
            )
            for _ in range(8)
        ]
        plain = make_llm(SHAPES[shape], **options).generate([Request(i, "autoregressive", p) for i, p in asked])
        methods = ["premium", "turbo", "premium", "medusa", "prompt-lookup", "premium", "speculative", "premium"]
        requests = [Request(ids, method, params) for (ids, params), method in zip(asked, methods, strict=True)]
        together = make_llm(SHAPES[shape], max_batch=3, **options).generate(requests)
        for request, output, expected in zip(requests, together, plain, strict=True):
            counters = output.counters
            if request.method != "turbo":
                assert text_of(output) == text_of(expected), request
            assert counters.drafted == counters.accepted + counters.trusted + counters.rolled_back
            if request.method in ("premium", "medusa"):
                (alone,) = make_llm(SHAPES[shape], **options).generate([request])
                assert text_of(alone) == text_of(expected), request
                accepted += counters.accepted
    assert accepted and shown[0] > 50  # not plain decoding by another name


def test_perfect_heads_are_right_to_their_last(shown: list[int]) -> None:
    llm = make_llm(heads(4), noise=0.0, draft=False)
    (output,) = llm.generate([Request((1, 2, 3), "premium", SamplingParams(max_tokens=21, ignore_eos=True))])
    assert output.counters.target_passes == 4  # one token of the prompt, then five a pass
    assert shown[0] == 4


@pytest.mark.parametrize("cached", [0, 1 << 20])
def test_prompts_from_the_cache(cached: int, shown: list[int]) -> None:
    prompts = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 5, 6, 7, 8, 3), (1, 2, 3, 4, 9)]
    found = []
    for policy in (heads(0), SHAPES["bushy"]):
        llm = make_llm(policy, max_batch=2, draft=False)
        loop = llm.loop(prompt_cache_bytes=cached)
        tokens: dict[int, tuple[int, ...]] = {}
        for index, ids in enumerate(prompts):
            loop.submit(index, Request(ids, "premium", SamplingParams(max_tokens=10, ignore_eos=True)), policy, None)
            for _ in range(3):
                for chunk in loop.step():
                    tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
        while loop.has_work:
            for chunk in loop.step():
                tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
        found.append(tokens)
    assert found[0] == found[1] and len(found[0]) == 3
    assert shown[0] > 0


def test_sampled_heads_choose_with_the_noise_of_the_request() -> None:
    """Where what follows does not depend on the text, heads that are right are right under any seed."""
    llm = make_llm(heads(4), noise=0.0, draft=False)
    assert isinstance(llm.target, FakeTarget)
    llm.target.logits_NV[:] = llm.target.logits_NV[0]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=21, ignore_eos=True)
    (output,) = llm.generate([Request((1, 2, 3), "premium", params)])
    assert output.counters.rolled_back == 0 and output.counters.target_passes == 4
    assert len(set(output.token_ids)) > 3  # not the argmax again and again


# --- trees by hand ---------------------------------------------------------------------------------------------------


class _Table:
    """Heads whose probabilities are a table."""

    num_heads = 2
    token_ids_V = None

    def __init__(self, probabilities_DV: list[list[float]]) -> None:
        self.logits_DV = torch.tensor(probabilities_DV).log()

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        return self.logits_DV.expand(len(hidden_RH), -1, -1)


TABLE = [[0.05, 0.55, 0.35, 0.05], [0.5, 0.1, 0.05, 0.35]]


def tree_of(policy: Policy, **params: Any) -> list[tuple[tuple[int, ...], float]]:
    """Paths of the nodes that the table's heads propose, as tokens, and each node's risk."""
    drafter = HeadsDrafter(_Table(TABLE), torch.tensor([EOS]))
    row = Row(SamplingParams(**{"max_tokens": 20} | params), policy, lambda ids: False, Counters(), [7, 8])
    row.processor = processor_of(row.params, row.tokens, [EOS])
    drafter.see(0, torch.zeros(1))
    drafter.propose([row], [policy.max_pending])
    tree = row.tree
    return [(tuple(tree.tokens[n] for n in tree.path(node)), tree.risks[node]) for node in range(len(tree))]


def test_all_nodes_of_a_depth_get_the_same_children() -> None:
    found = tree_of(heads(6, children=(2,), beam=2), ignore_eos=True)
    # Products: 0.55, 0.35, and below them 0.5 and 0.35 of each; a parent stands before its children.
    assert [path for path, _ in found] == [(1,), (2,), (1, 0), (1, 3), (2, 0), (2, 3)]
    assert [risk for _, risk in found] == pytest.approx([0.45, 0.65, 0.5, 0.65, 0.5, 0.65])


def test_the_likeliest_nodes_are_kept() -> None:
    assert [path for path, _ in tree_of(heads(3, children=(2,), beam=2), ignore_eos=True)] == [(1,), (2,), (1, 0)]


def test_an_end_gets_no_children_and_an_early_one_is_no_guess() -> None:
    policy = heads(4, children=(4,), beam=4)
    ends = [path for path, _ in tree_of(heads(20, children=(4,), beam=4))]
    assert (0,) in ends and not any(path[0] == EOS and len(path) > 1 for path in ends)
    early = [path for path, _ in tree_of(policy, min_tokens=5)]
    assert early and not any(EOS in path for path in early)


def test_no_deeper_than_the_output_may_go() -> None:
    assert [path for path, _ in tree_of(heads(6, children=(2,), beam=2), max_tokens=2)] == [(1,), (2,)]


def test_a_chain_ends_where_its_policy_asks_for_a_pass() -> None:
    assert [path for path, _ in tree_of(heads(2, verify_above=0.3), ignore_eos=True)] == [(1,)]
    assert [path for path, _ in tree_of(heads(2), ignore_eos=True)] == [(1,), (1, 0)]


def test_a_bundle_without_heads_says_what_to_do() -> None:
    llm = make_llm(heads(4))
    llm.heads = None
    with pytest.raises(RequestError, match=r"needs Medusa's heads, .*ssv-build distill --kind medusa"):
        llm.generate([Request((1, 2), "medusa", SamplingParams(max_tokens=4))])


def test_a_hidden_state_of_another_row_is_noticed(monkeypatch: pytest.MonkeyPatch, shown: list[int]) -> None:
    monkeypatch.setattr(HeadsDrafter, "move", lambda self, source, dest, row: None)
    llm = make_llm(SHAPES["bushy"], max_batch=2, draft=False)
    requests = [
        Request((1, 2, 3 + i), "premium", SamplingParams(max_tokens=2 + 6 * (i % 2), ignore_eos=True)) for i in range(6)
    ]
    with pytest.raises((AssertionError, KeyError)):
        llm.generate(requests)
