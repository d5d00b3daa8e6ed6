"""The running comparison of live arms, from the router's log.

Whoever was assigned counts once, with the first request: more requests of one user are not independent of each other.
What an arm did not choose, answers in place of one out of service, is left out of the comparison, and so is what the
first arm answers meanwhile. A shadow is compared by pairs of an answer and its copy.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssv.ab.limits import LATENCIES, Limit
from ssv.ab.sequential import RunningDifference, RunningMean, bernoulli_interval, proportion_difference
from ssv.ab.statistics import ROUNDING, Interval

ALPHA = 0.05

BURN_IN = 200
"""Latencies are skewed: fewer requests give intervals that do not hold."""

MIN_AUDITED = 2000
"""Audited tokens before a share of them means something."""

METRICS = ("tpot", "ttft", "e2e", "passes")
"""Seconds per output token after those of the first response, to the first token, to the end; target passes per output
token.
"""

REFUSED = "INVALID_ARGUMENT"
"""Errors that are the client's: they would take an arm out of service at a client's will."""

SHARES = ("error_rate", "divergence", "text_difference")


@dataclass(slots=True)
class _Watched:
    """What the guards of an arm go by, since it was put into service.

    Attributes:
        judged: by guard of a quantile, how many requests took as long as its limit, and of how many it is known.
        audited, mismatches, pairs, different: as they were before.
    """

    requests: int = 0
    errors: int = 0
    means: dict[str, RunningMean] = field(
        default_factory=lambda: {metric: RunningMean(burn_in=BURN_IN) for metric in METRICS}
    )
    judged: dict[Limit, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    audited: int = 0
    mismatches: int = 0
    pairs: int = 0
    different: int = 0


@dataclass(slots=True)
class ArmState:
    """What is known of an arm so far.

    Attributes:
        requests: that were assigned to the arm, and the copies it got; `errors`, `cancelled`: of them.
        refused: requests besides that were not as they should be, in any arm.
        values: of the answers, by metric.
        watched: what the guards go by.
        audited, mismatches: tokens, as the server's metrics say; None without them.
    """

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    refused: int = 0
    output_tokens: int = 0
    unverified: int = 0
    target_passes: int = 0
    tier: str = ""
    values: dict[str, array[float]] = field(default_factory=lambda: {metric: array("d") for metric in METRICS})
    watched: _Watched = field(default_factory=lambda: _Watched())
    audited: int | None = None
    mismatches: int = 0

    @property
    def error_rate(self) -> float:
        """Share of the requests that failed; 0 before there are any."""
        return self.errors / self.requests if self.requests else 0.0


@dataclass(slots=True)
class _Rivalry:
    differences: dict[str, RunningDifference]
    pairs: dict[str, RunningMean]
    num_pairs: int = 0
    num_different: int = 0
    errors: list[int] = field(default_factory=lambda: [0, 0])
    units: list[int] = field(default_factory=lambda: [0, 0])
    seen: set[str] = field(default_factory=set)


class LiveComparison:
    """Takes records in the order of the log.

    Attributes:
        arms: by name, the first arm first.
        skipped: outcomes of units that had counted before, or while an arm was out of service.
        malformed: records that make no sense.
    """

    def __init__(self, guards: Sequence[Limit] = ()) -> None:
        self.guards = tuple(guards)
        self.arms: dict[str, ArmState] = {}
        self.skipped = self.malformed = 0
        self._shares: dict[str, float] = {}
        self._shadow: str | None = None
        self._rivalries: dict[str, _Rivalry] = {}
        self._half_pairs: dict[str, Mapping[str, Any]] = {}
        self._fallen: frozenset[str] = frozenset()

    @property
    def first(self) -> str:
        """Name of the arm that the others are compared with."""
        return next(iter(self.arms))

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names of the arms that are compared with the first."""
        return tuple(self._rivalries)

    @property
    def shadow(self) -> str | None:
        """Name of the arm that gets copies of requests; None without one."""
        return self._shadow

    def take(self, record: Mapping[str, Any]) -> None:
        """A record of the log; one that makes no sense is counted, and left out."""
        try:
            if record.get("event") == "start":
                self._start(record["routing"])
            elif record.get("event") == "fallback":
                self.out_of_service(record["arms"])
            elif record.get("event") == "outcome":
                self._outcome(record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.malformed += 1

    def out_of_service(self, arms: Iterable[str]) -> None:
        """Takes which arms are.

        For one that has been put back the guards begin anew, and their alpha with them: what took it out of service has
        been mended, or it would be out again at once.
        """
        fallen = frozenset(arms)
        for arm in (self._fallen - fallen) & self.arms.keys():
            state = self.arms[arm]
            pairs, different = self.pairs(arm) if arm in self._rivalries else (0, 0)
            state.watched = _Watched(
                audited=state.audited or 0, mismatches=state.mismatches, pairs=pairs, different=different
            )
        self._fallen = fallen

    def audits(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Takes the server's counts of audited tokens.

        Args:
            counts: audited tokens and mismatches, by tier.
        """
        for state in self.arms.values():
            if state.tier in counts:
                state.audited, state.mismatches = counts[state.tier]

    def difference(self, arm: str, metric: str) -> Interval | None:
        """Mean of an arm less that of the first, at any time; None as long as there are too few."""
        rivalry, alpha = self._rivalries[arm], ALPHA / len(self._rivalries)
        if arm == self._shadow:
            return rivalry.pairs[metric].interval(alpha)
        return rivalry.differences[metric].interval(alpha)

    def error_difference(self, arm: str) -> Interval:
        """Error rate of an arm less that of the first, at any time."""
        rivalry = self._rivalries[arm]
        (errors_a, errors_b), (units_a, units_b) = rivalry.errors, rivalry.units
        return proportion_difference(errors_a, units_a, errors_b, units_b, alpha=ALPHA / len(self._rivalries))

    def pairs(self, arm: str) -> tuple[int, int]:
        """Pairs of an answer and its copy's, and how many of them are different texts."""
        return self._rivalries[arm].num_pairs, self._rivalries[arm].num_different

    def broken(self, arm: str) -> list[str]:
        """Which guards an arm has certainly broken, in words."""
        found = [self._check(limit, arm) for limit in self.guards]
        return [words for words in found if words is not None]

    def advice(self, arm: str, metric: str, equivalence: float) -> str:
        """Whether one may stop.

        Args:
            equivalence: relative difference that does not matter.
        """
        interval, values = self.difference(arm, metric), self.arms[self.first].values[metric]
        if interval is None or not values:
            return f"go on: {arm} and {self.first} need {BURN_IN} answers each before {metric} can be compared"
        mean = sum(values) / len(values)
        if mean <= 0:
            return f"{metric} of {self.first} is 0: nothing can be compared with it"
        shown = f"{interval.estimate / mean:+.1%} [{interval.low / mean:+.1%}, {interval.high / mean:+.1%}]"
        if interval.excludes(0.0) and interval.high < 0:
            return f"you may stop: {arm} has less {metric} than {self.first}, {shown}"
        if interval.excludes(0.0):
            return f"you may stop: {arm} has more {metric} than {self.first}, {shown}"
        if max(-interval.low, interval.high) < equivalence * mean:
            return f"you may stop: {arm} and {self.first} differ by less than {equivalence:.0%} in {metric}, {shown}"
        # The interval narrows as the root of the number of answers.
        reach = (interval.high - interval.low) / 2
        wanted = max(abs(interval.estimate), equivalence * mean - abs(interval.estimate))
        times = (reach / wanted) ** 2 if wanted > 0 else float("inf")
        more = (
            f"about {max(times - 1, 0.1):.1f} times as many answers again" if times < 100 else "very many more answers"
        )
        return f"go on: {metric} of {arm} is not told from that of {self.first} yet, {shown}; {more} are needed"

    def _start(self, routing: Mapping[str, Any]) -> None:
        arms = routing["arms"]
        self._shares = {name: float(arm["share"]) for name, arm in arms.items()}
        self._shadow = routing.get("shadow")
        self._half_pairs.clear()  # of a router that was killed: the other half never comes
        for name in arms:
            self.arms.setdefault(name, ArmState())
        for name in list(self.arms)[1:]:
            differences = {metric: RunningDifference(burn_in=BURN_IN) for metric in METRICS}
            pairs = {metric: RunningMean(burn_in=BURN_IN) for metric in METRICS}
            self._rivalries.setdefault(name, _Rivalry(differences, pairs))

    def _outcome(self, record: Mapping[str, Any]) -> None:
        # Everything is read before anything is counted.
        arm, unit, without = str(record["arm"]), str(record["unit"]), frozenset(record["without"])
        values, waited = _values(record), _waited(record)
        is_error, is_cancelled = bool(record["error"]), record["finish_reason"] == "cancelled"
        tokens, unverified, passes = (int(record[name]) for name in ("output_tokens", "unverified", "target_passes"))
        tier, pair = str(record["tier"]), str(record["pair"])
        state = self.arms[arm]
        if record["is_fallback"]:
            self.skipped += 1
            return
        if str(record["error"]).startswith(REFUSED):
            state.refused += 1
            return
        watched = state.watched
        state.requests += 1
        state.errors += is_error
        watched.requests += 1
        watched.errors += is_error
        state.cancelled += is_cancelled
        state.output_tokens += tokens
        state.unverified += unverified
        state.target_passes += passes
        state.tier = tier or state.tier
        for metric, value in values.items():
            state.values[metric].append(value)
            watched.means[metric].push(value)
        for limit in self.guards:
            if limit.quantile is not None:
                took = values.get(limit.metric)
                # Who has left after the limit, or got an error, would have waited longer yet.
                if took is not None or waited.get(limit.metric, 0.0) >= limit.value:
                    watched.judged[limit][0] += took is None or took >= limit.value
                    watched.judged[limit][1] += 1
        if self._shadow is not None:
            self._pair(pair, unit, record)
        else:
            self._compare(arm, unit, without, values, is_error)

    def _compare(
        self, arm: str, unit: str, without: Collection[str], values: Mapping[str, float], is_error: bool
    ) -> None:
        has_counted = False
        for name, rivalry in self._rivalries.items():
            # While a rival is out of service all are in the first arm: by no chance, and later than the rival's.
            if arm not in (self.first, name) or name in without or unit in rivalry.seen:
                continue
            has_counted, is_b = True, arm == name
            rivalry.seen.add(unit)
            rivalry.units[is_b] += 1
            rivalry.errors[is_b] += is_error
            share = self._shares[name] / (self._shares[name] + self._shares[self.first])
            for metric, value in values.items():
                rivalry.differences[metric].push(is_b, share, value)
        self.skipped += not has_counted

    def _pair(self, pair: str, unit: str, record: Mapping[str, Any]) -> None:
        """An answer and its copy's."""
        if not pair:
            return
        other = self._half_pairs.pop(pair, None)
        if other is None:
            self._half_pairs[pair] = record
            return
        a, b = (other, record) if record["is_shadow"] else (record, other)
        rivalry = self._rivalries[b["arm"]]
        if unit in rivalry.seen:
            self.skipped += 1
            return
        rivalry.seen.add(unit)
        for place, each in enumerate((a, b)):
            rivalry.units[place] += 1
            rivalry.errors[place] += bool(each["error"])
        if a["error"] or b["error"] or "cancelled" in (a["finish_reason"], b["finish_reason"]):
            return
        rivalry.num_pairs += 1
        rivalry.num_different += a["text_sha"] != b["text_sha"]
        of_a, of_b = _values(a), _values(b)
        for metric in of_a.keys() & of_b.keys():
            rivalry.pairs[metric].push(of_b[metric] - of_a[metric])

    def _check(self, limit: Limit, arm: str) -> str | None:
        state, alpha = self.arms[arm], ALPHA / len(self.guards)
        watched = state.watched
        if limit.name == "divergence":
            audited = (state.audited or 0) - watched.audited
            if audited < MIN_AUDITED:
                return None
            return _broken(
                limit, state.mismatches - watched.mismatches, audited, limit.value, alpha, "audited tokens differ"
            )
        if limit.name == "text_difference":
            pairs, different = self.pairs(arm) if arm in self._rivalries else (0, 0)
            different, pairs = different - watched.different, pairs - watched.pairs
            return _broken(limit, different, pairs, limit.value, alpha, "pairs differ")
        if limit.name == "error_rate":
            return _broken(limit, watched.errors, watched.requests, limit.value, alpha, "requests failed")
        if limit.quantile is not None:
            above, known = watched.judged[limit]
            return _broken(limit, above, known, 1 - limit.quantile, alpha, "requests took as long")
        interval = watched.means[limit.metric].interval(alpha)
        if interval is None or interval.low < limit.value + ROUNDING:
            return None
        return f"{limit}: it is {interval.estimate * 1e3:.0f} ms"


def guard_names() -> tuple[str, ...]:
    """Names of latencies that a log of outcomes has."""
    return tuple(name for name in LATENCIES if name.partition("_")[0] in METRICS)


def quantile(values: Sequence[float], q: float) -> float | None:
    """A quantile of values; None where there are none."""
    return float(np.quantile(values, q)) if len(values) else None


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of an answer; nothing of one that failed or was left."""
    if record["error"] or record["finish_reason"] == "cancelled" or record["ttft_s"] is None:
        return {}
    ttft, e2e, tokens = float(record["ttft_s"]), float(record["e2e_s"]), int(record["output_tokens"])
    found = {"ttft": ttft, "e2e": e2e}
    later = tokens - int(record["first_tokens"])
    if later > 0:
        found["tpot"] = (e2e - ttft) / later
    if tokens:
        found["passes"] = int(record["target_passes"]) / tokens
    if not all(map(math.isfinite, found.values())):
        raise ValueError("a time is not finite")
    return found


def _waited(record: Mapping[str, Any]) -> dict[str, float]:
    """What times of a request that failed, or was left, would have been at least."""
    if not record["error"] and record["finish_reason"] != "cancelled":
        return {}
    waited = float(record["e2e_s"])
    return {"e2e": waited} if record["ttft_s"] is not None else {"e2e": waited, "ttft": waited}


def _broken(limit: Limit, events: int, trials: int, share: float, alpha: float, what: str) -> str | None:
    """Says that certainly more than a share of the trials are events, at any time; None where it is not certain."""
    interval = bernoulli_interval(events, trials, alpha=alpha)
    return f"{limit}: {events} of {trials} {what}" if trials and interval.low > share + ROUNDING else None
