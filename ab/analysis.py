"""The document of a run: from its settings and samples to figures, comparisons and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ssv.ab.arms import Arm, Price
from ssv.ab.limits import parse_limits
from ssv.ab.measures import (
    MIN_BEYOND,
    MIN_BLOCKS,
    Difference,
    Figures,
    QualityFinding,
    by_arm,
    differences,
    examples,
    figures,
    identical_share,
    quality,
)
from ssv.ab.recommendation import Rival, recommend
from ssv.ab.samples import Sample
from ssv.ab.statistics import Quality, simultaneous_level

SCHEMA_VERSION = 1

CONFIDENCE = 0.95
"""Of all intervals of one kind together: each is as much wider as there are more of them (Bonferroni)."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What was fixed before the run; run.json holds it.

    Attributes:
        arms: the first is the one that the others are compared with.
        slo: as written; "" for none.
        margin: by which quality may be lower; None if it is not judged.
        cost_per_correct: whether it is asked for.
        volume: output tokens a month, for what is saved.
    """

    arms: tuple[Arm, ...]
    prompts: str
    prompts_sha256: str
    num_prompts: int
    num_answers: int
    concurrency: tuple[int, ...]
    blocks_of: int | None
    max_tokens: int
    temperature: float
    seed: int
    timeout: float
    price_per_hour: float | None
    gpus: float
    utilisation: float
    slo: str
    margin: float | None
    cost_per_correct: bool
    volume: float = 1e9

    def temperature_of(self, arm: Arm) -> float | str:
        """What an arm is asked at; "default" for what its server takes."""
        return self.temperature if arm.temperature is None else arm.temperature

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> RunSettings:
        """Raises TypeError: not the settings of a run."""
        arms = tuple(Arm(**arm) for arm in given["arms"])
        return cls(**{**given, "arms": arms, "concurrency": tuple(given["concurrency"])})


def analyse(
    settings: RunSettings, samples: Sequence[Sample], disclosures: Mapping[str, Any], *, status: str
) -> dict[str, Any]:
    """What report.json holds, but for where it was measured.

    Args:
        disclosures: by arm, what its server says of its tiers.
        status: "complete", or how the run ended before.
    """
    found = by_arm(samples)
    slo = parse_limits(settings.slo) if settings.slo else ()
    prices = {
        arm.name: arm.price(per_hour=settings.price_per_hour, gpus=settings.gpus, utilisation=settings.utilisation)
        for arm in settings.arms
    }
    rows = [
        figures(
            found[arm.name][concurrency],
            price=prices[arm.name],
            slo=slo,
            count_correct=settings.cost_per_correct,
        )
        for concurrency in settings.concurrency
        for arm in settings.arms
        if concurrency in found.get(arm.name, {})
    ]
    rivals = len(settings.arms) - 1
    levels = {
        "differences": simultaneous_level(CONFIDENCE, rivals * len(settings.concurrency)),
        "quality": simultaneous_level(CONFIDENCE, rivals),
    }
    compared = [_compared(settings, arm, found, prices, levels) for arm in settings.arms[1:] if arm.name in found]
    comparisons, contenders = [comparison for comparison, _ in compared], [rival for _, rival in compared]
    has_prices = None not in prices.values()
    advice = recommend(settings.arms[0].name, contenders, rows, volume=settings.volume, has_prices=has_prices)
    return {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "recommendation": advice,
        "settings": settings.to_dict(),
        "arms": [_disclosed(arm, rows, disclosures.get(arm.name)) for arm in settings.arms],
        "figures": [asdict(row) for row in rows],
        "levels": levels,
        "comparisons": comparisons,
        "notes": _notes(settings, rows, comparisons, prices),
    }


def _compared(
    settings: RunSettings,
    arm: Arm,
    found: Mapping[str, Mapping[int, list[Sample]]],
    prices: Mapping[str, Price | None],
    levels: Mapping[str, float],
) -> tuple[dict[str, Any], Rival]:  # fmt: skip
    """An arm against the first."""
    a, b = settings.arms[0].name, arm.name
    of_a, of_b = found.get(a, {}), found[b]
    price_a, price_b = (prices[a], prices[b]) if prices[a] is not None and prices[b] is not None else (None, None)
    each = {
        concurrency: differences(
            of_a[concurrency], of_b[concurrency], price_a, price_b, level=levels["differences"], seed=settings.seed
        )
        for concurrency in settings.concurrency
        if concurrency in of_a and concurrency in of_b
    }
    all_a, all_b = ([sample for samples in side.values() for sample in samples] for side in (of_a, of_b))
    is_greedy = settings.temperature_of(settings.arms[0]) == settings.temperature_of(arm) == 0
    share = identical_share(all_a, all_b) if is_greedy else None
    failed_a, failed_b = (sum(bool(sample.error) for sample in side) for side in (all_a, all_b))
    judged = quality(all_a, all_b, margin=settings.margin, level=levels["quality"]) if settings.margin else None
    # That a lossless arm gives the same text is no matter of chance, and of how many prompts were asked.
    is_same = share == 1.0 and failed_a == failed_b == 0 and all(sample.lossless for sample in all_b)
    if is_same and judged is not None:
        judged = replace(judged, verdict=Quality.SAME)
    costs = {c: d for c, found_at in each.items() for d in found_at if d.metric == "cost"}
    rival = Rival(b, costs, judged, is_same, failed_b / len(all_b), failed_a / len(all_a) if all_a else 0.0)
    comparison = {
        "arm": b,
        "against": a,
        "outcome": rival.outcome,
        "differences": {str(c): [asdict(d) for d in ds] for c, ds in each.items()},
        "quality": asdict(judged) if judged is not None else None,
        "identical_share": share,
        "examples": examples(all_a, all_b),
        "verdict": verdict(a, b, each, judged, failed_b, len(all_b), is_same=is_same),
    }
    return comparison, rival


def verdict(
    a: str,
    b: str,
    each: Mapping[int, Sequence[Difference]],
    judged: QualityFinding | None,
    failed: int,
    requests: int,
    *,
    is_same: bool = False,
) -> str:
    """The comparison in one sentence.

    Args:
        is_same: whether b is lossless and all its answers are the texts of a.
    """
    costs = [(c, next((d for d in ds if d.metric == "cost"), None)) for c, ds in each.items()]
    parts = [f"{cost_in_words(d)} at concurrency {c}" for c, d in costs if d is not None]
    text = f"{b} against {a}: {', '.join(parts) or 'cost was not measured'}; "
    if is_same:
        text += f"quality is the same: {b} is lossless, and all its answers are the same texts"
    elif judged is None:
        text += "quality was not judged"
    else:
        margin = f"(margin {100 * judged.margin:g} points, {judged.prompts} prompts)"
        words = {
            Quality.SAME: "quality is the same",
            Quality.NON_INFERIOR: "quality is non-inferior",
            Quality.INFERIOR: "quality is inferior",
            Quality.UNDECIDED: "quality is undecided",
        }
        text += f"{words[judged.verdict]} {margin}"
    return text + (f"; {failed} of its {requests} requests failed" if failed else "")


def cost_in_words(difference: Difference) -> str:
    """Whether an arm is cheaper, as far as its interval says."""
    estimate, interval = difference.estimate, difference.interval
    if interval is None:
        return f"cost undecided ({estimate:+.1%}, too few blocks for an interval)"
    if not interval.excludes(0.0):
        return f"no difference in cost found ({estimate:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}])"
    if interval.high < 0:
        return f"cheaper by {-estimate:.1%} [{-interval.high:.1%}, {-interval.low:.1%}]"
    return f"dearer by {estimate:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _disclosed(arm: Arm, rows: Sequence[Figures], disclosure: Mapping[str, Any] | None) -> dict[str, Any]:
    """An arm, the tiers that it answered with, and what the server says of them."""
    used = sorted({tier for row in rows if row.arm == arm.name for tier in row.tiers})
    lossless = [row.lossless for row in rows if row.arm == arm.name and row.lossless is not None]
    known = disclosure or {}
    return {
        **{key: value for key, value in asdict(arm).items() if value is not None},
        "tiers_used": used,
        "lossless": all(lossless) if lossless else None,
        "bundle": known.get("bundle"),
        "confidence": known.get("confidence"),
        "tiers": {tier: known["tiers"][tier] for tier in used if tier in known.get("tiers", {})},
    }


def _notes(
    settings: RunSettings,
    rows: Sequence[Figures],
    comparisons: Sequence[Mapping[str, Any]],
    prices: Mapping[str, Price | None],
) -> list[str]:
    """What a reader has to know before relying on the figures."""
    notes = []
    failed = {arm.name: sum(row.failed for row in rows if row.arm == arm.name) for arm in settings.arms}
    if any(failed.values()):
        notes.append(
            "Requests that failed count in cost and SLO, not in latencies, and as wrong answers: "
            + ", ".join(f"{arm} {count}" for arm, count in failed.items() if count)
            + "."
        )
    if unanswered := {row.arm: row.unanswered for row in rows if row.unanswered}:
        notes.append(
            f"Of {', '.join(unanswered)}, {sum(row.unanswered for row in rows)} responses ended within their "
            "reasoning, without an answer, and are wrong answers: give more --max-tokens."
        )
    if other := {arm.name: settings.temperature_of(arm) for arm in settings.arms if arm.temperature is not None}:
        notes.append(
            "Asked at another temperature than the rest: "
            + ", ".join(f"{name} at {value}" for name, value in other.items())
            + "."
        )
    blocks = {(row.arm, row.concurrency): row.blocks for row in rows}
    if any(count < MIN_BLOCKS for count in blocks.values()):
        notes.append(
            f"Fewer than {MIN_BLOCKS} blocks at a concurrency: no intervals there. More prompts make more blocks."
        )
    elif any(d["interval"] is None for c in comparisons for ds in c["differences"].values() for d in ds):
        notes.append(
            f"A percentile has an interval where {MIN_BEYOND} requests of each arm lie beyond it: "
            "p95 of 100 requests, p99 of 500."
        )
    if cached := {f"{row.arm} {row.cached_share:.0%}" for row in rows if row.cached_share > 0.05}:
        notes.append(
            "Servers had part of the prompts in their cache, from the turns before; times to the first token would be "
            f"longer on fresh prompts ({', '.join(sorted(cached))} of the prompts' tokens)."
        )
    if thin := sorted({row.concurrency for row in rows if row.in_flight < 0.75 * row.concurrency}):
        notes.append(
            f"At concurrency {', '.join(map(str, thin))} fewer requests ran side by side than that on average, "
            "as blocks end one by one: give --blocks-of a multiple of it."
        )
    if any(row.requests < 200 for row in rows):
        notes.append("A p99 of fewer than 200 requests is little more than the slowest one.")
    if any(arm.is_openai for arm in settings.arms) and not all(arm.is_openai for arm in settings.arms):
        notes.append(
            "Tokens are as each endpoint counts them: with another tokenizer, cost per token is of other tokens."
        )
    if None in prices.values():
        free = ", ".join(arm for arm, price in prices.items() if price is None)
        notes.append(f"No price was given for {free}: differences in cost are of machine time per token there.")
    if settings.margin is None and settings.num_answers:
        notes.append("The prompts carry answers, but no margin was given: quality was not judged.")
    return notes
