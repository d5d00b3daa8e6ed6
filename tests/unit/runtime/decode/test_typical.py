"""Typical acceptance: the rule and the walk as worked out by hand, and what comes of them in a batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeHeads, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy, TypicalAcceptance
from ssv.runtime.decode.audit import audit
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.decode.typical import judge
from ssv.runtime.decode.verify import walk_typical
from ssv.runtime.llm import LLM
from ssv.runtime.methods import MEDUSA_TYPICAL
from ssv.runtime.request import Output, Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

RULE = TypicalAcceptance()


def tree_of(nodes: Sequence[tuple[int, int]]) -> Tree:
    """A tree of (token, parent)."""
    tree = Tree()
    for token, parent in nodes:
        tree.add(token, parent=parent)
    return tree


# --- the rule, with the authors' numbers ----------------------------------------------------------------------------


def test_where_the_target_is_sure_nine_percent_are_wanted() -> None:
    """p 0.70, 0.20, 0.07, 0.03: H = 0.863 nats, 0.3 exp(-H) = 0.127, and the smaller of that and 0.09 counts."""
    x_JV = torch.tensor([[0.70, 0.20, 0.07, 0.03]]).log().expand(5, -1)
    tree = tree_of([(token, ROOT) for token in range(4)])
    is_typical, log_prob = judge(x_JV, tree, RULE)
    assert is_typical == [True, True, False, False]
    assert log_prob == pytest.approx([math.log(p) for p in (0.70, 0.20, 0.07, 0.03)])


def test_where_the_target_is_unsure_less_is_wanted() -> None:
    """p 0.04 nineteen times, 0.07 and 0.17: H = 2.93 nats, 0.3 exp(-H) = 0.016: there 0.04 is typical."""
    x_JV = torch.tensor([[0.04] * 19 + [0.07, 0.17]]).log().expand(3, -1)
    tree = tree_of([(0, ROOT), (19, ROOT)])
    assert judge(x_JV, tree, RULE)[0] == [True, True]
    assert judge(x_JV, tree, TypicalAcceptance(posterior_alpha=1.0))[0] == [False, True]  # exp(-H) = 0.053
    assert judge(x_JV, tree, TypicalAcceptance(posterior_threshold=0.01))[0] == [True, True]


def test_a_node_is_judged_by_what_stands_behind_its_parent() -> None:
    x_JV = torch.tensor([[0.9, 0.1], [0.05, 0.95], [0.95, 0.05]]).log()
    assert judge(x_JV, tree_of([(0, ROOT), (1, 0)]), RULE)[0] == [True, True]
    assert judge(x_JV, tree_of([(0, ROOT), (0, 0)]), RULE)[0] == [True, False]


def test_what_cannot_be_chosen_is_not_typical() -> None:
    x_JV = torch.tensor([[0.0, -math.inf, 0.0]]).expand(2, -1)
    is_typical, log_prob = judge(x_JV, tree_of([(1, ROOT)]), RULE)
    assert is_typical == [False] and log_prob == [-math.inf]
    assert judge(x_JV, Tree(), RULE) == ([], [])


# --- the walk -------------------------------------------------------------------------------------------------------

#     root -- 5 (0) -- 6 (2) -- 7 (4)
#          -- 8 (1) -- 9 (3)
TREE = [(5, ROOT), (8, ROOT), (6, 0), (9, 1), (7, 2)]


def walked(typical: Sequence[int], choices: Sequence[int], log_prob: Sequence[float] = (-1.0,) * 5) -> Any:
    verdict = walk_typical(tree_of(TREE), [node in typical for node in range(5)], log_prob, choices)
    assert verdict.num_judged == len(verdict.path)
    return verdict.path, verdict.num_typical, verdict.next_token


def test_the_longest_path_is_kept_and_its_strangers_are_counted() -> None:
    # The target's own choices lead to 8, and 9 behind it; 5, 6, 7 are typical, and longer.
    assert walked([0, 2, 4], [8, 1, 9, 2, 3, 4]) == ((0, 2, 4), 3, 4)
    assert walked([0, 4], [8, 1, 9, 2, 3, 4]) == ((1, 3), 0, 3)


def test_own_choices_go_on_behind_what_is_typical() -> None:
    assert walked([0], [8, 6, 0, 7, 0, 4]) == ((0, 2, 4), 1, 4)


def test_of_paths_as_long_the_likeliest_is_kept() -> None:
    assert walked([0, 1, 2, 3], [1] * 6, (-1.0, -0.5, -1.0, -0.5, -9.0))[0] == (1, 3)
    assert walked([0, 1, 2, 3], [1] * 6, (-0.5, -1.0, -0.5, -1.0, -9.0))[0] == (0, 2)


def test_nothing_typical_leaves_the_targets_own_choice() -> None:
    assert walked([], [4, 1, 1, 1, 1, 1]) == ((), 0, 4)
    assert walked([2, 4], [4, 1, 1, 1, 1, 1]) == ((), 0, 4)  # behind what is not kept


# --- in a batch -----------------------------------------------------------------------------------------------------


def make_llm(*, seed: int = 0, max_batch: int = 1) -> LLM:
    target = FakeTarget(seed=seed, eos_bias=-1.0, max_batch=max_batch, max_length=48 + MAX_PENDING)
    return LLM(
        target,
        FakeDraft(target, seed=seed + 1000, conditioned=True),
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={"turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12)},
        max_length=48,
        prefill_chunk=4,
        heads=FakeHeads(target, seed=seed, noise=0.7),
    )


def asked(rng: random.Random, temperature: float) -> tuple[tuple[int, ...], SamplingParams]:
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 11)))
    top_k, top_p = (0, 1.0) if temperature == 0 else rng.choice([(0, 1.0), (4, 1.0), (0, 0.8)])
    return prompt, SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=rng.randrange(1000),
        max_tokens=rng.randint(4, 24),
        min_tokens=rng.choice([0, 3]),
        ignore_eos=rng.random() < 0.3,
    )


def alone(llm: LLM, prompt: tuple[int, ...], method: str, params: SamplingParams) -> Output:
    return llm.generate([Request(prompt, method, params)])[0]


def test_greedy_output_stays_exact() -> None:
    llm, rng = make_llm(), random.Random(0)
    accepted = 0
    for _ in range(12):
        prompt, params = asked(rng, 0.0)
        output = alone(llm, prompt, "medusa-typical", params)
        assert output.token_ids == alone(llm, prompt, "autoregressive", params).token_ids
        assert output.counters.typical == 0
        accepted += output.counters.accepted
    assert accepted
    assert MEDUSA_TYPICAL.lossless_for(greedy=True) and not MEDUSA_TYPICAL.lossless


def test_every_token_is_the_targets_choice_or_typical_of_it() -> None:
    """By a plain reading of the rule, over the emitted text alone."""
    others = 0
    for seed in range(4):
        llm, rng = make_llm(seed=seed), random.Random(seed)
        assert isinstance(llm.target, FakeTarget)
        for _ in range(10):
            prompt, params = asked(rng, rng.choice([0.6, 1.0, 1.5]))
            output = alone(llm, prompt, "medusa-typical", params)
            counters = output.counters
            assert counters.accepted + counters.target_passes + 1 >= counters.emitted
            plain = {}
            for place, token in enumerate(output.token_ids):
                before = (*prompt, *output.token_ids[:place])
                own = alone(llm, before, "autoregressive", at_place(params, place)).token_ids[0]
                plain[place] = own
                if own != token:
                    logits = llm.target.next_logits(before).double() / params.temperature
                    if place < params.min_tokens:
                        logits[EOS] = -math.inf
                    p = kept_by(params, logits)
                    entropy = -sum(float(each) * math.log(float(each)) for each in p if each > 0)
                    assert float(p[token]) > min(0.09, 0.3 * math.exp(-entropy))
                    others += 1
            found = audit(llm.target, prompt, output.token_ids, params) if not params.min_tokens else None
            if found is not None and counters.accepted + counters.target_passes + 1 == counters.emitted:
                # None of the kept tokens was behind the end of the output.
                assert found.strict == counters.typical
                assert found.strict == sum(plain[place] != token for place, token in enumerate(output.token_ids))
    assert others > 20


def at_place(params: SamplingParams, place: int) -> SamplingParams:
    """What gives the token at a place of the output, its text before taken as a prompt."""
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        max_tokens=1,
        min_tokens=int(place < params.min_tokens),
    )


def kept_by(params: SamplingParams, logits_V: torch.Tensor) -> torch.Tensor:
    """Probabilities of what top-k and top-p keep."""
    p_V = logits_V.softmax(dim=0)
    order = p_V.argsort(descending=True)
    if params.top_k:
        kept = order[: params.top_k]
    else:
        before = p_V[order].cumsum(dim=0) - p_V[order]
        kept = order[before < params.top_p]
    only = torch.zeros_like(p_V)
    only[kept] = p_V[kept]
    return only / only.sum()


def test_text_does_not_depend_on_company() -> None:
    rng = random.Random(5)
    requests = [
        Request(prompt, rng.choice(["medusa-typical", "medusa-typical", "turbo", "speculative", "medusa"]), params)
        for prompt, params in (asked(rng, 1.0) for _ in range(16))
    ]
    together = make_llm(max_batch=4).generate(requests)
    llm = make_llm()
    for request, output in zip(requests, together, strict=True):
        assert llm.generate([request])[0].token_ids == output.token_ids, request
    assert sum(output.counters.typical for output in together) > 0


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drafter": "model"}, "a rule for Medusa's heads, not for the drafter 'model'"),
        ({"drafter": "lookahead"}, "a rule for Medusa's heads, not for the drafter 'lookahead'"),
        ({"accept_below": 0.1}, "typical acceptance judges every token"),
        ({"pays": True}, "what pays depends on other requests"),
        ({"typical": {"posterior_threshold": 0.0}}, "greater than 0"),
        ({"typical": {"posterior_threshold": 1.0}}, "less than 1"),
        ({"typical": {"posterior_alpha": 1.5}}, "less than or equal to 1"),
        ({"typical": {"epsilon": 0.09}}, "Extra inputs are not permitted"),
    ],
    ids=repr,
)
def test_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Policy.model_validate({**MEDUSA_TYPICAL.model_dump(), **change})
    assert Policy.model_validate(MEDUSA_TYPICAL.model_dump()) == MEDUSA_TYPICAL
