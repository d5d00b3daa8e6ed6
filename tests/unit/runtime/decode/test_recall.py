"""What was found in the text enters the draft's tree: as worked out by hand, without a change of text, and with more
tokens a pass where a text repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from drive import run, text_of
from hypothesis import given
from hypothesis import strategies as st

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeTarget, FakeTokenizer, RepeatingTarget
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.growth import Candidate, Growth, Guess
from ssv.runtime.decode.tree import ROOT
from ssv.runtime.llm import LLM
from ssv.runtime.methods import PREMIUM
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer


class WithoutRecall(Policy):
    """The same policy, by the draft alone."""

    @property
    def recalls(self) -> bool:
        return False


WITHOUT = WithoutRecall.model_validate(PREMIUM.model_dump())


def costs(further: float, draft: float) -> Costs:
    """A pass of one token costs 1, each further one `further`, a draft step `draft` and a tenth of that for each
    further node."""
    passes = Curve(tokens=(1, 101), seconds=(1.0, 1.0 + 100 * further))
    return Costs(target=passes, draft=Curve(tokens=(1, 11), seconds=(draft, 2 * draft)))


# --- trees by hand --------------------------------------------------------------------------------------------------


def guess(token: int, share: float) -> Guess:
    return Guess(token, share, 1 - share)


def growth_of(shares: Sequence[float], further: float = 0.01, draft: float = 0.05, limit: int = 32) -> Growth:
    """That of a row in whose text the chain 1, 2, 3, ... was found."""
    found, survival = [], 1.0
    for i, share in enumerate(shares):
        survival *= share
        found.append(Candidate(guess(i + 1, share), i - 1, i + 1, survival))
    return Growth(PREMIUM, limit, 40, [EOS], Prices(costs(further, draft), 1), found)


def paths_of(growth: Growth) -> list[tuple[int, ...]]:
    tree = growth.tree()
    return [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]


def test_what_was_found_needs_no_step() -> None:
    growth = growth_of([0.9, 0.8, 0.7])
    assert paths_of(growth) == [(1,), (1, 2), (1, 2, 3)]
    assert growth.tree().risks == pytest.approx([0.1, 0.2, 0.3])
    assert paths_of(growth_of([0.9, 0.8, 0.001])) == [(1,), (1, 2)]  # only what pays
    assert paths_of(growth_of([0.9] * 9, limit=4)) == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]


def test_where_both_say_the_same_there_is_one_node_and_the_larger_share_stands() -> None:
    growth = growth_of([0.6, 0.5])
    growth.add([[guess(1, 0.8), guess(7, 0.02)]])
    assert [each.guess.token for each in growth.candidates] == [1, 2, 7]
    assert [each.survival for each in growth.candidates] == pytest.approx([0.8, 0.4, 0.02])
    assert growth.open == [0]  # behind the token that both say
    growth.add([[guess(8, 0.7), guess(2, 0.25)]])
    # 2 is not the draft's first: 0.5 * 0.3 / (1 - 0.5 * 0.7) = 0.2308, and the draft gives it more.
    assert [each.guess.token for each in growth.candidates] == [1, 2, 7, 8]
    assert [each.survival for each in growth.candidates] == pytest.approx([0.8, 0.2, 0.02, 0.56])
    assert {(1,), (1, 8)} <= set(paths_of(growth))


def test_what_the_draft_contradicts_is_worth_less() -> None:
    growth = growth_of([0.6, 0.5])
    growth.add([[guess(7, 0.5), guess(8, 0.2)]])
    # 0.6 * 0.5 / (1 - 0.6 * 0.5) = 0.4286, and half of that behind it.
    assert [each.survival for each in growth.candidates] == pytest.approx([3 / 7, 3 / 14, 0.5, 0.2])
    certain = growth_of([0.9, 0.9], further=0.05)
    certain.add([[guess(7, 0.99), guess(8, 0.001)]])
    assert (1,) not in paths_of(certain)


def test_the_draft_is_asked_for_what_is_left_over() -> None:
    """Behind 1 the text is nearly sure, behind 7 it says nothing."""
    growth = growth_of([0.5, 0.99])
    assert growth.left_over(ROOT) == pytest.approx(0.5)
    growth.add([[guess(7, 0.45), guess(1, 0.45)]])
    first = growth.candidates[0].guess.share
    assert first == pytest.approx(0.45)
    assert growth.left_over(0) == pytest.approx(0.01 * first)
    assert [growth.candidates[i].guess.token for i in growth.open] == [7]


def test_no_draft_is_begun_where_the_text_is_sure() -> None:
    prices = Prices(costs(0.01, 0.1), 1)
    for sure, begins in ((0.98, False), (0.3, True)):
        growth = growth_of([sure] * 4)
        assert prices.worth_beginning([1], [growth.kept_survival()], [growth.left_over(ROOT)]) is begins


def test_only_lossless_trees_of_a_draft_model_that_pay_recall() -> None:
    assert PREMIUM.recalls
    for change in (
        {"pays": False}, {"accept_below": 0.1}, {"drafter": "suffix"}, {"drafter": "heads"}, {"children": (1,)},
    ):  # fmt: skip
        assert not PREMIUM.model_copy(update=change).recalls


# --- in a batch -----------------------------------------------------------------------------------------------------


def make_llm(
    target_kind: type[FakeTarget], kind: str, price: Costs, *, seed: int = 0, max_batch: int = 1, max_length: int = 64
) -> LLM:
    """A tier `premium`, the same without recall, and a lossy `turbo`, with the room that is promised to be enough."""
    target = target_kind(
        seed=seed,
        tap=kind == "conditioned",
        eos_bias=-1.0,
        max_batch=max_batch,
        max_length=max_length + 2 * MAX_PENDING,
    )
    return LLM(
        target,
        FakeDraft(target, seed=seed + 1000, conditioned=kind == "conditioned", agreement=0.6, noise=0.5),
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={
            "premium": PREMIUM,
            "turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12),
        },
        max_length=max_length,
        prefill_chunk=4,
        costs=price,
    )


@given(
    seed=st.integers(0, 10_000),
    target=st.sampled_from([FakeTarget, RepeatingTarget]),
    kind=st.sampled_from(["standalone", "conditioned"]),
    further=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    draft=st.sampled_from([0.01, 0.1, 0.5, 20.0]),
    max_batch=st.integers(1, 4),
)
def test_texts_are_those_of_plain_decoding(
    seed: int, target: type[FakeTarget], kind: str, further: float, draft: float, max_batch: int
) -> None:
    """Whatever steps cost, greedy and sampled, among rows that come and go, with ends of every kind."""
    rng = random.Random(seed)
    requests = []
    for method in ("premium", "turbo", "premium", "suffix", "premium", "speculative", "premium"):
        piece = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 5))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.7, 1.2]),
            top_k=rng.choice([0, 0, 4]),
            seed=rng.randrange(1000),
            max_tokens=rng.randint(1, 40),
            min_tokens=rng.choice([0, 0, 1]),
            stop=rng.choice([(), (), ("b c",), ("E", "x")]),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append(Request(tuple(piece * rng.randint(1, 4)), method, params))
    plain = make_llm(target, kind, costs(further, draft), seed=seed)
    together = run(make_llm(target, kind, costs(further, draft), seed=seed, max_batch=max_batch), requests)
    for request, output in zip(requests, together, strict=True):
        counters = output.counters
        assert counters.drafted == counters.accepted + counters.trusted + counters.rolled_back
        if request.method != "turbo":
            expected = plain.generate([Request(request.prompt_ids, "autoregressive", request.params)])[0]
            assert text_of(output) == text_of(expected), request


def test_a_text_that_repeats_gets_more_tokens_a_pass() -> None:
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    found = {}
    for policy in (PREMIUM, WITHOUT):
        llm = make_llm(RepeatingTarget, "conditioned", costs(0.02, 0.1))
        (output,) = run(llm, [Request((1, 2, 3), "premium", params, policy=policy)])
        found[policy] = output
    assert text_of(found[PREMIUM]) == text_of(found[WITHOUT])
    assert found[PREMIUM].counters.tokens_per_pass > 2 * found[WITHOUT].counters.tokens_per_pass


@pytest.mark.parametrize("kind", ["standalone", "conditioned"])
def test_where_no_draft_pays_the_text_drafts_alone(kind: str) -> None:
    """What the draft has not seen meanwhile is made up for: its entries are checked when it drafts for another."""
    llm = make_llm(RepeatingTarget, kind, costs(0.02, 20.0), max_length=300)
    assert isinstance(llm.draft, FakeDraft)
    params = SamplingParams(max_tokens=280, ignore_eos=True)
    (output,) = run(llm, [Request((1, 2, 3), "premium", params)])
    assert output.counters.tokens_per_pass > 4
    assert not any(call.gathered for call in llm.draft.calls)  # it only took in what it would need
    assert max(call.tokens for call in llm.draft.calls) <= 2 * MAX_PENDING + 1
    (expected,) = llm.generate([Request((1, 2, 3), "autoregressive", params)])
    assert text_of(output) == text_of(expected)


def test_a_draft_takes_over_where_the_text_ends_to_repeat() -> None:
    """A draft that is always right, of a text that never repeats, is asked as ever."""
    llm = make_llm(FakeTarget, "conditioned", costs(0.02, 0.1))
    assert isinstance(llm.draft, FakeDraft)
    llm.draft.agrees_N[:] = True
    llm.draft.same_NV = llm.draft.target.logits_NV * 4
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = [run(llm, [Request((1, 2, 3), "premium", params, policy=p)])[0] for p in (PREMIUM, WITHOUT)]
    assert text_of(found[0]) == text_of(found[1])
    assert found[0].counters.tokens_per_pass > 0.8 * found[1].counters.tokens_per_pass > 2


def test_a_row_brings_no_text_where_it_recalls_nothing() -> None:
    """Rows move; those that keep no text are not asked for one."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 12, 20, 7)]
    llm = make_llm(RepeatingTarget, "conditioned", costs(0.02, 0.1), max_batch=4)
    policies = [verify_all(3), PREMIUM, verify_all(4), PREMIUM]
    outputs = run(llm, [Request((1, 2), "own", p, policy=q) for p, q in zip(params, policies, strict=True)])
    assert [len(output.token_ids) for output in outputs] == [3, 12, 20, 7]


def test_a_row_that_moves_takes_its_text_along() -> None:
    """Its company ends early, and a later row takes the place that it had."""
    llm = make_llm(RepeatingTarget, "conditioned", costs(0.001, 20.0), max_batch=2)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (24, 60, 40)]
    prompts = [(5, 6, 4, 9) * 10, (1, 2, 3), (7, 8, 2)]
    together = run(llm, [Request(ids, "premium", p) for ids, p in zip(prompts, params, strict=True)])
    for ids, p, output in zip(prompts, params, together, strict=True):
        (alone,) = run(llm, [Request(ids, "premium", p)])
        assert text_of(output) == text_of(alone)
        assert output.counters.target_passes <= alone.counters.target_passes + 1
    assert together[1].counters.tokens_per_pass > 3
