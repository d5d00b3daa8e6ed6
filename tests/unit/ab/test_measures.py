"""Figures against ones computed by hand, verdicts, and runs of two arms that are simulated."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from ab_cases import ARMS, sample, settings

from ssv.ab import measures
from ssv.ab.analysis import RunSettings, analyse, cost_in_words, verdict
from ssv.ab.arms import Price, parse_arm
from ssv.ab.limits import parse_limits
from ssv.ab.measures import (
    MIN_BLOCKS,
    Difference,
    Kind,
    QualityFinding,
    by_arm,
    differences,
    examples,
    figures,
    identical_share,
    quality,
)
from ssv.ab.plan import Turn, make_plan
from ssv.ab.samples import Sample
from ssv.ab.statistics import Interval, Quality, judge

# Figures.

TURNS = [
    sample(block=0, repeat=0, prompt="p", start=0, end=4, output_tokens=8),
    sample(block=0, repeat=0, prompt="q", start=1, end=3, output_tokens=4),
    # Nobody is asked from 4 to 10: it is the other arm's turn.
    sample(block=0, repeat=1, prompt="p", start=10, end=12, output_tokens=6),
    sample(block=0, repeat=1, prompt="q", start=11, end=15, output_tokens=18),
]


def test_tokens_per_second_are_of_the_time_in_which_the_arm_was_busy() -> None:
    row = figures(TURNS, price=None, slo=())
    assert (row.requests, row.failed, row.output_tokens) == (4, 0, 36)
    assert row.seconds == 4 + 5
    assert row.tokens_per_s == 36 / 9
    assert row.in_flight == pytest.approx((4 + 2 + 2 + 4) / 9)
    assert row.cost_per_1m_tokens is row.cost_per_correct is row.good_share is row.goodput is row.score is None
    assert row.meets == {}


def test_cost_of_1m_tokens_is_gpus_times_price_over_tokens_per_hour_and_utilisation() -> None:
    arm = parse_arm("a=grpc://h:1")
    row = figures(TURNS, price=arm.price(per_hour=3.0, gpus=2.0, utilisation=0.5), slo=())
    assert row.cost_per_1m_tokens == pytest.approx(2 * 3.0 / (4.0 * 3600) * 1e6 / 0.5)


def test_an_api_costs_what_its_tokens_do_however_long_they_take() -> None:
    row = figures(TURNS, price=Price(per_token=0.6e-6), slo=())
    assert row.cost_per_1m_tokens == pytest.approx(0.6)


def test_a_correct_answer_costs_the_time_of_all_answers() -> None:
    scored = [replace(each, score=float(number != 2)) for number, each in enumerate(TURNS)]
    price = Price(per_second=0.01)
    row = figures(scored, price=price, slo=(), count_correct=True)
    assert row.score == 0.75
    assert row.cost_per_correct == pytest.approx(9 * 0.01 / 3)
    assert figures(scored, price=price, slo=()).cost_per_correct is None
    assert figures(scored, price=None, slo=(), count_correct=True).cost_per_correct is None
    wrong = [replace(each, score=0.0) for each in TURNS]
    assert figures(wrong, price=price, slo=(), count_correct=True).cost_per_correct is None


def test_latencies_are_means_and_percentiles_of_requests() -> None:
    timed = [sample(prompt=str(n), start=0, end=n, ttft_s=n / 10) for n in (5, 1, 3, 2, 4)]
    latency = figures(timed, price=None, slo=()).latency
    expected = {"mean": 3.0, "p50": 3.0, "p90": 4.6, "p95": 4.8, "p99": 4.96}
    assert latency["e2e"] == pytest.approx(expected)
    assert latency["ttft"] == pytest.approx({name: value / 10 for name, value in expected.items()})
    assert latency.keys() == {"e2e", "ttft"}


def test_time_per_output_token_is_a_requests_and_time_between_tokens_each_tokens() -> None:
    timed = [sample(ttft_s=9.0, gaps=((0.1, 1), (0.9, 3))), sample(gaps=((0.5, 1),)), sample(ttft_s=1.0)]
    latency = figures(timed, price=None, slo=()).latency
    assert latency["tpot"]["mean"] == pytest.approx((1.0 / 4 + 0.5) / 2)
    # 0.1 0.3 0.3 0.3 0.5: three tokens that came together waited a third each.
    assert latency["itl"]["mean"] == pytest.approx(1.5 / 5)
    assert latency["itl"]["p50"] == pytest.approx(0.3)
    assert latency["itl"]["p90"] == pytest.approx(0.42)


def test_requests_that_failed_take_time_and_are_wrong_and_have_no_latencies() -> None:
    fine = sample(prompt="p", start=0, end=2, ttft_s=0.5, output_tokens=10, score=1.0, target_passes=5)
    failed = sample(prompt="q", start=0, end=8, error="500", output_tokens=0, score=0.0, finish_reason="")
    row = figures([fine, failed], price=Price(per_second=0.01), slo=parse_limits("e2e_p99<60s"), count_correct=True)
    assert (row.requests, row.failed, row.output_tokens, row.seconds) == (2, 1, 10, 8.0)
    assert row.tokens_per_s == 10 / 8
    assert row.score == 0.5
    assert row.cost_per_correct == pytest.approx(0.08)
    assert row.cost_per_1m_tokens == pytest.approx(0.08 / 10 * 1e6)
    assert row.latency["e2e"]["p99"] == 2.0
    assert row.good_share == 0.5
    assert row.target_passes_per_token == 0.5


def test_an_arm_that_only_failed_has_figures_all_the_same() -> None:
    row = figures([sample(error="gone", output_tokens=0)], price=Price(1.0), slo=parse_limits("ttft_p95<1s"))
    assert (row.failed, row.tokens_per_s, row.latency, row.goodput) == (1, 0.0, {}, 0.0)
    assert row.cost_per_1m_tokens is None and row.lossless is None
    assert row.meets == {"ttft_p95 < 1000 ms": False}


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    quick = ((0.05, 1),) * 9
    served = [
        sample(prompt="good", start=0, end=4, ttft_s=0.4, gaps=quick),
        sample(prompt="late", start=0, end=4, ttft_s=0.5, gaps=quick),
        sample(prompt="slow", start=0, end=4, ttft_s=0.1, gaps=((0.08, 1),) * 9),
        sample(prompt="failed", start=0, end=4, error="500"),
        sample(prompt="short", start=0, end=4, ttft_s=0.2),
    ]
    row = figures(served, price=None, slo=parse_limits("ttft_p95<500ms,itl_p95<80ms"))
    assert row.good_share == 2 / 5
    assert row.goodput == 2 / 4
    assert row.meets == {"ttft_p95 < 500 ms": True, "itl_p95 < 80 ms": False}


def test_a_requests_own_percentile_is_over_its_own_tokens() -> None:
    stutter = sample(ttft_s=0.1, gaps=((0.05, 1),) * 9 + ((1.0, 1),))
    assert figures([stutter], price=None, slo=parse_limits("itl_p50<80ms")).good_share == 1.0
    assert figures([stutter], price=None, slo=parse_limits("itl_p95<80ms")).good_share == 0.0
    assert figures([stutter], price=None, slo=parse_limits("itl_mean<80ms")).good_share == 0.0


def test_what_ssv_discloses_is_summed_over_requests() -> None:
    known = {"tier": "turbo", "lossless": False}
    told = [
        sample(output_tokens=10, target_passes=4, unverified=2, judged=8, accepted=6, cached_tokens=4, **known),
        sample(output_tokens=30, target_passes=6, unverified=0, judged=0, accepted=0, cached_tokens=0, **known),
    ]
    row = figures(told, price=None, slo=())
    assert row.target_passes_per_token == 10 / 40
    assert row.unverified_share == 2 / 40
    assert row.acceptance_rate == 6 / 8
    assert row.cached_share == 4 / 10
    assert (row.tiers, row.lossless) == (("turbo",), False)
    silent = figures([sample()], price=None, slo=())
    assert (
        silent.target_passes_per_token is silent.unverified_share is silent.acceptance_rate is silent.lossless is None
    )


# Differences.


def run_of(arm: str, seconds: Sequence[float], *, repeats: Sequence[int] = (0, 1), **fields: Any) -> list[Sample]:
    """A prompt a block, which takes so long; each repeat 10 tokens."""
    return [
        sample(arm, block, repeat, f"p{block}", start=0, end=each, ttft_s=each / 2, gaps=((each / 2, 9),), **fields)
        for block, each in enumerate(seconds)
        for repeat in repeats
    ]


def of(found: Iterable[Difference], metric: str) -> Difference:
    return next(difference for difference in found if difference.metric == metric)


def test_differences_are_relative_to_the_first_arm() -> None:
    paces = [1.0, 1.5, 1.2, 2.0, 0.8, 1.1] * 42  # 504 requests, so that five of them lie beyond the p99
    a = run_of("a", paces, target_passes=10)
    b = run_of("b", [0.75 * pace for pace in paces], target_passes=5)
    found = differences(a, b, None, None, level=0.95)
    assert [d.metric for d in found] == list(measures.DIFFERENCES)
    for difference in found:
        assert difference.estimate == pytest.approx(-0.5 if difference.metric == "target_passes" else -0.25)
        assert difference.interval is not None
        assert difference.interval.low == pytest.approx(difference.estimate)
        assert difference.interval.level == 0.95


def test_cost_is_of_sums_and_of_each_arms_price() -> None:
    a = run_of("a", [1.0, 3.0])
    b = run_of("b", [1.0, 1.0])
    assert of(differences(a, b, None, None, level=0.95), "cost").estimate == pytest.approx(4 / 8 - 1)
    dear = differences(a, b, Price(per_second=1.0), Price(per_second=4.0), level=0.95)
    assert of(dear, "cost").estimate == pytest.approx(4 * 4 / 8 - 1)
    # a: 8 s for 40 tokens at 0.05 a second are 0.01 a token.
    api = differences(a, b, Price(per_second=0.05), Price(per_token=0.004), level=0.95)
    assert of(api, "cost").estimate == pytest.approx(0.4 - 1)
    assert of(api, "e2e_p50").estimate == pytest.approx(of(dear, "e2e_p50").estimate)


def test_time_that_failed_requests_took_is_in_cost_and_not_in_latencies() -> None:
    a = run_of("a", [1.0, 1.0])
    b = [replace(s, error="500", output_tokens=0) if s.block == 0 else s for s in run_of("b", [1.0, 1.0])]
    found = differences(a, b, None, None, level=0.95)
    assert of(found, "cost").estimate == pytest.approx(2 - 1)
    assert of(found, "e2e_p95").estimate == 0


def test_only_blocks_that_both_arms_have_been_through_twice_count() -> None:
    a, b = run_of("a", [1.0] * 4), run_of("b", [2.0] * 4)
    half = run_of("b", [50.0] * 5, repeats=(0,))[4:]
    missing = [s for s in run_of("a", [70.0] * 7)[12:]]  # of block 6, which b never had
    torn = [*run_of("b", [90.0] * 6)[10:], sample("b", 5, 1, "another")]
    found = differences([*a, *missing, *run_of("a", [1.0] * 6)[8:]], [*b, *half, *torn], None, None, level=0.95)
    assert of(found, "cost").estimate == pytest.approx(1.0)
    assert of(found, "e2e_p99").estimate == pytest.approx(1.0)
    assert differences(a, half, None, None, level=0.95) == []
    assert differences(a, [], None, None, level=0.95) == []


def test_too_few_blocks_have_an_estimate_and_no_interval() -> None:
    for num in (MIN_BLOCKS - 1, MIN_BLOCKS):
        found = differences(run_of("a", [1.0] * num), run_of("b", [2.0] * num), None, None, level=0.95)
        assert of(found, "cost").estimate == pytest.approx(1.0)
        assert of(found, "cost").interval is None or num == MIN_BLOCKS
        assert {d.interval is None for d in found if d.metric in ("cost", "tpot_mean", "e2e_p50")} == {num < MIN_BLOCKS}


@pytest.mark.parametrize(
    ("requests", "with_interval"),
    [
        (8, set()),
        (12, {"e2e_p50"}),
        (98, {"e2e_p50"}),
        (100, {"e2e_p50", "e2e_p95"}),
        (500, {"e2e_p50", "e2e_p95", "e2e_p99"}),
    ],
)
def test_a_percentile_has_an_interval_where_requests_lie_beyond_it(
    requests: int, with_interval: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "DIFFERENCES", ("e2e_p50", "e2e_p95", "e2e_p99"))
    a, b = (
        [replace(s, block=s.block % 6, prompt=str(s.block)) for s in run_of(arm, [1.0] * (requests // 2))]
        for arm in "ab"
    )
    found = differences(a, b, None, None, level=0.95)
    assert {d.metric for d in found if d.interval is not None} == with_interval
    assert len(found) == 3


def test_what_was_not_measured_is_not_compared() -> None:
    a, b = run_of("a", [1.0] * 6, target_passes=3), run_of("b", [1.0] * 6)
    found = differences(a, [replace(s, ttft_s=None, gaps=()) for s in b], None, None, level=0.95)
    assert {d.metric for d in found} == {"cost", "e2e_p50", "e2e_p95", "e2e_p99"}
    nothing = [replace(s, error="gone", output_tokens=0) for s in b]
    assert differences(a, nothing, None, None, level=0.95) == []


def test_arms_that_answered_hardly_anything_have_no_intervals() -> None:
    def but(arm: str, block: int) -> list[Sample]:
        return [
            s if s.block == block else replace(s, error="gone", output_tokens=0, ttft_s=None, gaps=())
            for s in run_of(arm, [1.0] * 8)
        ]

    found = differences(but("a", 0), but("b", 7), None, None, level=0.95)
    assert of(found, "cost").interval is None and of(found, "ttft_p50").interval is None
    assert of(found, "cost").estimate == pytest.approx(0)


def test_a_wider_level_is_a_wider_interval() -> None:
    rng = random.Random(0)
    a, b = (run_of(arm, [rng.lognormvariate(0, 0.3) for _ in range(12)]) for arm in "ab")
    for metric in ("cost", "e2e_p50"):
        one, two = (of(differences(a, b, None, None, level=level), metric).interval for level in (0.9, 0.99))
        assert one is not None and two is not None
        assert two.low < one.low < one.high < two.high


def test_prices_per_token_that_are_the_same_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "DIFFERENCES", ("cost",))
    price = Price(per_token=0.7e-6)
    rng = random.Random(1)
    for _ in range(300):
        a, b = (
            [replace(s, output_tokens=rng.randint(1, 500)) for s in run_of(arm, [1.0] * 8)] for arm in "ab"
        )  # fmt: skip
        cost = of(differences(a, b, price, price, level=0.95), "cost")
        assert verdict("a", "b", {1: [cost]}, None, 0, 32).startswith("b against a: no difference in cost")


@pytest.mark.parametrize("rounding", [1.8e-15, -1.8e-15, 4e-16, -3e-12])
def test_a_difference_that_is_rounding_is_no_difference_and_no_loss(rounding: float) -> None:
    """Whichever way a machine's sums round."""
    thin = Interval(rounding, rounding, rounding, 0.95)
    assert not thin.excludes(0.0)
    assert cost_in_words(Difference("cost", rounding, thin)).startswith("no difference in cost found")
    at_the_margin = Interval(-0.1 + rounding, -0.1 + rounding, -0.1 + rounding, 0.95)
    assert judge(at_the_margin, 0.1) is Quality.UNDECIDED
    assert Interval(1e-6, 1e-6, 1e-6, 0.95).excludes(0.0)
    assert judge(Interval(0.0, -0.099, 0.1, 0.95), 0.1) is Quality.NON_INFERIOR


# Quality.


def answers(arm: str, scores: Sequence[Sequence[float]]) -> list[Sample]:
    """Prompts and the scores of their repeats."""
    return [
        sample(arm, block, repeat, f"p{block}", score=score)
        for block, each in enumerate(scores)
        for repeat, score in enumerate(each)
    ]


def test_right_and_wrong_answers_are_counted_by_prompt() -> None:
    #        both     only a    only b  neither
    of_a = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    of_b = [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    found = quality(
        answers("a", [(s, s) for s in of_a]), answers("b", [(s, s) for s in of_b]), margin=0.1, level=0.95
    )  # fmt: skip
    assert found is not None
    assert (found.kind, found.prompts, found.only_a, found.only_b) == (Kind.RIGHT_OR_WRONG, 10, 5, 1)
    assert (found.score_a, found.score_b) == (0.8, 0.4)
    assert found.interval.estimate == pytest.approx(-0.4)
    assert found.mcnemar_p == pytest.approx(2 * 7 / 64)
    assert found.interval.low < -0.4 < found.interval.high
    assert (found.margin, found.verdict) == (0.1, Quality.UNDECIDED)


@pytest.mark.parametrize(
    ("num_worse", "margin", "expected"),
    [(0, 0.05, Quality.NON_INFERIOR), (0, 0.01, Quality.UNDECIDED), (60, 0.05, Quality.INFERIOR)],
)
def test_quality_is_judged_by_the_margin(num_worse: int, margin: float, expected: Quality) -> None:
    a = answers("a", [(1.0, 1.0)] * 100)
    b = answers("b", [(0.0, 0.0)] * num_worse + [(1.0, 1.0)] * (100 - num_worse))
    found = quality(a, b, margin=margin, level=0.95)
    assert found is not None and found.verdict == expected


def test_repeats_of_a_prompt_are_one_score() -> None:
    a = answers("a", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0,)])
    b = answers("b", [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    found = quality(a, b, margin=0.1, level=0.95)
    assert found is not None
    assert (found.kind, found.prompts) == (Kind.SCORES, 3)  # the fourth was not asked of both
    assert found.score_a == pytest.approx(0.5)
    assert found.score_b == pytest.approx(0.5)
    assert found.interval.estimate == pytest.approx((-0.5 + 0 + 0.5) / 3)
    assert found.only_a is found.only_b is found.mcnemar_p is None


def test_more_repeats_make_no_narrower_interval() -> None:
    few, many = (
        quality(answers("a", [(1.0,) * n] * 20), answers("b", [(1.0,) * n] * 20), margin=0.1, level=0.95)
        for n in (1, 10)
    )
    assert few is not None and few == many


def test_scores_are_compared_by_their_means() -> None:
    a, b = answers("a", [(0.5,)] * 30), answers("b", [(0.25,), (0.75,)] * 15)
    found = quality(a, b, margin=0.3, level=0.95)
    assert found is not None and found.kind == Kind.SCORES
    assert found.interval.estimate == pytest.approx(0)
    assert -0.3 < found.interval.low < 0 < found.interval.high < 0.3
    assert found.verdict == Quality.NON_INFERIOR


def test_quality_needs_prompts_with_scores() -> None:
    unscored = [sample("b")]
    assert quality(answers("a", [(1.0,)]), unscored, margin=0.1, level=0.95) is None
    assert quality(answers("a", [(0.5,)]), answers("b", [(0.7,)]), margin=0.1, level=0.95) is None
    one = quality(answers("a", [(1.0,)]), answers("b", [(1.0,)]), margin=0.1, level=0.95)
    assert one is not None and one.verdict == Quality.UNDECIDED


def test_identical_answers_are_those_of_one_prompt_seed_and_concurrency() -> None:
    a = [sample(prompt="p", seed=1, text="x"), sample(prompt="p", seed=2, text="y"), sample(prompt="q", text="z")]
    b = [
        sample("b", prompt="p", seed=1, text="x"),
        sample("b", prompt="p", seed=2, text="x"),
        sample("b", prompt="q", text="", error="gone"),
        sample("b", prompt="p", seed=1, text="x", concurrency=2),
    ]
    assert identical_share(a, b) == 0.5
    assert identical_share(a, []) is None


def test_samples_are_sorted_by_arm_and_concurrency() -> None:
    made = [sample("a"), sample("b", concurrency=2), sample("a", concurrency=2), sample("a")]
    assert by_arm(made) == {"a": {1: [made[0], made[3]], 2: [made[2]]}, "b": {2: [made[1]]}}


# Verdicts.


def cost(estimate: float, low: float | None = None, high: float = 0.0) -> Difference:
    interval = Interval(estimate, low, high, 0.95) if low is not None else None
    return Difference("cost", estimate, interval)


def judged(words: Quality) -> QualityFinding:
    return QualityFinding(
        Kind.RIGHT_OR_WRONG, 100, 0.9, 0.9, Interval(0, -0.01, 0.01, 0.95), 0.02, words, 1, 1, 1.0
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (cost(-0.2, -0.25, -0.15), "cheaper by 20.0% [15.0%, 25.0%]"),
        (cost(0.2, 0.15, 0.25), "dearer by 20.0% [15.0%, 25.0%]"),
        (cost(-0.02, -0.05, 0.01), "no difference in cost found (-2.0% [-5.0%, +1.0%])"),
        (cost(0.02, 0.0, 0.04), "no difference in cost found (+2.0% [+0.0%, +4.0%])"),
        (cost(-0.2), "cost undecided (-20.0%, too few blocks for an interval)"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "about_quality"),
    [
        (Quality.NON_INFERIOR, "quality is non-inferior (margin 2 points, 100 prompts)"),
        (Quality.INFERIOR, "quality is inferior (margin 2 points, 100 prompts)"),
        (Quality.UNDECIDED, "quality is undecided (margin 2 points, 100 prompts)"),
        (None, "quality was not judged"),
    ],
)
def test_a_verdict_is_one_sentence(found: Difference, words: str, kind: Quality | None, about_quality: str) -> None:
    text = verdict("slow", "fast", {4: [found]}, judged(kind) if kind else None, 0, 10)
    assert text == f"fast against slow: {words} at concurrency 4; {about_quality}"


def test_a_verdict_says_each_concurrency_and_what_failed() -> None:
    text = verdict("a", "b", {1: [cost(-0.1, -0.2, -0.05)], 4: [], 8: [cost(0.1, 0.05, 0.2)]}, None, 3, 40)
    assert text == (
        "b against a: cheaper by 10.0% [5.0%, 20.0%] at concurrency 1, dearer by 10.0% [5.0%, 20.0%] at concurrency 8; "
        "quality was not judged; 3 of its 40 requests failed"
    )
    assert verdict("a", "b", {}, None, 0, 4) == "b against a: cost was not measured; quality was not judged"


# The document.


def document_of(run: RunSettings, samples: Sequence[Sample], **options: Any) -> dict[str, Any]:
    return analyse(run, samples, options.pop("disclosures", {}), status="complete", **options)


def test_levels_are_shared_among_arms_and_concurrencies() -> None:
    arms = (*ARMS, parse_arm("c=grpc://h:3"))
    made = [
        replace(each, concurrency=concurrency, block=each.block + 10 * concurrency, score=1.0)
        for arm in "abc"
        for concurrency in (1, 4)
        for each in run_of(arm, [1.0] * 6)
    ]
    document = document_of(settings(arms=arms, concurrency=(1, 4), margin=0.1), made)
    assert document["levels"] == {
        "differences": pytest.approx(1 - 0.05 / 4),
        "quality": pytest.approx(1 - 0.05 / 2),
    }
    assert [(c["arm"], c["against"]) for c in document["comparisons"]] == [("b", "a"), ("c", "a")]
    for comparison in document["comparisons"]:
        assert list(comparison["differences"]) == ["1", "4"]
        intervals = [d["interval"] for found in comparison["differences"].values() for d in found]
        levels = {interval["level"] for interval in intervals if interval is not None}
        assert levels == {document["levels"]["differences"]}
        assert comparison["quality"]["interval"]["level"] == document["levels"]["quality"]
        assert comparison["quality"]["prompts"] == 6
    assert [(row["arm"], row["concurrency"]) for row in document["figures"]] == [
        ("a", 1), ("b", 1), ("c", 1), ("a", 4), ("b", 4), ("c", 4),
    ]  # fmt: skip


def test_one_rival_at_one_concurrency_has_the_whole_level() -> None:
    document = document_of(settings(), run_of("a", [1.0] * 6) + run_of("b", [1.0] * 6))
    assert document["levels"] == {"differences": pytest.approx(0.95), "quality": pytest.approx(0.95)}


def test_quality_is_judged_only_where_a_margin_was_given() -> None:
    made = answers("a", [(1.0, 1.0)] * 10) + answers("b", [(0.0, 0.0)] * 10)
    document = document_of(settings(), made)
    assert document["comparisons"][0]["quality"] is None
    assert any("no margin was given" in note for note in document["notes"])
    document = document_of(settings(margin=0.05), made)
    assert document["comparisons"][0]["quality"]["verdict"] == "inferior"
    assert "quality is inferior (margin 5 points, 10 prompts)" in document["comparisons"][0]["verdict"]
    assert not any("no margin was given" in note for note in document["notes"])


def test_texts_are_compared_only_where_they_can_be_the_same() -> None:
    made = [replace(s, text="x") for s in run_of("a", [1.0]) + run_of("b", [1.0])]
    assert document_of(settings(), made)["comparisons"][0]["identical_share"] == 1.0
    assert document_of(settings(temperature=0.7), made)["comparisons"][0]["identical_share"] is None


def test_an_arm_that_was_never_measured_is_not_compared() -> None:
    assert document_of(settings(), run_of("a", [1.0] * 6))["comparisons"] == []
    (comparison,) = document_of(settings(), run_of("b", [1.0] * 6))["comparisons"]
    assert comparison["differences"] == {}
    assert "cost was not measured" in comparison["verdict"]


def test_prices_make_cost_and_without_one_of_them_it_is_time() -> None:
    made = run_of("a", [2.0] * 6) + run_of("b", [1.0] * 6)
    cheap = (ARMS[0], parse_arm("b=grpc://h:1?price_per_hour=14.4"))

    def cost_of(run: RunSettings) -> tuple[float, list[str]]:
        document = document_of(run, made)
        found = document["comparisons"][0]["differences"]["1"]
        notes = [note for note in document["notes"] if "price" in note]
        return next(d["estimate"] for d in found if d["metric"] == "cost"), notes

    assert cost_of(settings()) == (pytest.approx(-0.5), [])
    assert cost_of(settings(arms=cheap)) == (pytest.approx(1.0), [])
    estimate, (note,) = cost_of(settings(arms=cheap, price_per_hour=None))
    assert estimate == pytest.approx(-0.5)
    assert "No price was given for a: " in note
    apis = tuple(parse_arm(f"{name}=http://h/v1?model=m&price_per_1m_tokens={n}") for name, n in (("a", 1), ("b", 3)))
    assert cost_of(settings(arms=apis, price_per_hour=None)) == (pytest.approx(2.0), [])


def test_arms_disclose_tiers_and_what_their_server_says_of_them() -> None:
    turbo = {"policy": {"accept_below": 0.1}, "lossless": False, "divergence": 0.02, "divergence_bound": 0.03}
    disclosed = {"bundle": "tiny", "confidence": 0.95, "tiers": {"turbo": turbo, "premium": {}}}
    made = run_of("a", [1.0], tier="premium", lossless=True) + run_of("b", [1.0], tier="turbo", lossless=False)
    a, b = document_of(settings(), made, disclosures={"a": None, "b": disclosed})["arms"]
    assert (a["tiers_used"], a["lossless"], a["bundle"], a["tiers"]) == (["premium"], True, None, {})
    assert (b["tiers_used"], b["lossless"], b["bundle"], b["confidence"]) == (["turbo"], False, "tiny", 0.95)
    assert b["tiers"] == {"turbo": turbo}
    assert (b["url"], b["tier"]) == ("grpc://127.0.0.1:2", "turbo")
    assert document_of(settings(), run_of("a", [1.0]))["arms"][0]["lossless"] is None


def notes_of(run: RunSettings, samples: Sequence[Sample]) -> str:
    return "\n".join(document_of(run, samples)["notes"])


def test_notes_say_what_a_reader_has_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "DIFFERENCES", ("cost",))
    plain = [replace(s, concurrency=c, block=s.block + 1000 * c) for c in (1, 2) for s in run_of("b", [1.0] * 100)]
    plain += [replace(s, arm="a") for s in plain]
    # Two run side by side at 2.
    plain += [replace(s, prompt=f"{s.prompt}-2") for s in plain if s.concurrency == 2]
    run = settings(concurrency=(1, 2), num_answers=0)
    assert notes_of(run, plain) == ""

    failed = [replace(s, error="x") if s.arm == "b" and s.block % 1000 < 2 else s for s in plain]
    # Of two blocks at either concurrency: two requests each at 1, four each at 2.
    assert "as wrong answers: b 12." in notes_of(run, failed)
    assert "Fewer than 6 blocks" in notes_of(settings(num_answers=0), run_of("a", [1.0] * 5) + run_of("b", [1.0] * 5))
    assert "(b 40% of the prompts' tokens)" in notes_of(
        run, [replace(s, cached_tokens=2) if s.arm == "b" else s for s in plain]
    )
    thin = [s for s in plain if not s.prompt.endswith("-2")]
    assert "At concurrency 2 fewer requests ran side by side" in notes_of(run, thin)
    assert "A p99 of fewer than 200" in notes_of(settings(num_answers=0), run_of("a", [1.0] * 99))
    mixed = (ARMS[0], parse_arm("b=http://h/v1?model=m"))
    assert "another tokenizer" in notes_of(replace(run, arms=mixed), plain)
    assert "No price was given for a, b: " in notes_of(replace(run, price_per_hour=None), plain)


# What to do.

LOSSLESS: dict[str, Any] = {"lossless": True, "text": "right", "score": 1.0}


def acted(b: Sequence[Sample], **changes: Any) -> tuple[str, dict[str, Any]]:
    """The recommendation and the comparison, against an arm that takes 2 s a prompt and is always right."""
    a = run_of("a", [2.0] * 8, **LOSSLESS)
    document = document_of(settings(**{"margin": 0.05, **changes}), [*a, *b])
    return document["recommendation"], document["comparisons"][0]


def test_a_lossless_arm_with_the_same_texts_is_the_same_however_few_prompts_there_were() -> None:
    advice, comparison = acted(run_of("b", [1.0] * 8, **LOSSLESS))
    assert (comparison["outcome"], comparison["quality"]["verdict"]) == ("yes", "the same")
    assert comparison["verdict"].endswith("quality is the same: b is lossless, and all its answers are the same texts")
    # 2 s at 3.6 an hour for 10 tokens: 200 for a million, 200,000 a month.
    assert advice == (
        "Use b instead of a: at 1,000 million output tokens a month it saves 100,000 of 200,000 a month "
        "[100,000, 100,000] at concurrency 1; its answers are the same texts."
    )
    for change in ({"lossless": False}, {"lossless": None}, {"text": "Right"}):
        _, other = acted(run_of("b", [1.0] * 8, **{**LOSSLESS, **change}))
        assert (other["outcome"], other["quality"]["verdict"]) == ("open", "undecided")
    warm = parse_arm("b=grpc://h:1?temperature=0.7")
    assert acted(run_of("b", [1.0] * 8, **LOSSLESS), arms=(ARMS[0], warm))[1]["identical_share"] is None


def test_what_is_saved_is_at_the_given_volume_and_time_without_prices() -> None:
    fast = run_of("b", [1.5] * 8, **LOSSLESS)
    assert "at 2 million output tokens a month it saves 100 of 400 a month" in acted(fast, volume=2e6)[0]
    advice, _ = acted(fast, price_per_hour=None)
    assert advice.startswith("Use b instead of a: 25.0% less machine time at concurrency 1;")


def test_an_arm_that_aborts_is_not_cheaper() -> None:
    aborts = [
        replace(s, error="the response ended by 'abort'", output_tokens=0, score=0.0) for s in run_of("b", [0.1] * 8)
    ]
    advice, comparison = acted(aborts)
    assert comparison["outcome"] == "no"
    assert "cost was not measured" in comparison["verdict"] and "16 of its 16 requests failed" in comparison["verdict"]
    assert advice.startswith(
        "Stay with a: no arm was found that is cheaper and as good (b: 100.0% of its requests failed"
    )


@pytest.mark.parametrize(
    ("changes", "seconds", "outcome", "words"),
    [
        ({"margin": None}, 1.0, "open", "its quality was not judged: give prompts with answers, and a --margin."),
        ({}, 1.0, "open", "whether it answers as well is undecided: give more prompts with answers."),
        ({"margin": None}, 2.0, "open", "it was not found to be cheaper"),
        ({"margin": None}, 3.0, "no", "it is dearer"),
    ],
)
def test_what_is_not_certain_is_said_with_what_to_do(
    changes: dict[str, Any], seconds: float, outcome: str, words: str
) -> None:
    advice, comparison = acted(run_of("b", [seconds] * 8, text="another", score=1.0), **changes)
    assert comparison["outcome"] == outcome
    assert advice.startswith("Stay with a") and words in advice


def test_an_arm_that_answers_worse_is_not_recommended_however_cheap() -> None:
    wrong = run_of("b", [0.5] * 8, text="wrong", score=0.0)
    advice, comparison = acted(wrong)
    assert (comparison["outcome"], comparison["quality"]["verdict"]) == ("no", "inferior")
    assert "b: it answers worse" in advice
    found = comparison["examples"]
    assert len(found) == measures.MAX_EXAMPLES
    assert found[0] == {"prompt": "p0", "a": "right", "b": "wrong", "score_a": 1.0, "score_b": 0.0}
    assert acted(run_of("b", [0.5] * 8, **LOSSLESS))[1]["examples"] == []


def test_examples_are_first_those_that_one_arm_alone_has_right() -> None:
    alike = [replace(s, text="x", score=1.0) for s in run_of("b", [1.0] * 8)]
    alike[14:] = [replace(s, text="y" * 9999, score=0.0) for s in alike[14:]]
    found = acted(alike)[1]["examples"]
    assert [each["prompt"] for each in found] == ["p7", "p0", "p1", "p2", "p3"]
    assert len(found[0]["b"]) == measures.MAX_EXAMPLE


def test_of_long_answers_the_place_is_shown_where_they_part() -> None:
    same = "0123456789" * 3
    (found,) = examples([sample(text=f"{same}ab{same}")], [sample("b", text=f"{same}cd")], length=12)
    assert (found["a"], found["b"]) == ("…789ab01234…", "…789cd")
    (found,) = examples([sample(text="01234567890123")], [sample("b", text="0123x")], length=12)
    assert (found["a"], found["b"]) == ("01234567890…", "0123x")


def test_where_the_answer_is_the_same_the_reasoning_is_shown() -> None:
    (found,) = examples([sample(text="4", reasoning="2+2")], [sample("b", text="4", reasoning="2*2")])
    assert (found["a"], found["b"]) == ("2+2", "2*2")


def test_reasoning_is_counted_apart_and_answers_that_never_came_are_told() -> None:
    thought = [replace(s, reasoning_tokens=5, ttfo_s=s.e2e_s, text="right") for s in run_of("b", [1.0] * 8)]
    thought[0] = replace(thought[0], text="<think>and so", score=0.0)
    row = figures(thought, price=None, slo=parse_limits("ttfo_p95<2s"))
    assert (row.reasoning_share, row.unanswered, row.latency["ttfo"]["p50"]) == (0.5, 1, 1.0)
    assert "Of b, 1 responses ended within their reasoning" in notes_of(settings(), [*run_of("a", [1.0] * 8), *thought])


# Simulated runs: prompts are alike in both arms, a block's requests share the machine, and the machine becomes slower.


def simulated(
    plan: Sequence[Turn], seed: int, *, b: float = 1.0, drift: float = 1.0, noise: float = 0.1
) -> list[Sample]:
    """What arms that differ in speed alone would have come to on a machine that may slow down.

    Args:
        b: how long arm b takes, where a takes 1.
        drift: how much slower the machine is at the end than at the beginning: 1 is twice as slow.
    """
    rng = random.Random(seed)
    lengths = [rng.randint(20, 60) for _ in range(1000)]
    machine = {turn.block: rng.lognormvariate(0, 0.3) for turn in plan}
    made, now = [], 0.0
    for number, turn in enumerate(plan):
        pace = 0.02 * machine[turn.block] * (1 + drift * number / len(plan)) * (b if turn.arm == "b" else 1.0)
        for prompt in turn.prompts:
            end = now + lengths[prompt] * pace * rng.lognormvariate(0, noise)
            made.append(
                sample(
                    turn.arm, turn.block, turn.repeat, str(prompt), start=now, end=end, output_tokens=lengths[prompt]
                )
            )
            now = end
    return made


def cost_differences(
    runs: int, monkeypatch: pytest.MonkeyPatch, *, mirrored: bool = True, **options: float
) -> list[dict[str, Any]]:
    monkeypatch.setattr(measures, "DIFFERENCES", ("cost",))
    found = []
    for seed in range(runs):
        plan = make_plan(40, "ab", [1], blocks_of=2, seed=seed)
        if not mirrored:
            plan = sorted(plan, key=lambda turn: (turn.block, turn.arm, turn.repeat))
        document = document_of(settings(num_prompts=40), simulated(plan, seed, **options))
        (comparison,) = document["comparisons"]
        (difference,) = comparison["differences"]["1"]
        assert ("no difference in cost" in comparison["verdict"]) == _holds(difference, 0.0)
        found.append(difference)
    return found


def _holds(difference: dict[str, Any], value: float) -> bool:
    return bool(difference["interval"]["low"] <= value <= difference["interval"]["high"])


def alarms_allowed(runs: int) -> int:
    """At a chance of alpha each, three standard errors above the mean."""
    return math.floor(0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs))


def test_an_arm_against_itself_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost_differences(200, monkeypatch)
    alarms = sum(not _holds(difference, 0.0) for difference in found)
    assert alarms <= alarms_allowed(200)
    # The intervals tell something: what 20 % is, they would see.
    assert sum(d["interval"]["high"] - d["interval"]["low"] for d in found) / 200 < 0.2


def test_a_real_difference_is_found_and_its_size_is_in_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost_differences(100, monkeypatch, b=0.8)
    assert all(difference["interval"]["high"] < 0 for difference in found)
    assert sum(not _holds(difference, -0.2) for difference in found) <= alarms_allowed(100)
    assert all(difference["interval"]["low"] > 0 for difference in cost_differences(20, monkeypatch, b=1.25))


def test_turns_that_are_not_mirrored_would_take_drift_for_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"drift": 3.0, "noise": 0.02}
    biased = cost_differences(30, monkeypatch, mirrored=False, **options)
    assert sum(difference["interval"]["low"] > 0 for difference in biased) > 15
    fair = cost_differences(100, monkeypatch, **options)
    assert sum(not _holds(difference, 0.0) for difference in fair) <= alarms_allowed(100)
    assert abs(sum(d["estimate"] for d in fair)) / 100 < sum(d["estimate"] for d in biased) / 30 / 10


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_quality_of_an_arm_against_itself_is_rarely_inferior(alike: float) -> None:
    """Answers of both arms that have nothing, or everything but a tenth, in common."""
    wrong = 0
    for seed in range(120):
        rng = random.Random(seed)
        scores = [[float(rng.random() < 0.7)] * 2 for _ in range(60)]
        if not alike:
            scores = [[a, float(rng.random() < 0.7)] for a, _ in scores]
        made = [sample("ab"[side], 0, 0, str(n), score=pair[side]) for n, pair in enumerate(scores) for side in (0, 1)]
        document = document_of(settings(margin=0.02), made)
        wrong += document["comparisons"][0]["quality"]["verdict"] == "inferior"
    assert wrong <= math.floor(0.025 * 120 + 3 * math.sqrt(0.025 * 0.975 * 120))


def test_an_arm_that_is_worse_by_the_margin_rarely_passes() -> None:
    passed = 0
    for seed in range(120):
        rng = random.Random(seed)
        made = []
        for n in range(80):
            right = rng.random() < 0.8
            worse = right and rng.random() >= 0.1 / 0.8  # on average lower by 10 points, the margin
            made += [sample("a", prompt=str(n), score=float(right)), sample("b", prompt=str(n), score=float(worse))]
        document = document_of(settings(margin=0.1), made)
        passed += document["comparisons"][0]["quality"]["verdict"] == "non-inferior"
    assert passed <= math.floor(0.025 * 120 + 3 * math.sqrt(0.025 * 0.975 * 120))
