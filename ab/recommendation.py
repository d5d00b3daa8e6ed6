"""What to do after a comparison, in one sentence: which arm to use, and what that saves a month."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ssv.ab.measures import Difference, Figures, QualityFinding
from ssv.ab.statistics import Interval, Quality


class Outcome(StrEnum):
    """Whether an arm is to be used instead of the first one: `yes` where it is cheaper, as good, and fails no more
    often; `no` where one of these certainly is not so; else it is open.
    """

    YES = "yes"
    NO = "no"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Rival:
    """An arm that was compared with the first.

    Attributes:
        costs: difference in cost by concurrency.
        quality: None if it was not judged.
        failed_share, failed_share_first: of the requests, its own and the first arm's.
    """

    name: str
    costs: Mapping[int, Difference]
    quality: QualityFinding | None
    is_same: bool
    failed_share: float
    failed_share_first: float

    @property
    def outcome(self) -> Outcome:
        """Whether it is to be used: not with a fault, and open with a doubt."""
        return Outcome.YES if not self.doubts and not self.faults else Outcome.NO if self.faults else Outcome.OPEN

    @property
    def faults(self) -> list[str]:
        """What certainly speaks against it."""
        found = []
        if self.failed_share > self.failed_share_first:
            found.append(f"{self.failed_share:.1%} of its requests failed")
        if self.quality is not None and self.quality.verdict == Quality.INFERIOR:
            found.append("it answers worse")
        if any(interval.low > 0 for interval in self._certain()):
            found.append("it is dearer")
        return found

    @property
    def doubts(self) -> list[str]:
        """What is not known, or no gain."""
        found = []
        if not any(interval.high < 0 for interval in self._certain()):
            found.append("it was not found to be cheaper")
        if not self.is_same and self.quality is None:
            found.append("its quality was not judged")
        elif self.quality is not None and self.quality.verdict == Quality.UNDECIDED:
            found.append("whether it answers as well is undecided")
        return found

    def _certain(self) -> list[Interval]:
        return [d.interval for d in self.costs.values() if d.interval is not None and d.interval.excludes(0.0)]


def recommend(first: str, rivals: Sequence[Rival], rows: Sequence[Figures], *, volume: float, has_prices: bool) -> str:
    """The sentence.

    Args:
        rows: figures of all arms.
        volume: output tokens a month.
        has_prices: whether costs are money, and not time.
    """
    good = sorted(
        (rival for rival in rivals if rival.outcome is Outcome.YES),
        key=lambda r: sum(d.estimate for d in r.costs.values()),
    )
    costs = {(row.arm, row.concurrency): row.cost_per_1m_tokens for row in rows} if has_prices else {}
    if good:
        how = "its answers are the same texts" if good[0].is_same else "it answers as well, within the margin"
        return f"Use {good[0].name} instead of {first}: {_saving(first, good[0], costs, volume)}; {how}."
    if not rivals:
        return f"Nothing can be said yet: no arm was measured beside {first}."
    open_ones = [rival for rival in rivals if rival.outcome is Outcome.OPEN]
    cheaper = [r for r in open_ones if not any(doubt.endswith("cheaper") for doubt in r.doubts)]
    if cheaper:
        best = min(cheaper, key=lambda r: sum(d.estimate for d in r.costs.values()))
        cure = (
            "give more prompts with answers"
            if best.quality is not None
            else "give prompts with answers, and a --margin"
        )
        return (
            f"Stay with {first} for now: {best.name} would be cheaper ({_saving(first, best, costs, volume)}), but "
            f"{' and '.join(best.doubts)}: {cure}."
        )
    why = "; ".join(f"{rival.name}: {', '.join(rival.faults or rival.doubts)}" for rival in rivals)
    return f"Stay with {first}: no arm was found that is cheaper and as good ({why})."


def _saving(first: str, rival: Rival, costs: Mapping[tuple[str, int], float | None], volume: float) -> str:
    """At each concurrency where a difference was found."""
    parts = []
    for concurrency, difference in rival.costs.items():
        interval = difference.interval
        if interval is None or not interval.excludes(0.0):
            parts.append(f"no difference found at concurrency {concurrency}")
            continue
        before = costs.get((first, concurrency))
        if before is None:
            parts.append(f"{-difference.estimate:.1%} less machine time at concurrency {concurrency}")
            continue
        month = before * volume / 1e6
        low, high = sorted((-interval.high * month, -interval.low * month))
        parts.append(
            f"it saves {money(-difference.estimate * month)} of {money(month)} a month [{money(low)}, {money(high)}] "
            f"at concurrency {concurrency}"
        )
    text = ", ".join(parts)
    return f"at {volume / 1e6:,.0f} million output tokens a month {text}" if any(costs.values()) else text


def money(amount: float) -> str:
    """An amount in the unit of the prices, as it is shown."""
    return f"{amount:,.0f}" if abs(amount) >= 100 else f"{amount:,.2f}"
