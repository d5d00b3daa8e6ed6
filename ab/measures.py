"""From samples to what a report says: figures of each arm, and differences between arms with their intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ssv.ab.arms import Price
from ssv.ab.limits import METRICS, STATISTICS, Limit
from ssv.ab.samples import Sample
from ssv.ab.scoring import without_thinking
from ssv.ab.statistics import (
    Interval,
    Quality,
    bootstrap,
    judge,
    mcnemar,
    paired_proportions,
    paired_scores,
    ratio_interval,
    relative_quantile,
)

MIN_BLOCKS = 6
"""With fewer, a bootstrap's interval means nothing."""

MIN_BEYOND = 5
"""Requests that must lie beyond a quantile before it has an interval: a p95 takes 100 of them, a p99 500."""

MAX_EXAMPLES = 5
MAX_EXAMPLE = 400
"""Characters of an answer that is shown as an example."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one arm at one concurrency.

    Attributes:
        blocks: of prompts that ran together.
        requests, failed: how many, and how many of them failed.
        seconds: in which the arm had something to do.
        in_flight: requests at the same time, on average.
        tokens_per_s: output tokens of all requests together, per second.
        latency: seconds by metric and statistic, as in `ssv.ab.limits`; without those that nobody could measure.
        good_share: of the requests, those that met every limit of the SLO; `goodput`: of them per second. None without
            an SLO.
        meets: by limit, whether the arm as a whole does.
        target_passes_per_token, unverified_share, acceptance_rate: None where the endpoint does not say.
        cached_share: of the prompts' tokens, those that the server had computed before.
        reasoning_share: of the output tokens; `unanswered`: responses that ended within their reasoning, so that there
            is no answer.
        score: mean of the answers' scores; None if none can be checked.
        cost_per_1m_tokens, cost_per_correct: None without a price, and answers.
        tiers, lossless: what the responses said; `lossless` None if they did not.
    """

    arm: str
    concurrency: int
    blocks: int
    requests: int
    failed: int
    output_tokens: int
    seconds: float
    in_flight: float
    tokens_per_s: float
    latency: dict[str, dict[str, float]]
    good_share: float | None
    goodput: float | None
    meets: dict[str, bool]
    target_passes_per_token: float | None
    unverified_share: float | None
    acceptance_rate: float | None
    cached_share: float
    reasoning_share: float
    unanswered: int
    score: float | None
    cost_per_1m_tokens: float | None
    cost_per_correct: float | None
    tiers: tuple[str, ...]
    lossless: bool | None


def figures(
    samples: Sequence[Sample], *, price: Price | None, slo: Sequence[Limit], count_correct: bool = False
) -> Figures:
    """The figures of one arm at one concurrency.

    Args:
        samples: of one arm at one concurrency; at least one.
        count_correct: whether the cost of a correct answer is wanted.
    """
    fine = [sample for sample in samples if not sample.error]
    seconds = sum(busy_s(turn) for turn in turns_of(samples).values())
    tokens = sum(sample.output_tokens for sample in fine)
    latency = _latencies(fine)
    good = sum(_is_good(sample, slo) for sample in samples) if slo else None
    scores = [sample.score for sample in samples if sample.score is not None]
    cost = _cost(price, seconds, tokens) if price is not None else None
    correct = sum(scores)
    return Figures(
        arm=samples[0].arm,
        concurrency=samples[0].concurrency,
        blocks=len({sample.block for sample in samples}),
        requests=len(samples),
        failed=len(samples) - len(fine),
        output_tokens=tokens,
        seconds=seconds,
        in_flight=sum(sample.e2e_s for sample in samples) / seconds if seconds else 0.0,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        latency=latency,
        good_share=good / len(samples) if good is not None else None,
        goodput=good / seconds if good is not None and seconds else None,
        meets={str(limit): latency.get(limit.metric, {}).get(limit.statistic, math.inf) < limit.value for limit in slo},
        target_passes_per_token=_share(fine, lambda s: s.target_passes, lambda s: s.output_tokens),
        unverified_share=_share(fine, lambda s: s.unverified, lambda s: s.output_tokens),
        acceptance_rate=_share(fine, lambda s: s.accepted, lambda s: s.judged or 0),
        cached_share=_share(fine, lambda s: s.cached_tokens, lambda s: s.prompt_tokens) or 0.0,
        reasoning_share=_share(fine, lambda s: s.reasoning_tokens, lambda s: s.output_tokens) or 0.0,
        unanswered=sum(sample.reasoning_tokens > 0 and not without_thinking(sample.text).strip() for sample in fine),
        score=correct / len(scores) if scores else None,
        cost_per_1m_tokens=cost / tokens * 1e6 if cost is not None and tokens else None,
        cost_per_correct=cost / correct if count_correct and cost is not None and correct else None,
        tiers=tuple(sorted({sample.tier for sample in fine if sample.tier})),
        lossless=all(sample.lossless for sample in fine) if fine and fine[0].lossless is not None else None,
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more an arm has of something than arm A, relatively: -0.3 is 30 % less.

    Attributes:
        interval: None where there are too few blocks for one.
    """

    metric: str
    estimate: float
    interval: Interval | None


DIFFERENCES = ("cost", "ttft_p50", "ttft_p95", "tpot_mean", "e2e_p50", "e2e_p95", "e2e_p99", "target_passes")


def differences(
    a: Sequence[Sample],
    b: Sequence[Sample],
    price_a: Price | None,
    price_b: Price | None,
    *,
    level: float,
    seed: int = 0,
) -> list[Difference]:
    """Differences between two arms at one concurrency, over the blocks that both have been through.

    Requests of a block ran together, and have had the same machine: blocks are what is drawn, not requests.

    Args:
        price_a, price_b: None for the same price of the time; then cost is time.
    """
    common = sorted(_complete(a) & _complete(b))
    place = {block: number for number, block in enumerate(common)}
    sides = [[sample for sample in samples if sample.block in place] for samples in (a, b)]
    if not common:
        return []
    found = []
    for metric in DIFFERENCES:
        if metric in ("cost", "tpot_mean", "target_passes"):
            difference = _ratio(metric, sides, (price_a, price_b), place, level)
        else:
            difference = _quantile(metric, sides, place, level, seed)
        if difference is not None:
            found.append(difference)
    return found


class Kind(StrEnum):
    """How answers were compared."""

    RIGHT_OR_WRONG = "right or wrong"
    SCORES = "scores"


@dataclass(frozen=True, slots=True)
class QualityFinding:
    """Whether an arm answers as well as arm A.

    Attributes:
        prompts: compared.
        score_a, score_b: mean over prompts.
        interval: of b - a.
        only_a, only_b: prompts that only one of them answered right, and McNemar's exact p; None for scores.
    """

    kind: Kind
    prompts: int
    score_a: float
    score_b: float
    interval: Interval
    margin: float
    verdict: Quality
    only_a: int | None
    only_b: int | None
    mcnemar_p: float | None


def quality(a: Sequence[Sample], b: Sequence[Sample], *, margin: float, level: float) -> QualityFinding | None:
    """Non-inferiority of b over all prompts that both were asked; None if none has an answer that can be checked, or
    one alone a score.

    Args:
        a, b: at all concurrencies. The scores of a prompt's samples are averaged first: they are not independent.
    """
    return compare_scores(_score_by_prompt(a), _score_by_prompt(b), margin=margin, level=level)


def compare_scores(
    scores_a: Mapping[str, float], scores_b: Mapping[str, float], *, margin: float, level: float
) -> QualityFinding | None:
    """Non-inferiority of b over the prompts that both have a score of; None without any, or with one alone that is not
    right or wrong.

    Args:
        scores_a, scores_b: from 0 to 1, by prompt.
    """
    common = sorted(scores_a.keys() & scores_b.keys())
    if not common:
        return None
    of_a, of_b = (np.array([scores[prompt] for prompt in common]) for scores in (scores_a, scores_b))
    both = np.concatenate([of_a, of_b])
    only_a = only_b = p = None
    if np.isin(both, (0.0, 1.0)).all():
        only_a, only_b = int((of_a > of_b).sum()), int((of_b > of_a).sum())
        both_right, neither = int((of_a * of_b).sum()), int(((1 - of_a) * (1 - of_b)).sum())
        interval, kind = paired_proportions(both_right, only_a, only_b, neither, level=level), Kind.RIGHT_OR_WRONG
        p = mcnemar(only_a, only_b)
    elif len(common) < 2:
        return None
    else:
        interval, kind = paired_scores(of_b - of_a, level=level, bound=1.0), Kind.SCORES
    return QualityFinding(
        kind, len(common), float(of_a.mean()), float(of_b.mean()), interval, margin,
        judge(interval, margin), only_a, only_b, p,
    )  # fmt: skip


def identical_share(a: Sequence[Sample], b: Sequence[Sample]) -> float | None:
    """Share of the pairs (same prompt, seed and concurrency) whose texts are the same; None without pairs."""
    texts = {_pair(sample): _texts(sample) for sample in a if not sample.error}
    same = [texts[_pair(sample)] == _texts(sample) for sample in b if not sample.error and _pair(sample) in texts]
    return sum(same) / len(same) if same else None


def examples(
    a: Sequence[Sample], b: Sequence[Sample], *, most: int = MAX_EXAMPLES, length: int = MAX_EXAMPLE
) -> list[dict[str, object]]:
    """Some answers to the same prompt with the same seed that differ, first those of which one alone is right.

    Args:
        length: characters of an answer, at most. Of longer ones it is the place where they part that is shown.
    """
    answers = {_pair(sample): sample for sample in a if not sample.error}
    pairs = [(answers[_pair(s)], s) for s in b if not s.error and _pair(s) in answers]
    different = {mine.prompt: (mine, theirs) for mine, theirs in reversed(pairs) if _texts(mine) != _texts(theirs)}
    chosen = sorted(different.values(), key=lambda pair: (pair[0].score == pair[1].score, pair[0].prompt))[:most]
    found: list[dict[str, object]] = []
    for mine, theirs in chosen:
        # Where the answers are the same it was the reasoning that was not.
        kind = "text" if mine.text != theirs.text else "reasoning"
        of_a, of_b = _excerpts(getattr(mine, kind), getattr(theirs, kind), length)
        found.append({"prompt": mine.prompt, "a": of_a, "b": of_b, "score_a": mine.score, "score_b": theirs.score})
    return found


def _excerpts(a: str, b: str, length: int) -> tuple[str, str]:
    """The characters about where two texts part, with an ellipsis where something was left out."""
    parting = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    common = next(parting, min(len(a), len(b)))
    start = 0 if common < length // 2 else common - length // 4
    return _excerpt(a, start, length), _excerpt(b, start, length)


def _excerpt(text: str, start: int, length: int) -> str:
    before = "…" if start else ""
    rest = text[start:]
    room = length - len(before)
    return before + (rest if len(rest) <= room else rest[: room - 1] + "…")


def by_arm(samples: Iterable[Sample]) -> dict[str, dict[int, list[Sample]]]:
    """Samples by arm and concurrency."""
    found: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        found[sample.arm][sample.concurrency].append(sample)
    return {arm: dict(each) for arm, each in found.items()}


def _texts(sample: Sample) -> tuple[str, str]:
    return sample.reasoning, sample.text


def _pair(sample: Sample) -> tuple[str, int, int]:
    return sample.prompt, sample.seed, sample.concurrency


def turns_of(samples: Sequence[Sample]) -> dict[tuple[int, int], list[Sample]]:
    """The samples of each block and repeat, which were asked one behind the other."""
    turns: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        turns[sample.block, sample.repeat].append(sample)
    return turns


def _complete(samples: Sequence[Sample]) -> set[int]:
    """Blocks that the arm has been through twice."""
    prompts: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for sample in samples:
        prompts[sample.block][sample.repeat].add(sample.prompt)
    return {block for block, repeats in prompts.items() if len(repeats) == 2 and repeats[0] == repeats[1]}


def busy_s(turn: Sequence[Sample]) -> float:
    """Seconds in which an arm had something to do in a turn."""
    return max(sample.end_s for sample in turn) - min(sample.start_s for sample in turn)


def _cost(price: Price, seconds: float, tokens: float) -> float:
    return price.per_second * seconds + price.per_token * tokens


def _share(
    samples: Sequence[Sample], part: Callable[[Sample], int | None], whole: Callable[[Sample], int]
) -> float | None:
    known = [(found, whole(sample)) for sample in samples if (found := part(sample)) is not None]
    total = sum(count for _, count in known)
    return sum(found for found, _ in known) / total if total else None


def _values(metric: str, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Values of a latency and the sample that each is of."""
    pairs: list[tuple[float, int]] = []
    for number, sample in enumerate(samples):
        if metric == "itl":
            # A response of several tokens: they have come together, each after its share of the wait.
            pairs.extend((seconds / tokens, number) for seconds, tokens in sample.gaps for _ in range(tokens))
            continue
        value = {"ttft": sample.ttft_s, "ttfo": sample.ttfo_s, "tpot": sample.tpot_s, "e2e": sample.e2e_s}[metric]
        if value is not None:
            pairs.append((value, number))
    return np.array([value for value, _ in pairs]), np.array([number for _, number in pairs], dtype=np.int64)


def _latencies(samples: Sequence[Sample], metrics: Iterable[str] = METRICS) -> dict[str, dict[str, float]]:
    found = {}
    for metric in metrics:
        values, _ = _values(metric, samples)
        if len(values):
            quantiles = {name: float(np.quantile(values, int(name[1:]) / 100)) for name in STATISTICS if name != "mean"}
            found[metric] = {"mean": float(values.mean()), **quantiles}
    return found


def _is_good(sample: Sample, slo: Sequence[Limit]) -> bool:
    """Whether a request by itself meets the limits: its own time to the first token, its own mean or quantile between
    tokens.
    """
    if sample.error:
        return False
    own = _latencies([sample], {limit.metric for limit in slo})
    return all(own.get(limit.metric, {}).get(limit.statistic, 0.0) < limit.value for limit in slo)


def _ratio(
    metric: str,
    sides: Sequence[Sequence[Sample]],
    prices: Sequence[Price | None],
    place: Mapping[int, int],
    level: float,
) -> Difference | None:
    """The difference in something per token; None if it was not measured."""
    parts: list[np.ndarray] = []
    for samples, price in zip(sides, prices, strict=True):
        num, den = np.zeros(len(place)), np.zeros(len(place))
        for (block, _), turn in turns_of(samples).items():
            fine = [sample for sample in turn if not sample.error]
            tokens = sum(sample.output_tokens for sample in fine)
            if metric == "cost":
                num[place[block]] += _cost(price or Price(per_second=1.0), busy_s(turn), tokens)
                den[place[block]] += tokens
            elif metric == "tpot_mean":
                num[place[block]] += sum(seconds for sample in fine for seconds, _ in sample.gaps)
                den[place[block]] += sum(count for sample in fine for _, count in sample.gaps)
            elif all(sample.target_passes is not None for sample in fine):
                num[place[block]] += sum(sample.target_passes or 0 for sample in fine)
                den[place[block]] += tokens
        if not (num.any() and den.any()):
            return None
        parts += [num, den]
    num_a, den_a, num_b, den_b = parts
    estimate = float((num_b.sum() / den_b.sum()) / (num_a.sum() / den_a.sum()) - 1)
    # A block in which nothing was answered can be all that an arm has: then there is no interval.
    has_interval = len(place) >= MIN_BLOCKS and all(np.count_nonzero(part) > 1 for part in parts)
    return Difference(metric, estimate, ratio_interval(*parts, level=level) if has_interval else None)


def _quantile(
    metric: str, sides: Sequence[Sequence[Sample]], place: Mapping[int, int], level: float, seed: int
) -> Difference | None:
    """The difference in a quantile of a latency; None if it was not measured."""
    name, _, which = metric.partition("_")
    values_and_blocks: list[np.ndarray] = []
    for samples in sides:
        fine = [sample for sample in samples if not sample.error]
        values, owners = _values(name, fine)
        if not len(values):
            return None
        values_and_blocks += [values, np.array([place[fine[owner].block] for owner in owners])]
    values_a, blocks_a, values_b, blocks_b = values_and_blocks
    statistic = relative_quantile(values_a, blocks_a, values_b, blocks_b, int(which[1:]) / 100)
    estimate = float(statistic(np.ones((1, len(place)), dtype=np.int64))[0])
    # Most draws must have something of both arms; and what no request lies beyond cannot be known.
    quantile = int(which[1:]) / 100
    beyond = min(quantile, 1 - quantile) * min(len(values_a), len(values_b))
    enough = len(place) >= MIN_BLOCKS and min(len(set(blocks_a)), len(set(blocks_b))) >= MIN_BLOCKS
    has_interval = enough and beyond >= MIN_BEYOND - 1e-6
    draws = max(4000, round(200 / (1 - level)))  # a hundred in each tail
    return Difference(
        metric,
        estimate,
        bootstrap(statistic, len(place), level=level, seed=seed, num_draws=draws) if has_interval else None,
    )


def _score_by_prompt(samples: Sequence[Sample]) -> dict[str, float]:
    scores: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.score is not None:
            scores[sample.prompt].append(sample.score)
    return {prompt: sum(each) / len(each) for prompt, each in scores.items()}
