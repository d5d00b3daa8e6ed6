"""ssv-bench: compares ways to decode on a file of prompts.

Methods take turns on each group of prompts, in a rotating order, so that a machine whose speed drifts slows all of them
alike. So do rows of another precision, whose models are loaded beside the first ones, and rows with a cache of prompts,
in which each prompt has been met once before it is timed. All prompts are run again, in rounds, until the intervals of
the speed-ups are narrow. No time is discarded: where rounds disagree, that is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean, pstdev
from typing import TYPE_CHECKING, Any

from ssv.ab.bench_view import MethodRow, check_plot, plot, print_tables
from ssv.ab.bench_ways import (
    BASELINE,
    BESIDE,
    BESIDE_ALL,
    PROMPT_CACHE,
    Way,
    read_beside,
    read_methods,
    read_options,
    ways,
)
from ssv.runtime.counters import Counters
from ssv.runtime.methods import METHODS, check_num_draft_tokens
from ssv.runtime.request import Output, RequestError, SamplingParams
from ssv.support.console import (
    add_device,
    add_engine,
    add_max_rows,
    add_precision,
    add_threads,
    add_version,
    positive,
    run_command,
)
from ssv.support.environment import commit, machine, versions
from ssv.support.files import read_text
from ssv.support.progress import Report, terminal_report
from ssv.support.prompts import read_prompts

if TYPE_CHECKING:
    from ssv.ab.statistics import Interval
    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Audit

ALL = "all"


@dataclass(slots=True)
class Tally:
    """What a method did.

    Attributes:
        outputs: by round and prompt.
        seconds, tokens: by round and group of prompts.
        gaps: seconds between the pieces of an output, of all rounds.
    """

    outputs: list[list[Output]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssv-bench", description="Compare ways to decode: speed, work of the target, and what it costs in quality."
    )
    add_version(parser)
    parser.add_argument("--bundle", type=Path, required=True, help="what decodes")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a `prompt` each")
    parser.add_argument("--num-prompts", type=int, help="only the first so many (default: all)")
    parser.add_argument(
        "--methods",
        help=f"comma-separated, of: {', '.join(METHODS)}; `{ALL}` for the table of everything: all of them, and "
        "rows as of --also (default: all that the bundle has; medusa-typical only where something is sampled)",
    )
    parser.add_argument(
        "--also",
        metavar="LIST",
        help=f"comma-separated, of: {', '.join(BESIDE)}: for each a row of {BASELINE} and one of premium, in that "
        f"precision, or with prompts that have been met before (default: none; with --methods {ALL}: "
        f"{', '.join(BESIDE_ALL)}, on a GPU only {PROMPT_CACHE})",
    )
    parser.add_argument(
        "--system-prompt",
        type=Path,
        metavar="FILE",
        help="text of a system message before each prompt: what a cache of prompts is for (default: none)",
    )
    parser.add_argument("--num-draft-tokens", type=int, help="of `speculative` (default: 5)")
    parser.add_argument(
        "--policy",
        metavar="JSON",
        help='options by method, as {"eagle": {"max_depth": 4}} (default: those of the bundle)',
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="of each output (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0.0)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default: 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled output (default: 0)")
    parser.add_argument(
        "--latency-bound-ms",
        type=float,
        metavar="MS",
        help="verify what is pending so many milliseconds after the last pass (default: none)",
    )
    add_max_rows(parser, "prompts decoded side by side", default=1)
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="run all prompts at most so many times (default: 3)"
    )
    parser.add_argument(
        "--half-width",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="no further round once the 95 %% interval of each speed-up reaches at most this share of it to either "
        "side (default: 0.05)",
    )
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument(
        "--price-per-hour", type=float, help="of this machine, for the cost per 1M tokens (default: none)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw speed-up, divergence and kept tokens (default: no picture)"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    methods = None if args.methods in (None, ALL) else _methods(args.methods)
    options = _options(args)
    _refuse_idle(options, methods or METHODS)
    args.num_draft_tokens = check_num_draft_tokens(args.num_draft_tokens, methods or METHODS)
    beside = _beside(args)
    system = None if args.system_prompt is None else read_text(args.system_prompt)
    if args.price_per_hour is not None and not 0 < args.price_per_hour < float("inf"):
        raise RequestError(f"--price-per-hour {args.price_per_hour} must be above 0, and finite")
    if args.num_prompts is not None and args.num_prompts < 1:
        raise RequestError(f"--num-prompts {args.num_prompts} must be at least 1")
    if not 0 < args.half_width < 1:
        raise RequestError(f"--half-width {args.half_width} is a share of a speed-up", "give a number between 0 and 1")
    if importlib.util.find_spec("scipy") is None:
        raise RequestError("ssv-bench needs scipy", "pip install 'ssv[ab]'")
    if args.plot is not None:
        check_plot(args.plot)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        latency_bound_ms=args.latency_bound_ms,
    )
    if params.greedy and (params.top_k or params.top_p < 1):
        raise RequestError("--top-k and --top-p are of sampled output", "give a --temperature above 0")
    prompts = read_prompts(args.prompts)[: args.num_prompts]

    from ssv.runtime.llm import load_for  # after the arguments have been checked: it takes seconds

    llm = load_for(args, max_batch=args.max_rows)
    methods = methods or _worth_a_row(llm.methods, params)
    _refuse_idle(options, methods)
    compared = ways(
        llm,
        methods,
        beside,
        lambda precision: load_for(argparse.Namespace(**{**vars(args), "precision": precision}), args.max_rows),
        options,
    )
    with terminal_report() as report:
        rows = compare(
            compared,
            [llm.chat_ids(prompt, system) for prompt in prompts],
            params,
            batch=args.max_rows,
            rounds=args.rounds,
            half_width=args.half_width,
            num_draft_tokens=args.num_draft_tokens,
            price_per_hour=args.price_per_hour,
            report=report,
        )
    print_tables(rows, priced=args.price_per_hour is not None)
    if llm.measured:
        print(
            f"note: the bundle has no profile of {llm.place}: what steps cost there was measured before the first "
            "request, at few sizes. `ssv-build profile` measures and keeps it"
        )
    for row in rows:
        for said in (rounds_disagree(row, args.half_width), broken_promise(row), nothing_cached(row, llm)):
            if said is not None:
                print(said)
    if args.plot is not None:
        plot(rows, args.plot)
    print(json.dumps(document(rows, args, llm)))
    return 0


def compare(
    compared: Sequence[Way],
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    batch: int,
    rounds: int,
    half_width: float,
    num_draft_tokens: int,
    price_per_hour: float | None,
    report: Report,
) -> list[MethodRow]:
    """Decodes every prompt in every way, in rounds, and has the baseline's target audit the outputs.

    Args:
        compared: the baseline among them.
        rounds: how often all prompts are run at most.
        half_width: no further round is run once the interval of each speed-up is as narrow, as a share of it.
    """
    groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    tallies = {way.name: Tally() for way in compared}
    for way in compared:  # the first steps of each shape are slower
        way.prepare(groups[0][:1], params)
        way.decode(groups[0][:1], params, num_draft_tokens)
    for number in range(rounds):
        _run_round(number, groups, compared, tallies, params, num_draft_tokens, report)
        if all(is_narrow(speedup_of(tally, tallies[BASELINE]), half_width) for tally in tallies.values()):
            break
    rows = []
    baseline = next(way for way in compared if way.name == BASELINE)
    for number, way in enumerate(compared):
        audits = _audits(baseline.llm, prompts, tallies[way.name], params)
        rows.append(_row(way, audits, tallies[way.name], tallies[BASELINE], price_per_hour))
        report("audit", number + 1, len(compared), way.name)
    return rows


def _run_round(
    number: int,
    groups: Sequence[Sequence[tuple[int, ...]]],
    compared: Sequence[Way],
    tallies: Mapping[str, Tally],
    params: SamplingParams,
    num_draft_tokens: int,
    report: Report,
) -> None:
    """Decodes every group in every way once, and adds that to the tallies."""
    for tally in tallies.values():
        tally.outputs.append([])
        tally.seconds.append([])
        tally.tokens.append([])
    for index, group in enumerate(groups):
        for turn in range(len(compared)):
            way = compared[(number + index + turn) % len(compared)]
            way.prepare(group, params)
            start = time.perf_counter()
            outputs = way.decode(group, params, num_draft_tokens, tallies[way.name].gaps)
            seconds, tokens = time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)
            tally = tallies[way.name]
            tally.outputs[-1].extend(outputs)
            tally.seconds[-1].append(seconds)
            tally.tokens[-1].append(tokens)
            done, total = index * len(compared) + turn + 1, len(groups) * len(compared)
            report(f"round {number + 1}", done, total, f"{way.name} {tokens / seconds:.0f} tokens/s")


def speedup_of(tally: Tally, baseline: Tally) -> Interval | None:
    """The speed-up less 1, with its 95 % interval over groups of prompts, of which each has its sums over the rounds.

    Returns None of a single group, which says nothing of how others would differ from it.
    """
    from ssv.ab.statistics import mean_ratio_interval  # scipy takes a while, and `--help` does without

    if len(tally.seconds[0]) < 2:
        return None
    columns = (_over_rounds(each) for each in (baseline.tokens, baseline.seconds, tally.tokens, tally.seconds))
    return mean_ratio_interval(*columns, level=0.95)


def _over_rounds(by_round: Sequence[Sequence[float]]) -> list[float]:
    return [sum(each) for each in zip(*by_round, strict=True)]


def mean_ratio(
    tokens: Sequence[Sequence[int]],
    seconds: Sequence[Sequence[float]],
    base_tokens: Sequence[Sequence[int]],
    base_seconds: Sequence[Sequence[float]],
) -> float:
    """The geometric mean of the groups' ratios of tokens per second to a baseline's; all by round and group."""
    sums = zip(*(_over_rounds(each) for each in (tokens, seconds, base_tokens, base_seconds)), strict=True)
    return geometric_mean([(n / s) / (base_n / base_s) for n, s, base_n, base_s in sums])


def is_narrow(speedup: Interval | None, half_width: float) -> bool:
    """Whether the interval reaches at most `half_width` of the speed-up to either side."""
    if speedup is None:
        return False
    middle = 1 + speedup.estimate
    return max(speedup.high - speedup.estimate, speedup.estimate - speedup.low) <= half_width * middle


def rounds_disagree(row: MethodRow, half_width: float) -> str | None:
    """What is to be said of a method of which a round's speed-up is further than `half_width` of it from that of all
    rounds.
    """
    least, most = min(row.speedup_by_round), max(row.speedup_by_round)
    if max(most - row.speedup, row.speedup - least) <= half_width * row.speedup:
        return None
    return (
        f"note: rounds disagree on {row.method}: {least:.2f}x to {most:.2f}x in {len(row.speedup_by_round)} rounds. "
        "Something else may have kept this machine busy: try again when it is idle, or with more --rounds"
    )


def broken_promise(row: MethodRow) -> str | None:
    """What is to be said of a tier that diverged more often than its calibration promises; None of one that did not."""
    if row.divergence_promised is None or row.divergence <= row.divergence_promised:
        return None
    by_chance, interval = True, ""
    if row.divergence_low is not None and row.divergence_high is not None:
        by_chance = row.divergence_low <= row.divergence_promised
        interval = f" (95 %: {row.divergence_low:.2%} to {row.divergence_high:.2%})"
    return (
        f"warning: {row.method} diverged in {row.divergence:.2%} of its tokens{interval}, above the "
        f"{row.divergence_promised:.2%} that its calibration promises"
        + (
            "; with so few prompts that may be chance: try more of them"
            if by_chance
            else ": calibrate it on prompts like these"
        )
    )


def nothing_cached(row: MethodRow, llm: LLM) -> str | None:
    """What is to be said of a row with a cache of prompts in which nothing was found."""
    if row.cached_tokens or not row.method.endswith(PROMPT_CACHE):
        return None
    return (
        f"note: {row.method} found nothing in its cache: no prompt has more than the {llm.prefill_chunk} tokens of a "
        "block. Try longer prompts, or a --system-prompt"
    )


def document(rows: Sequence[MethodRow], args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """What the last line of stdout holds."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    settings["policies"] = {name: policy.model_dump() for name, policy in llm.tiers.items()}
    return {
        "rows": [asdict(row) for row in rows],
        "settings": settings,
        "machine": machine("cuda" if args.engine == "tensorrt" else args.device),
        "versions": versions("ssv", "torch", "transformers"),
        "commit": commit(),
    }


def _beside(args: argparse.Namespace) -> Sequence[str]:
    """What has rows beside those of the methods."""
    if args.also is not None:
        return read_beside(args.also)
    if args.methods != ALL:
        return ()
    on_cpu = args.engine == "torch" and args.device == "cpu"
    return BESIDE_ALL if on_cpu else (PROMPT_CACHE,)


def _options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options by method."""
    options = {} if args.policy is None else read_options(args.policy)
    if "max_pending" in options.get("speculative", {}) and args.num_draft_tokens is not None:
        raise RequestError("--num-draft-tokens and max_pending of --policy are the same setting", "give one of them")
    return options


def _refuse_idle(options: Collection[str], methods: Sequence[str]) -> None:
    """Raises RequestError if there are options of a method that is not compared."""
    if wrong := [name for name in options if name not in methods]:
        raise RequestError(
            f"--policy has options of {wrong[0]}, and what is compared is {', '.join(methods)}",
            "leave them out, or choose it",
        )


def _worth_a_row(methods: Sequence[str], params: SamplingParams) -> list[str]:
    """Methods but those that are another one where nothing is sampled."""
    return [name for name in methods if not (params.greedy and name == "medusa-typical")]


def _methods(text: str) -> list[str]:
    if ALL in text.split(","):
        raise RequestError(f"--methods {ALL} is every method", "give it alone")
    methods = read_methods(text)
    return methods if BASELINE in methods else [BASELINE, *methods]


def _audits(llm: LLM, prompts: Sequence[tuple[int, ...]], tally: Tally, params: SamplingParams) -> list[Audit]:
    from ssv.runtime.decode.audit import audit  # torch takes a while, and `--help` does without

    outputs = tally.outputs[0]
    return [audit(llm.target, p, o.token_ids, params) for p, o in zip(prompts, outputs, strict=True)]


def _row(way: Way, audits: Sequence[Audit], tally: Tally, baseline: Tally, price_per_hour: float | None) -> MethodRow:
    outputs = tally.outputs[0]
    counters = sum((output.counters for output in outputs), Counters(requests=0))
    divergence = _share([a.strict for a in audits], [len(o.token_ids) for o in outputs])
    speed = sum(map(sum, tally.tokens)) / sum(map(sum, tally.seconds))
    speedup = speedup_of(tally, baseline)
    by_round = [
        mean_ratio([tokens], [seconds], [base_tokens], [base_seconds])
        for tokens, seconds, base_tokens, base_seconds in zip(
            tally.tokens, tally.seconds, baseline.tokens, baseline.seconds, strict=True
        )
    ]
    first = sorted(output.counters.first_token_s for each in tally.outputs for output in each)
    p50, p95, p99, deviation = _between(tally.gaps)
    emitted = counters.emitted
    same = [
        output.token_ids == base.token_ids
        for each in tally.outputs
        for output, base in zip(each, baseline.outputs[0], strict=True)
    ]
    return MethodRow(
        method=way.name,
        precision=way.llm.precision,
        tokens_per_s=speed,
        speedup=mean_ratio(tally.tokens, tally.seconds, baseline.tokens, baseline.seconds),
        speedup_low=1 + speedup.low if speedup is not None else None,
        speedup_high=1 + speedup.high if speedup is not None else None,
        speedup_by_round=by_round,
        tokens_per_pass=counters.tokens_per_pass,
        target_passes_per_token=counters.target_passes / emitted,
        target_tokens_per_token=counters.target_tokens / emitted,
        prompt_tokens=counters.prompt_tokens,
        cached_tokens=counters.cached_tokens,
        emitted=emitted,
        drafted=counters.drafted,
        judged=counters.judged,
        accepted=counters.accepted,
        trusted=counters.trusted,
        typical=counters.typical,
        rolled_back=counters.rolled_back,
        acceptance_rate=counters.acceptance_rate,
        divergence=divergence.estimate,
        divergence_low=divergence.low if len(outputs) > 1 else None,
        divergence_high=divergence.high if len(outputs) > 1 else None,
        divergence_promised=way.llm.limits.get(way.method),
        divergence_margin=sum(a.margin for a in audits) / emitted,
        kept_by_depth=counters.kept_by_depth,
        identical=sum(same) / len(same),
        ms_per_token=1e3 / speed,
        between_ms_p50=p50,
        between_ms_p95=p95,
        between_ms_p99=p99,
        between_ms_sd=deviation,
        ttft_ms=first[len(first) // 2] * 1e3,
        cost_per_1m_tokens=price_per_hour / (speed * 3600) * 1e6 if price_per_hour is not None else None,
    )


def _between(gaps: Sequence[float]) -> Sequence[float | None]:
    """Median, 95th and 99th percentile and standard deviation of times between pieces, in milliseconds."""
    if not gaps:
        return (None,) * 4
    ordered = sorted(gaps)
    ranked = [ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)]
    return [1e3 * seconds for seconds in (*ranked, pstdev(gaps))]


def _share(found: Sequence[int], of: Sequence[int]) -> Interval:
    """Share of the prompts' tokens, with its 95 % interval over prompts, which a single one does not have."""
    from ssv.ab.statistics import Interval, bootstrap

    if len(of) < 2:
        share = sum(found) / sum(of)
        return Interval(share, share, share, 0.95)
    return bootstrap(lambda drawn_DC: (drawn_DC @ found) / (drawn_DC @ of), len(of), level=0.95)


if __name__ == "__main__":
    sys.exit(main())
