"""Methods side by side: quality by task, speed, target passes and cost, as one document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ssv.ab.bench import mean_ratio, speedup_of
from ssv.ab.bench_ways import BASELINE, Way
from ssv.ab.evaluation.answers import Answers
from ssv.ab.evaluation.harness import SsvModel
from ssv.ab.evaluation.tasks import Task, TaskResult, run_task
from ssv.ab.measures import QualityFinding, compare_scores
from ssv.ab.statistics import Quality, prompts_needed_pairs, simultaneous_level
from ssv.runtime.counters import Counters
from ssv.runtime.methods import policy_for
from ssv.support.progress import Report

SCHEMA_VERSION = 1

CONFIDENCE = 0.95
"""Of all intervals of quality together."""

DISCORDANT, POWER = 0.10, 0.8
"""For how many documents a verdict takes, if one method alone is right on so many of them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A method in a task.

    Attributes:
        value: see `TaskResult`.
        verdict: against the baseline; None of the baseline, and where documents have no scores from 0 to 1.
        quality: what it rests on; None where there is no verdict.
        identical: share of the documents that were answered as the baseline does.
    """

    value: float | None
    verdict: Quality | None
    quality: QualityFinding | None
    identical: float


@dataclass(frozen=True, slots=True)
class Row:
    """A method. What is measured of generating texts is None where no task has any generated.

    Attributes:
        lossless: whether it gives the baseline's texts by construction.
        speedup: geometric mean, over groups of requests, of the ratio to the baseline's tokens per second.
        speedup_low, speedup_high: its 95 % interval; None of a single group.
        passes_per_token: target passes per output token, those of the prompts apart.
        passes_saved: share of the baseline's passes per token.
        unverified: share of the output that the target never judged.
        cost_per_1m_tokens: at the given price per hour; None without one.
        tasks: by name.
    """

    method: str
    precision: str
    lossless: bool
    tokens: int
    tokens_per_s: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    passes_per_token: float | None
    passes_saved: float | None
    unverified: float | None
    cost_per_1m_tokens: float | None
    tasks: Mapping[str, Cell]


def compare(
    ways: Sequence[Way],
    tasks: Sequence[Task],
    *,
    batch: int,
    num_draft_tokens: int,
    limit: int | None,
    num_fewshot: int | None,
    margin: float,
    price_per_hour: float | None,
    report: Report,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs every task with every way.

    Args:
        ways: the baseline first.
        margin: by which quality may be lower.

    Returns:
        The document but for where it was measured, and a line for each document of each task.

    Raises:
        RequestError: see `SsvModel`.
    """
    answers = Answers(ways, batch=batch, num_draft_tokens=num_draft_tokens, report=report)
    results: dict[str, dict[str, TaskResult]] = {}
    num_cut: dict[str, int] = {}
    for task in tasks:
        of_way: dict[str, TaskResult] = {}
        by_target: dict[int, TaskResult] = {}
        for way in ways:
            if not task.generates and id(way.llm) in by_target:
                of_way[way.name] = by_target[id(way.llm)]  # the method has no part in it
                continue
            model = SsvModel(way.llm, way.method, generate=partial(answers.of, way.name), report=report)
            result = run_task(task, model, limit=limit, num_fewshot=num_fewshot)
            of_way[way.name] = by_target[id(way.llm)] = result
            num_cut[task.name] = model.num_cut
        results[task.name] = of_way
    level = simultaneous_level(CONFIDENCE, max(1, (len(ways) - 1) * len(tasks)))
    rows = [
        _row(way, ways[0], tasks, results, answers, num_draft_tokens, margin, level, price_per_hour) for way in ways
    ]
    document = {
        "schema_version": SCHEMA_VERSION,
        "baseline": BASELINE,
        "margin": margin,
        "level": level,
        "tasks": [
            {
                "name": task.name,
                "metric": results[task.name][BASELINE].metric,
                "documents": len(results[task.name][BASELINE].responses),
                "generates": task.generates,
                "is_judged": bool(results[task.name][BASELINE].scores),
            }
            for task in tasks
        ],
        "rows": [asdict(row) for row in rows],
        "notes": _notes(tasks, results, num_cut, margin, level, limit),
    }
    return document, _samples(results)


def _row(
    way: Way,
    baseline: Way,
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, TaskResult]],
    answers: Answers,
    num_draft_tokens: int,
    margin: float,
    level: float,
    price_per_hour: float | None,
) -> Row:
    lossless = way.llm is baseline.llm and policy_for(way.method, way.llm.tiers, num_draft_tokens).lossless
    cells = {
        task.name: _cell(
            results[task.name][way.name],
            results[task.name][baseline.name],
            same_by_construction=way.llm is baseline.llm and (lossless or not task.generates),
            margin=margin,
            level=level,
            is_baseline=way is baseline,
        )
        for task in tasks
    }
    tally, base = answers.tallies[way.name], answers.tallies[baseline.name]
    if not tally.outputs[0]:
        return Row(way.name, way.llm.precision, lossless, 0, *(None,) * 8, tasks=cells)
    counters, of_base = (sum((o.counters for o in t.outputs[0]), Counters(requests=0)) for t in (tally, base))
    speed = sum(tally.tokens[0]) / sum(tally.seconds[0])
    interval = speedup_of(tally, base)
    passes, base_passes = (c.target_passes / c.emitted for c in (counters, of_base))
    return Row(
        method=way.name,
        precision=way.llm.precision,
        lossless=lossless,
        tokens=counters.emitted,
        tokens_per_s=speed,
        speedup=mean_ratio(tally.tokens, tally.seconds, base.tokens, base.seconds),
        speedup_low=None if interval is None else 1 + interval.low,
        speedup_high=None if interval is None else 1 + interval.high,
        passes_per_token=passes,
        passes_saved=1 - passes / base_passes if base_passes else None,
        unverified=counters.trusted / counters.emitted,
        cost_per_1m_tokens=None if price_per_hour is None else price_per_hour / (speed * 3600) * 1e6,
        tasks=cells,
    )


def _cell(
    result: TaskResult,
    of_baseline: TaskResult,
    *,
    same_by_construction: bool,
    margin: float,
    level: float,
    is_baseline: bool,
) -> Cell:
    responses = of_baseline.responses
    identical = sum(result.responses[key] == responses[key] for key in responses) / len(responses)
    quality = None if is_baseline else compare_scores(of_baseline.scores, result.scores, margin=margin, level=level)
    if quality is None:
        return Cell(result.value, None, None, identical)
    # That it is the same is no matter of chance then, nor of how many documents there are.
    verdict = Quality.SAME if same_by_construction and identical == 1.0 else quality.verdict
    return Cell(result.value, verdict, quality, identical)


def _notes(
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, TaskResult]],
    num_cut: Mapping[str, int],
    margin: float,
    level: float,
    limit: int | None,
) -> list[str]:
    """What a reader has to know of the figures."""
    notes = []
    needed = prompts_needed_pairs(margin, discordant=DISCORDANT, alpha=(1 - level) / 2, power=POWER)
    too_few: dict[int, list[str]] = {}
    for task in tasks:
        found = results[task.name][BASELINE]
        if not task.generates:
            notes.append(
                f"{task.name} asks for likelihoods: they are the target's, whatever method decodes. It tells "
                "precisions apart, not methods"
            )
        elif not found.scores:
            notes.append(f"{task.name} is not judged: its documents have no scores from 0 to 1 of which more is better")
        elif len(found.scores) < needed:
            too_few.setdefault(len(found.scores), []).append(task.name)
        if num_cut[task.name]:
            notes.append(
                f"{task.name}: {num_cut[task.name]} prompts are longer than fits, their beginning was left out"
            )
    notes += [
        f"documents of {' and of '.join(names)}: {count}. A margin of {100 * margin:g} points takes {needed} for a "
        f"power of {POWER:.0%}, if methods differ on {DISCORDANT:.0%} of them; a lossy method will probably stay "
        "undecided"
        for count, names in too_few.items()
    ]
    if limit is not None:
        notes.append(f"only the first {limit} documents of each task were asked (--limit)")
    if not any(task.generates for task in tasks):
        notes.append("no task has a text generated, so that nothing was timed")
    return notes


def _samples(results: Mapping[str, Mapping[str, TaskResult]]) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "document": key,
            "methods": {
                way: {"score": result.scores.get(key), "response": result.responses[key]}
                for way, result in of_way.items()
            },
        }
        for name, of_way in results.items()
        for key in next(iter(of_way.values())).responses
    ]
