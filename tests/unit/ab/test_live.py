"""The running comparison of live arms, by hand and by simulation, and the command that shows it and takes arms out of
service.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import BadStatusLine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssv.ab import live as module
from ssv.ab import watch as watch_module
from ssv.ab.cli import main
from ssv.ab.journal import Journal
from ssv.ab.limits import Limit, parse_limits
from ssv.ab.live import METRICS, SHARES, LiveComparison, guard_names
from ssv.ab.routing import fall_back, fallback_path
from ssv.ab.sequential import bernoulli_interval, proportion_difference

Record = dict[str, Any]


def limits(text: str) -> tuple[Limit, ...]:
    return parse_limits(text, SHARES, guard_names())


def start(shares: Mapping[str, float] | None = None, **fields: Any) -> Record:
    arms = {name: {"share": share} for name, share in (shares or {"a": 0.5, "b": 0.5}).items()}
    return {"event": "start", "at": 0.0, "routing": {"salt": "s", "log": "l", "arms": arms, "shadow": None, **fields}}


OUTCOME: Record = {
    "event": "outcome", "id": "1", "is_shadow": False, "is_fallback": False, "without": [], "pair": "", "at": 0.0,
    "ttft_s": 0.1, "e2e_s": 1.0, "error": "", "finish_reason": "stop", "output_tokens": 10, "first_tokens": 1,
    "prompt_tokens": 7, "target_passes": 5, "judged": 4, "accepted": 3, "unverified": 2, "tier": "turbo",
    "lossless": False, "text_sha": "x",
}  # fmt: skip
FAILED = {"error": "UNAVAILABLE: x", "finish_reason": "", "ttft_s": None, "output_tokens": 0}
LEFT = {"finish_reason": "cancelled"}


def outcome(arm: str, unit: object, **fields: Any) -> Record:
    return {**OUTCOME, "arm": arm, "unit": str(unit), **fields}


def answer_and_copy(unit: object, pair: str, a: Record, b: Record) -> list[Record]:
    return [outcome("a", unit, pair=pair, **a), outcome("b", unit, pair=pair, is_shadow=True, **b)]


def took(*records: Record, guards: str = "") -> LiveComparison:
    found = LiveComparison(limits(guards) if guards else ())
    for record in records:
        found.take(record)
    return found


def facts(live: LiveComparison) -> Any:
    """All that has been counted."""
    arms = {name: {field: getattr(arm, field) for field in arm.__slots__} for name, arm in live.arms.items()}
    for arm in arms.values():
        watched = arm["watched"]
        arm["watched"] = {field: getattr(watched, field) for field in watched.__slots__}
        arm["watched"]["means"] = {metric: mean.count for metric, mean in watched.means.items()}
        arm["watched"]["judged"] = dict(watched.judged)
    return arms, [(live.error_difference(arm), live.pairs(arm)) for arm in live.rivals], live._half_pairs, live.skipped


def estimate(live: LiveComparison, metric: str = "e2e", arm: str = "b") -> float:
    interval = live.difference(arm, metric)
    assert interval is not None
    return interval.estimate


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values of an arm are enough."""
    monkeypatch.setattr(module, "BURN_IN", 2)


# By hand.

FOUR = [outcome("a", 1, e2e_s=1.0), outcome("b", 2, e2e_s=4.0), outcome("b", 3, e2e_s=6.0), outcome("a", 4, e2e_s=3.0)]


@pytest.mark.usefixtures("few")
def test_a_difference_by_hand() -> None:
    """Means of 1 and 4, then 1 and 5: 3 + (6 - 4) / 0.5 and 4 - (3 - 1) / 0.5."""
    live = took(start(), *FOUR)
    assert estimate(live) == pytest.approx((7 + 0) / 2)
    assert (live.first, live.rivals, live.skipped, live.malformed) == ("a", ("b",), 0, 0)
    assert {metric: list(values) for metric, values in live.arms["b"].values.items()} == {
        "e2e": [4.0, 6.0],
        "ttft": [0.1, 0.1],
        "tpot": pytest.approx([3.9 / 9, 5.9 / 9]),
        "passes": [0.5, 0.5],
    }
    assert (live.arms["b"].requests, live.arms["b"].output_tokens, live.arms["b"].unverified) == (2, 20, 4)
    assert (live.arms["b"].target_passes, live.arms["b"].tier) == (10, "turbo")


@pytest.mark.usefixtures("few")
def test_of_a_unit_the_first_request_alone_is_compared() -> None:
    more = [outcome(record["arm"], record["unit"], e2e_s=50.0) for record in FOUR]
    live = took(start(), FOUR[0], more[0], *FOUR[1:3], *more[1:3], FOUR[3])
    assert estimate(live) == pytest.approx(3.5)
    assert live.skipped == 3
    assert live.arms["b"].requests == 4  # but seen they were


@pytest.mark.usefixtures("few")
def test_a_unit_that_first_failed_has_had_its_turn() -> None:
    live = took(start(), outcome("b", 9, **FAILED), outcome("b", 9, e2e_s=50.0), *FOUR)
    assert estimate(live) == pytest.approx(3.5)
    assert live.error_difference("b") == proportion_difference(0, 2, 1, 3, alpha=0.05)


@pytest.mark.usefixtures("few")
def test_while_an_arm_is_out_of_service_nothing_is_compared_with_it() -> None:
    """Neither what the first arm answers for it nor the first arm's own: those come later than all of the arm's, by no
    chance.
    """
    meanwhile = [
        outcome("a", 8, e2e_s=70.0, without=["b"]),
        outcome("a", 9, e2e_s=70.0, without=["b"], is_fallback=True),
    ]
    live = took(start(), *FOUR[:3], *meanwhile, FOUR[3])
    assert estimate(live) == pytest.approx(3.5)
    assert live.skipped == 2
    assert live.arms["a"].requests == 3  # the one that was meant for b is not a's
    assert live.error_difference("b") == proportion_difference(0, 2, 0, 2, alpha=0.05)
    # Units of both arms count when it is back.
    later = took(start(), *meanwhile, *FOUR[:3], outcome("a", 8, e2e_s=3.0), outcome("b", 9, e2e_s=5.0))
    assert later.error_difference("b") == proportion_difference(0, 2, 0, 3, alpha=0.05)
    # Another arm's absence is none of b's.
    three = {"a": 0.4, "b": 0.4, "c": 0.2}
    live = took(start(three), *(({**record, "without": ["c"]}) for record in FOUR))
    assert estimate(live) == pytest.approx(3.5)
    assert live.error_difference("c") == proportion_difference(0, 0, 0, 0, alpha=0.025)


@pytest.mark.usefixtures("few")
def test_shares_that_change_count_from_then_on() -> None:
    live = took(start(), *FOUR[:3], start({"a": 0.8, "b": 0.2}), FOUR[3])
    assert estimate(live) == pytest.approx((7 + 4 - (3 - 1) / 0.8) / 2)
    assert live.arms["a"].requests == 2


@pytest.mark.usefixtures("few")
def test_each_of_several_arms_is_compared_with_the_first_at_its_part_of_alpha() -> None:
    live = took(start({"a": 0.5, "b": 0.3, "c": 0.2}), *FOUR[:2], outcome("c", 7, e2e_s=90.0), *FOUR[2:])
    assert live.rivals == ("b", "c")
    assert estimate(live) == pytest.approx((3 + 2 / 0.375 + 4 - 2 / 0.625) / 2)
    interval = live.difference("b", "e2e")
    assert interval is not None and interval.level == 0.975
    assert live.difference("c", "e2e") is None
    assert live.error_difference("c") == proportion_difference(0, 2, 0, 1, alpha=0.025)


@pytest.mark.usefixtures("few")
def test_a_shadow_is_compared_by_pairs() -> None:
    pairs = [
        answer_and_copy(1, "p", {"e2e_s": 1.0}, {"e2e_s": 1.5}),
        answer_and_copy(2, "q", {"e2e_s": 4.0}, {"e2e_s": 4.7, "text_sha": "y"})[::-1],  # the copy was first
        answer_and_copy(3, "r", {"e2e_s": 2.0}, {"e2e_s": 2.9}),
        answer_and_copy(3, "s", {"e2e_s": 2.0}, {"e2e_s": 90.0, "text_sha": "y"}),  # the same user
        answer_and_copy(4, "t", {"e2e_s": 2.0}, FAILED),
        answer_and_copy(5, "u", LEFT, {"e2e_s": 90.0, "text_sha": "y"}),
    ]
    single = [outcome("a", 6, e2e_s=80.0) for _ in range(50)]  # was not copied
    mixed = [pairs[0][0], pairs[1][0], *single, pairs[0][1], pairs[1][1], *(r for pair in pairs[2:] for r in pair)]
    live = took(start({"a": 1.0, "b": 1.0}, shadow="b"), *mixed)
    assert live.shadow == "b"
    assert estimate(live) == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert live.pairs("b") == (3, 1)
    assert live.error_difference("b") == proportion_difference(0, 5, 1, 5, alpha=0.05)
    assert (live.arms["a"].requests, live.arms["b"].requests) == (56, 6)
    assert (live.malformed, live.skipped) == (0, 1)


def test_halves_of_pairs_are_kept_no_longer_than_they_can_be_whole() -> None:
    shadow = start({"a": 1.0, "b": 1.0}, shadow="b")
    live = took(shadow, *(outcome("a", number) for number in range(100)))
    assert not live._half_pairs, "most requests are never copied"
    live.take(outcome("a", 1, pair="p"))
    live.take(shadow)  # killed, and started again
    assert not live._half_pairs


@pytest.mark.usefixtures("few")
def test_an_answer_that_came_at_once_has_no_time_per_token() -> None:
    live = took(start(), outcome("a", 1, first_tokens=10, ttft_s=1.0), outcome("a", 2, first_tokens=4))
    assert list(live.arms["a"].values["tpot"]) == pytest.approx([0.9 / 6])
    assert len(live.arms["a"].values["e2e"]) == 2


# Records that make no sense.


@pytest.mark.parametrize(
    "change",
    [
        {"arm": "z"},
        {"e2e_s": math.nan},
        {"ttft_s": math.inf},
        {"e2e_s": "soon"},
        {"output_tokens": None},
        {"target_passes": "many"},
        {"unverified": math.inf},
        {"without": None},
        *({name: ...} for name in ("arm", "unit", "without", "is_fallback", "e2e_s", "ttft_s", "first_tokens", "pair")),
        *({name: ...} for name in ("error", "finish_reason", "output_tokens", "unverified", "target_passes", "tier")),
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_counted_and_left_out(change: Record) -> None:
    record = {name: value for name, value in {**outcome("b", 1), **change}.items() if value is not ...}
    live = took(start(), record, guards="e2e_p95<5s,error_rate<1%")
    assert live.malformed == 1
    clean = took(start(), guards="e2e_p95<5s,error_rate<1%")
    assert facts(live) == facts(clean)
    live.take(outcome("b", 1))
    assert (live.malformed, live.arms["b"].requests) == (1, 1)


@pytest.mark.parametrize(
    "record", [{"event": "start"}, {"event": "start", "routing": []}, {"event": "start", "routing": {"arms": ["a"]}}]
)
def test_a_start_that_makes_no_sense(record: Record) -> None:
    live = took(record)
    assert (live.malformed, live.arms, live.rivals) == (1, {}, ())
    live = took(outcome("a", 1))  # before any start
    assert live.malformed == 1


def test_other_events_are_none_of_its_business() -> None:
    live = took(start(), {"event": "fallback", "arms": {}}, {"event": "new in 2027"}, {})
    assert live.malformed == 0


# Guard-rails.


def many(num: int, share: float, bad: Record, arm: str = "b") -> list[Record]:
    """Outcomes of which a share is bad, evenly spread."""
    records, owed = [], 0.0
    for number in range(num):
        owed += share
        is_bad = owed >= 1 - 1e-9
        owed -= is_bad
        records.append(outcome(arm, number, **({"id": str(number)} | (bad if is_bad else {}))))
    return records


@pytest.mark.parametrize(
    ("guard", "bad", "holds", "breaks", "words"),
    [
        ("error_rate<2%", FAILED, 0.02, 0.1, "error_rate < 2 %: 40 of 400 requests failed"),
        ("e2e_p95<5s", {"e2e_s": 5.0}, 0.05, 0.2, "e2e_p95 < 5000 ms: 80 of 400 requests took as long"),
        ("tpot_p50<500ms", {"e2e_s": 9.0}, 0.5, 0.8, "tpot_p50 < 500 ms: 320 of 400 requests took as long"),
        ("ttft_mean<200ms", {"ttft_s": 0.9}, 0.12, 0.3, "ttft_mean < 200 ms: it is 340 ms"),
        # Who is gone after the limit would have waited longer yet; a server that hangs has no latencies.
        ("e2e_p95<5s", {**LEFT, "e2e_s": 30.0}, 0.05, 0.2, "80 of 400 requests took as long"),
        ("ttft_p95<5s", {**LEFT, "e2e_s": 30.0, "ttft_s": None}, 0.05, 0.2, "80 of 400 requests took as long"),
        ("e2e_p95<5s", {**FAILED, "e2e_s": 30.0}, 0.05, 0.2, "80 of 400 requests took as long"),
    ],
)
def test_a_guard_is_broken_when_it_is_certain(guard: str, bad: Record, holds: float, breaks: float, words: str) -> None:
    assert took(start(), *many(400, holds, bad), guards=guard).broken("b") == []
    (found,) = took(start(), *many(400, breaks, bad), guards=guard).broken("b")
    assert words in found
    assert took(start(), *many(400, breaks, bad, arm="a"), guards=guard).broken("b") == []


@pytest.mark.parametrize(
    ("guard", "gone"),
    [
        ("e2e_p95<5s", {**LEFT, "e2e_s": 4.9}),
        ("ttft_p95<5s", {**LEFT, "e2e_s": 30.0, "ttft_s": 0.2}),
        ("tpot_p95<5s", {**LEFT, "e2e_s": 30.0}),
        ("e2e_p95<5s", {**FAILED, "e2e_s": 0.1}),
    ],
)
def test_who_left_or_failed_before_the_limit_says_nothing_of_it(guard: str, gone: Record) -> None:
    live = took(start(), *many(400, 0.5, gone), guards=guard)
    assert live.broken("b") == []
    assert live.arms["b"].watched.judged[limits(guard)[0]] == [0, 200]


def test_a_hanging_arm_is_found_although_it_never_answers() -> None:
    hangs = [outcome("b", number, **LEFT, e2e_s=30.0, ttft_s=None, output_tokens=0) for number in range(30)]
    assert took(start(), *hangs, guards="e2e_p95<5s").broken("b")


def test_what_a_client_asked_wrongly_is_not_the_arms_error() -> None:
    refused = outcome("b", 1, **(FAILED | {"error": "INVALID_ARGUMENT: max_tokens -1"}))
    live = took(start(), *[refused] * 500, outcome("b", 1), guards="error_rate<2%,e2e_p95<5s")
    assert (live.arms["b"].refused, live.arms["b"].errors, live.arms["b"].requests) == (500, 0, 1)
    assert not live.broken("b") and live.skipped == 0  # and the unit's first request is the one that could be answered


def test_an_arm_that_is_put_back_is_watched_anew() -> None:
    bad = [outcome("b", number, **FAILED) for number in range(50)]
    out, back = ({"event": "fallback", "at": 0.0, "arms": arms} for arms in ({"b": "errors"}, {}))
    guards = "error_rate<2%"
    assert took(start(), *bad, out, guards=guards).broken("b")
    live = took(start(), *bad, out, back, guards=guards)
    assert not live.broken("b") and live.arms["b"].errors == 50
    for record in bad:
        live.take(record)
    assert live.broken("b")


def test_audits_and_pairs_of_an_arm_that_is_put_back_count_anew() -> None:
    pairs = [r for n in range(50) for r in answer_and_copy(n, str(n), {"text_sha": "x"}, {"text_sha": "y"})]
    live = took(start(shadow="b"), *pairs, guards="text_difference<20%,divergence<5%")
    live.audits({"turbo": (3000, 600)})
    assert len(live.broken("b")) == 2
    live.out_of_service({"b": "both"})
    live.out_of_service({})
    live.audits({"turbo": (6000, 620)})
    assert live.broken("b") == [] and live.pairs("b") == (50, 50)


def test_guards_share_alpha() -> None:
    """20 of 400 with a limit of 2 % is certain for one guard, but not for one of ten."""
    num = next(n for n in range(400) if bernoulli_interval(n, 400, alpha=0.05).low > 0.02)
    records = [outcome("b", n, **(FAILED if n < num else {})) for n in range(400)]
    assert took(start(), *records, guards="error_rate<2%").broken("b")
    nine = ",".join(f"e2e_p95<{number}s" for number in range(50, 59))
    assert not took(start(), *records, guards=f"error_rate<2%,{nine}").broken("b")


def test_answers_in_place_of_another_arm_are_not_the_first_arms() -> None:
    records = [outcome("a", number, **FAILED, is_fallback=True) for number in range(100)]
    live = took(start(), *records, guards="error_rate<1%")
    assert (live.arms["a"].requests, live.broken("a"), live.skipped) == (0, [], 100)


@pytest.mark.parametrize(
    ("audited", "mismatches", "is_broken"),
    [(5000, 500, True), (5000, 250, False), (5000, 255, False), (1999, 1999, False), (2000, 2000, True), (0, 0, False)],
)
def test_divergence_is_that_of_the_arms_tier_in_the_servers_audits(
    audited: int, mismatches: int, is_broken: bool
) -> None:
    live = took(start(), outcome("a", 1, tier="premium"), outcome("b", 2), guards="divergence<5%")
    assert live.broken("b") == []
    live.audits({"premium": (9000, 9000), "balanced": (9000, 9000)})
    assert live.broken("b") == []
    live.audits({"turbo": (audited, mismatches)})
    assert bool(live.broken("b")) == is_broken
    if is_broken:
        assert f"divergence < 5 %: {mismatches} of {audited} audited tokens differ" in live.broken("b")


@pytest.mark.parametrize(("num_different", "is_broken"), [(3, False), (10, False), (60, True)])
def test_text_difference_is_that_of_pairs(num_different: int, is_broken: bool) -> None:
    records: list[Record] = []
    for number in range(100):
        sha = {"text_sha": "y"} if number < num_different else {}
        records += answer_and_copy(number, f"p{number}", {}, sha)
    live = took(start({"a": 1.0, "b": 1.0}, shadow="b"), *records, guards="text_difference<10%")
    expected = ["text_difference < 10 %: 60 of 100 pairs differ"] if is_broken else []
    assert live.broken("b") == expected


# Simulated logs, looked at again and again.


def simulated(
    rng: np.random.Generator, num_users: int, share: float, *, slower: float = 1.0, per_user: float = 2.0
) -> Iterator[Record]:
    """Requests of users who are slow or fast in all they ask, with skewed latencies, in no order of their users."""
    counts = rng.geometric(1 / per_user, num_users)
    users = rng.permutation(np.repeat(np.arange(num_users), counts))
    is_b = rng.random(num_users) < share
    habits = rng.lognormal(0.0, 0.6, num_users)
    noise = rng.lognormal(0.0, 0.4, (len(users), 2))
    for user, (first, rest) in zip(users.tolist(), noise.tolist(), strict=True):
        scale = float(habits[user]) * (slower if is_b[user] else 1.0)
        ttft = 0.1 * scale * first
        fields = {"ttft_s": ttft, "e2e_s": ttft + scale * rest, "target_passes": 4 + user % 5}
        yield {**OUTCOME, "arm": "b" if is_b[user] else "a", "unit": str(user), **fields}


def ever(records: Iterator[Record], live: LiveComparison, is_so: Callable[[LiveComparison], bool]) -> bool:
    """Whether it is so at any time: after every 20th record."""
    for number, record in enumerate(records):
        live.take(record)
        if number % 20 == 19 and is_so(live):
            return True
    return False


def differs(live: LiveComparison) -> bool:
    interval = live.difference("b", "e2e")
    return interval is not None and interval.excludes(0.0)


def bound(num_runs: int, rate: float = 0.05) -> float:
    """With three standard errors of a simulated rate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / num_runs)


@pytest.mark.parametrize(
    ("share", "num_users", "per_user", "num_runs"), [(0.5, 550, 8.0, 40), (0.1, 2600, 1.25, 36)], ids=["half", "tenth"]
)
def test_identical_arms_are_seldom_told_apart_at_any_time(
    share: float, num_users: int, per_user: float, num_runs: int
) -> None:
    told, known = 0, 0
    for run in range(num_runs):
        live = took(start({"a": 1 - share, "b": share}))
        records = simulated(np.random.default_rng(run), num_users, share, per_user=per_user)
        told += ever(records, live, differs)
        known += live.difference("b", "e2e") is not None
    assert told / num_runs <= bound(num_runs)
    assert known > 0.9 * num_runs, "there was nothing to look at"


def test_identical_pairs_are_seldom_told_apart_at_any_time() -> None:
    """The users' copies are slow or fast in all that they ask."""
    told, num_runs = 0, 30
    for run in range(num_runs):
        rng = np.random.default_rng(run)
        live = took(start({"a": 1.0, "b": 1.0}, shadow="b"))
        habits = rng.normal(0.0, 0.5, 280)
        users = rng.permutation(np.repeat(np.arange(280), 8))

        def records(
            users: Sequence[int] = users.tolist(),
            habits: Any = habits,
            noise: Sequence[float] = rng.lognormal(0.0, 0.5, 2240).tolist(),
        ) -> Iterator[Record]:
            for number, (user, value) in enumerate(zip(users, noise, strict=True)):
                yield from answer_and_copy(user, str(number), {"e2e_s": 9.0}, {"e2e_s": 9.0 + habits[user] * value})

        told += ever(records(), live, differs)
        assert live.pairs("b")[0] >= 200
    assert told / num_runs <= bound(num_runs)


def test_a_difference_of_a_fifth_is_found() -> None:
    for share in (0.5, 0.2):
        live = took(start({"a": 1 - share, "b": share}))
        records = simulated(np.random.default_rng(1), 6000, share, slower=1.2, per_user=1.1)
        assert ever(records, live, differs)
        assert estimate(live) > 0
        assert "you may stop: b has more e2e than a" in live.advice("b", "e2e", 0.05)


def healthy(rng: np.random.Generator, num: int, chance_of_error: float = 0.02) -> Iterator[Record]:
    """On the edge of the guards below."""
    failed = rng.random(num) < chance_of_error
    ttft = 0.1 * rng.lognormal(-0.125, 0.5, num)
    e2e = 5 * rng.random(num) / 0.95
    for number in range(num):
        fields = FAILED if failed[number] else {"ttft_s": float(ttft[number]), "e2e_s": float(e2e[number])}
        yield {**OUTCOME, "arm": "b", "unit": str(number), **fields}


EDGE = "error_rate<2%,e2e_p95<5s,ttft_mean<100ms"


def test_guards_of_an_arm_on_their_edge_are_seldom_broken_at_any_time() -> None:
    num_runs = 50
    passed = sum(
        ever(healthy(np.random.default_rng(run), 900), took(start(), guards=EDGE), lambda live: bool(live.broken("b")))
        for run in range(num_runs)
    )
    assert passed / num_runs <= bound(num_runs)


def test_guards_find_a_bad_arm() -> None:
    live = took(start(), guards=EDGE)
    assert ever(healthy(np.random.default_rng(0), 400, 0.1), live, lambda live: bool(live.broken("b")))
    assert live.broken("b")[0].startswith("error_rate < 2 %: ")


# Advice.


def test_advice() -> None:
    def alike(num: int, more: float) -> list[Record]:
        rng = np.random.default_rng(3)
        records = []
        for number in range(num):
            arm = "ab"[int(rng.random() < 0.5)]
            e2e = 1 + 0.3 * float(rng.random()) + (more if arm == "b" else 0.0)
            records.append(outcome(arm, number, e2e_s=e2e))
        return records

    advice = took(start()).advice("b", "e2e", 0.05)
    assert advice == "go on: b and a need 200 answers each before e2e can be compared"
    assert "b has less e2e than a, -" in took(start(), *alike(800, -0.2)).advice("b", "e2e", 0.05)
    assert "b has more e2e than a, +" in took(start(), *alike(800, 0.2)).advice("b", "e2e", 0.05)
    live = took(start(), *alike(800, 0.0))
    assert "b and a differ by less than 5% in e2e" in live.advice("b", "e2e", 0.05)
    assert "go on: e2e of b is not told from that of a yet" in live.advice("b", "e2e", 0.001)
    # The less is too much, the more answers it takes.
    times = [float(live.advice("b", "e2e", share).split("; about ")[1].split()[0]) for share in (0.015, 0.01)]
    assert 0 < times[0] < times[1]


def test_advice_on_what_is_always_0() -> None:
    records = [outcome("ab"[n % 2], n, target_passes=n % 3 if n % 2 else 0) for n in range(900)]
    assert "nothing can be compared" in took(start(), *records).advice("b", "passes", 0.05)


# The command.


def write(path: Path, *records: Record, torn: str = "") -> Path:
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    with path.open("a") as file:
        file.write(torn)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def look(log: Path, *options: str, once: bool = True) -> int:
    return main(["watch", str(log), *(["--once"] if once else []), *options])


BAD = [start(), *many(300, 0.3, FAILED), *(outcome("a", f"a{number}") for number in range(300))]
GUARD = ("--guard", "error_rate<5%")


def test_watch_shows_arms_and_differences(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = list(simulated(np.random.default_rng(0), 700, 0.5, per_user=1.5))
    assert look(write(log, start(), *records, outcome("b", "f", **FAILED), outcome("b", "l", **LEFT))) == 0
    out = capsys.readouterr().out
    live = took(start(), *records, outcome("b", "f", **FAILED), outcome("b", "l", **LEFT))
    row = next(line for line in out.splitlines() if line.startswith("│ b"))
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    b = live.arms["b"]
    p50, p95 = np.quantile(b.values["ttft"], [0.5, 0.95]) * 1e3
    assert cells[:5] == ["b", str(b.requests), f"1 ({1 / b.requests:.1%})", "1", f"{p50:,.0f} / {p95:,.0f}"]
    assert cells[-2:] == ["20.0%", "-"]
    assert "b less a, 95% at any time" in out
    interval = live.difference("b", "e2e")
    assert interval is not None
    assert f"{interval.estimate * 1e3:+.1f} ms [{interval.low * 1e3:+.1f}, {interval.high * 1e3:+.1f}]" in out
    assert all(f"│ {name} " in out for name in (*METRICS, "error_rate"))
    assert live.advice("b", "tpot", 0.05) in out
    assert f"left out: {live.skipped} further requests of the same user" in out
    assert not fallback_path(log).exists()


def test_watch_takes_an_arm_out_of_service(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(log, *BAD)
    assert look(log, *GUARD) == 4
    out = capsys.readouterr().out
    words = "error_rate < 5 %: 90 of 300 requests failed"
    assert f"b broke a guard-rail: {words}" in out
    assert "│ b (out of " in out
    assert "go on" not in out, "it gets no more requests"
    assert json.loads(fallback_path(log).read_text()) == {"b": words}
    # It is out already: nothing is done twice.
    fallback_path(log).write_text('{"b": "by hand"}')
    assert look(log, *GUARD) == 0
    assert "b is out of service: by hand" in capsys.readouterr().out
    assert json.loads(fallback_path(log).read_text()) == {"b": "by hand"}


def test_watch_takes_nobody_out_who_is_well_nor_the_first_arm(log: Path) -> None:
    assert look(write(log, *BAD), "--guard", "error_rate<40%") == 0
    log.unlink()
    assert look(write(log, start(), *many(300, 0.3, FAILED, arm="a")), *GUARD) == 0
    assert not fallback_path(log).exists()


def test_watch_only_says_so_with_no_fallback(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(write(log, *BAD), *GUARD, "--no-fallback") == 0
    assert "b broke a guard-rail" in capsys.readouterr().out
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_watch_adds_to_those_that_are_out_of_service(log: Path) -> None:
    fall_back(fallback_path(log), {"c": "before"})
    assert look(write(log, *BAD), *GUARD) == 4
    assert list(json.loads(fallback_path(log).read_text())) == ["c", "b"]


def test_watch_reports_torn_and_senseless_lines(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(log, start(), outcome("a", 1), {"event": "outcome"}, torn='{"event":"outc')
    assert look(log) == 0
    assert "left out: 1 torn lines, 1 senseless records" in capsys.readouterr().out
    write(log, outcome("b", 2))
    assert look(log) == 0
    out = capsys.readouterr().out
    assert "left out: 1 torn lines, 1 senseless records" in out
    assert [line.split("│")[2].strip() for line in out.splitlines() if line.startswith(("│ a", "│ b"))] == ["1", "1"]


def test_watch_says_what_is_no_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(log) == 2
    assert "No such file" in capsys.readouterr().err
    for text in ("", "hello\n", '{"event": "answer"}\n', "\x00\xff" * 100):
        log.write_text(text)
        assert look(log) == 2
        assert f"{log} does not begin as a log of ab_router does" in capsys.readouterr().err
    assert look(log.parent) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guard", "error_rate<5s"), "wrong unit"),
        (("--guard", "itl_p95<5s"), "unknown name 'itl_p95'"),
        (("--guard", "divergence<5%"), "give --metrics-url"),
        (("--equivalence", "1"), "--equivalence 1.0 must be a share"),
        (("--every", "0"), "--every 0.0 must be above 0"),
        (("--every", "nan"), "--every nan must be above 0"),
    ],
)
def test_watch_says_which_option_cannot_be(
    log: Path, options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(log, *BAD)
    assert look(log, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err.replace("\nhint: ", ": ")
    assert not captured.out


AUDITS = """# HELP ssv_audited_tokens Emitted tokens of lossy tiers that the target judged in full
# TYPE ssv_audited_tokens counter
ssv_audited_tokens{tier="balanced"} 4000
ssv_audited_tokens{tier="turbo"} 1e+04
ssv_audit_mismatches{tier="turbo"} 1200
ssv_audit_mismatches{tier="balanced"} 0
nv_inference_count{model="ssv",version="1"} 7
"""


def test_watch_reads_the_servers_audits(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(log, start(), outcome("a", 1, tier="balanced"), outcome("b", 2))
    (tmp_path / "metrics").write_text(AUDITS)
    options = ("--guard", "divergence<5%", "--metrics-url", (tmp_path / "metrics").as_uri())
    assert look(log, *options) == 4
    out = capsys.readouterr().out
    assert "12.00% of 10000" in out and "0.00% of 4000" in out
    assert json.loads(fallback_path(log).read_text()) == {
        "b": "divergence < 5 %: 1200 of 10000 audited tokens differ",
    }


def test_watch_says_which_tiers_the_server_has_withdrawn(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(log, start(), outcome("a", 1, tier="balanced"), outcome("b", 2))
    standing = (
        '# TYPE ssv_tier_withdrawn gauge\nssv_tier_withdrawn{tier="balanced"} %d\nssv_tier_withdrawn{tier="turbo"} 0\n'
    )
    for is_withdrawn in (0, 1):
        (tmp_path / "metrics").write_text(AUDITS + standing % is_withdrawn)
        assert look(log, "--metrics-url", (tmp_path / "metrics").as_uri()) == 0
        out = capsys.readouterr().out
        assert ("tier balanced is withdrawn: the server's audits found more divergence" in out) == is_withdrawn
        assert "tier turbo" not in out


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nobody", "Connection refused"),
        ("garbage", "SSH-2.0"),
        ("bytes", "what is there is not a server's metrics"),
        ("a page", "what is there is not a server's metrics"),
        ("another server's", "what is there is not a server's metrics"),
    ],
)
def test_watch_goes_on_without_metrics_and_says_so(
    log: Path, tmp_path: Path, how: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:9/metrics"
    if how == "garbage":

        def garbage(*_: Any, **__: Any) -> None:
            raise BadStatusLine("SSH-2.0")

        monkeypatch.setattr(watch_module, "urlopen", garbage)
    contents = {
        "bytes": b"\xff\xfe",
        "a page": b"<html>not found</html>",
        "another server's": b"ssv_audited_tokens 3\n",
    }
    if how in contents:
        (tmp_path / "metrics").write_bytes(contents[how])
        url = (tmp_path / "metrics").as_uri()
    assert look(write(log, *BAD), "--guard", "divergence<5%,error_rate<5%", "--metrics-url", url) == 4
    out = capsys.readouterr().out
    assert f"no metrics come from {url}" in out
    assert why in out
    assert "b broke a guard-rail: error_rate" in out


def test_watch_follows_a_log_that_grows(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps(outcome("b", "late", **FAILED))
    seen: list[bool] = []

    def step(seconds: float) -> None:
        assert seconds == 7.0
        seen.append(fallback_path(log).exists())
        if len(seen) == 1:
            write(log, start(), *BAD[301:], torn=line[:30])
        elif len(seen) == 2:
            with log.open("a") as file:
                file.write(line[30:] + "\n")
        elif len(seen) == 3:
            write(log, *BAD[1:301])
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch_module, "sleep", step)
    log.touch()
    assert look(log, *GUARD, "--every", "7", once=False) == 130
    assert seen == [False, False, False, True]
    out = capsys.readouterr().out
    assert out.count("ssv-ab watch") == 3, "nothing is shown of an empty log"
    assert "torn" not in out
    assert "91 of 301 requests failed" in out


def test_watch_says_when_the_log_was_replaced(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch_module, "sleep", lambda _: log.write_text(""))
    assert look(write(log, *BAD[:5]), once=False) == 2
    assert "has become shorter while it was read" in capsys.readouterr().err


def test_names_of_users_and_arms_are_no_markup(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(log, start(), outcome("a", 1))
    fallback_path(log).write_text('{"[red]x[/red]": "[/bold] no"}')
    assert look(log) == 0
    assert "[red]x[/red] is out of service: [/bold] no" in capsys.readouterr().out
