"""ssv-bench: compares ways to decode on a file of prompts.

Methods take turns on each group of prompts, in a rotating order, so that a machine whose speed drifts slows all of them alike; speed-ups
are ratios within the run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ssv.runtime.counters import Counters
from ssv.runtime.methods import METHODS
from ssv.runtime.request import Output, Request, RequestError, SamplingParams
from ssv.support.console import add_device, add_engine, add_precision, add_threads, add_version, run_command
from ssv.support.environment import commit, machine, versions
from ssv.support.progress import Report, terminal_report
from ssv.support.prompts import read_prompts
from ssv.support.waiting import waiting

if TYPE_CHECKING:
    from ssv.runtime.llm import LLM

BASELINE = "autoregressive"


@dataclass(frozen=True, slots=True)
class MethodRow:
    """What a method came to.

    Attributes:
        tokens_per_s: emitted tokens per second of decoding, the prompts' included.
        speedup, speedup_low, speedup_high: over the baseline in the same run, with its 95 % interval over groups of prompts.
        tokens_per_pass: emitted tokens per target pass (acceptance length).
        target_passes_per_token, target_tokens_per_token: fewer passes is not fewer tokens through the target.
        divergence: share of emitted tokens that are not the target's argmax given the same prefix; `divergence_margin`: by
            more than 1 nat. Null for sampled output, where they say nothing.
        divergence_low, divergence_high: its 95 % interval over prompts.
        divergence_promised: what the tier's calibration bounds it to; null for a lossless method.
        identical: share of outputs that are the baseline's, token for token.
        ttft_ms: median time to the first token.
        cost_per_1m_tokens: at the given price per hour; null without one.
    """

    method: str
    tokens_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    tokens_per_pass: float
    target_passes_per_token: float
    target_tokens_per_token: float
    prompt_tokens: int
    emitted: int
    drafted: int
    judged: int
    accepted: int
    trusted: int
    rolled_back: int
    acceptance_rate: float
    divergence: float | None
    divergence_low: float | None
    divergence_high: float | None
    divergence_promised: float | None
    divergence_margin: float | None
    identical: float
    ttft_ms: float
    cost_per_1m_tokens: float | None


@dataclass(slots=True)
class _Tally:
    outputs: list[Output] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # by group of prompts
    tokens: list[int] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssv-bench", description="Compare ways to decode: speed, work of the target, and what it costs in quality."
    )
    add_version(parser)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a `prompt` each")
    parser.add_argument("--num-prompts", type=int, help="only the first so many")
    parser.add_argument(
        "--methods", help=f"comma-separated, of: {', '.join(METHODS)} (default: all that the bundle has)"
    )
    parser.add_argument("--num-draft-tokens", type=int, default=5, help="of `speculative` (default: 5)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of each output (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded side by side (default: 1)")
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--price-per-hour", type=float, help="of this machine, for the cost per 1M tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed against divergence")
    return parser


def _run(args: argparse.Namespace) -> int:
    methods = None if args.methods is None else _methods(args.methods)
    if args.price_per_hour is not None and not args.price_per_hour > 0:
        raise RequestError(f"--price-per-hour {args.price_per_hour} must be above 0")
    if args.num_prompts is not None and args.num_prompts < 1:
        raise RequestError(f"--num-prompts {args.num_prompts} must be at least 1")
    if args.batch < 1:
        raise RequestError(f"--batch {args.batch} must be at least 1")
    if args.plot is not None:
        _check_plot(args.plot)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if params.greedy and (params.top_k or params.top_p < 1):
        raise RequestError("--top-k and --top-p are of sampled output: give a --temperature above 0")
    prompts = read_prompts(args.prompts)[: args.num_prompts]

    from ssv.runtime.llm import LLM  # after the arguments have been checked: it takes seconds

    with waiting(f"loading {args.bundle}") as say:
        llm = LLM.load(
            args.bundle,
            engine=args.engine,
            precision=args.precision,
            device=args.device,
            max_batch=args.batch,
            threads=args.threads,
            say=say,
        )
    with terminal_report() as report:
        rows = compare(
            llm,
            prompts,
            methods or llm.methods,
            params,
            batch=args.batch,
            num_draft_tokens=args.num_draft_tokens,
            price_per_hour=args.price_per_hour,
            report=report,
        )
    _print_table(rows, priced=args.price_per_hour is not None)
    for row in rows:
        if (broken := broken_promise(row)) is not None:
            print(broken)
    if args.plot is not None:
        _plot(rows, args.plot)
    print(json.dumps(document(rows, args, llm)))
    return 0


def compare(
    llm: LLM,
    prompts: Sequence[str],
    methods: Sequence[str],
    params: SamplingParams,
    *,
    batch: int,
    num_draft_tokens: int,
    price_per_hour: float | None,
    report: Report,
) -> list[MethodRow]:
    """Decodes every prompt with every method and audits the outputs.

    Args:
        methods: the baseline among them.
    """
    ids = [llm.chat_ids(prompt) for prompt in prompts]
    groups = [ids[start : start + batch] for start in range(0, len(ids), batch)]
    tallies = {method: _Tally() for method in methods}

    def decode(method: str, group: Sequence[tuple[int, ...]]) -> list[Output]:
        return llm.generate([Request(prompt, method, params, num_draft_tokens) for prompt in group])

    for method in methods:  # the first steps of each shape are slower
        decode(method, groups[0][:1])
    total = len(groups) * len(methods)
    for number, group in enumerate(groups):
        for turn in range(len(methods)):
            method = methods[(number + turn) % len(methods)]
            start = time.perf_counter()
            outputs = decode(method, group)
            tally = tallies[method]
            tally.seconds.append(time.perf_counter() - start)
            tally.tokens.append(sum(len(output.token_ids) for output in outputs))
            tally.outputs.extend(outputs)
            done = number * len(methods) + turn + 1
            report("bench", done, total, f"{method} {tally.tokens[-1] / tally.seconds[-1]:.0f} tokens/s")
    baseline = tallies[BASELINE]
    rows = []
    for number, method in enumerate(methods):
        rows.append(_row(llm, method, ids, tallies[method], baseline, price_per_hour, greedy=params.greedy))
        report("audit", number + 1, len(methods), method)
    return rows


def broken_promise(row: MethodRow) -> str | None:
    """What is to be said of a tier that diverged more often than its calibration promises; None of one that did not."""
    if row.divergence is None or row.divergence_promised is None or row.divergence <= row.divergence_promised:
        return None
    assert row.divergence_low is not None and row.divergence_high is not None
    by_chance = row.divergence_low <= row.divergence_promised
    return (
        f"warning: {row.method} diverged in {row.divergence:.2%} of its tokens (95 %: {row.divergence_low:.2%} to "
        f"{row.divergence_high:.2%}), above the {row.divergence_promised:.2%} that its calibration promises"
        + (
            "; with so few prompts that may be chance: try more of them"
            if by_chance
            else ": calibrate it on prompts like these"
        )
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


def _methods(text: str) -> list[str]:
    methods = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in methods if name not in METHODS]:
        raise RequestError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    return methods if BASELINE in methods else [BASELINE, *methods]


def _row(
    llm: LLM,
    method: str,
    prompts: Sequence[tuple[int, ...]],
    tally: _Tally,
    baseline: _Tally,
    price_per_hour: float | None,
    *,
    greedy: bool,
) -> MethodRow:
    from ssv.runtime.decode.audit import audit

    counters = sum((output.counters for output in tally.outputs), Counters(requests=0))
    audits = (
        [audit(llm.target, p, o.token_ids) for p, o in zip(prompts, tally.outputs, strict=True)] if greedy else None
    )
    speed = sum(tally.tokens) / sum(tally.seconds)
    low, high = _speedup_interval(tally, baseline)
    first = sorted(output.counters.first_token_s for output in tally.outputs)
    emitted = counters.emitted
    lengths = [len(output.token_ids) for output in tally.outputs]
    interval = (None, None) if audits is None else _bootstrap(
        len(audits), lambda drawn: sum(audits[i].strict for i in drawn) / sum(lengths[i] for i in drawn)
    )  # fmt: skip
    same = [a.token_ids == b.token_ids for a, b in zip(tally.outputs, baseline.outputs, strict=True)]
    return MethodRow(
        method=method,
        tokens_per_s=speed,
        speedup=speed * sum(baseline.seconds) / sum(baseline.tokens),
        speedup_low=low,
        speedup_high=high,
        tokens_per_pass=counters.tokens_per_pass,
        target_passes_per_token=counters.target_passes / emitted,
        target_tokens_per_token=counters.target_tokens / emitted,
        prompt_tokens=counters.prompt_tokens,
        emitted=emitted,
        drafted=counters.drafted,
        judged=counters.judged,
        accepted=counters.accepted,
        trusted=counters.trusted,
        rolled_back=counters.rolled_back,
        acceptance_rate=counters.acceptance_rate,
        divergence=sum(a.strict for a in audits) / emitted if audits is not None else None,
        divergence_low=interval[0],
        divergence_high=interval[1],
        divergence_promised=llm.limits.get(method),
        divergence_margin=sum(a.margin for a in audits) / emitted if audits is not None else None,
        identical=sum(same) / len(same),
        ttft_ms=first[len(first) // 2] * 1e3,
        cost_per_1m_tokens=price_per_hour / (speed * 3600) * 1e6 if price_per_hour is not None else None,
    )


def _speedup_interval(tally: _Tally, baseline: _Tally) -> tuple[float, float]:
    def ratio(drawn: Sequence[int]) -> float:
        mine = sum(tally.tokens[i] for i in drawn) / sum(tally.seconds[i] for i in drawn)
        return mine / (sum(baseline.tokens[i] for i in drawn) / sum(baseline.seconds[i] for i in drawn))

    return _bootstrap(len(tally.seconds), ratio)


def _bootstrap(number: int, statistic: Callable[[Sequence[int]], float], num_draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of units that are drawn by their index."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(range(number), k=number)) for _ in range(num_draws))
    return found[int(0.025 * num_draws)], found[int(0.975 * num_draws)]


def _print_table(rows: Sequence[MethodRow], *, priced: bool) -> None:
    headers = [
        "method", "tokens/s", "speed-up", "95 %", "tokens/pass", "passes/token", "target tokens/token",
        "drafted/accepted/emitted", "divergence", "identical",
    ]  # fmt: skip
    table = Table(*headers, *(["cost/1M"] if priced else []), title="ssv-bench")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        divergence = "-" if row.divergence is None else f"{row.divergence:.2%}"
        cells = [
            row.method, f"{row.tokens_per_s:.1f}", f"{row.speedup:.2f}x", f"{row.speedup_low:.2f}-{row.speedup_high:.2f}",
            f"{row.tokens_per_pass:.2f}", f"{row.target_passes_per_token:.3f}", f"{row.target_tokens_per_token:.2f}",
            f"{row.drafted}/{row.accepted}/{row.emitted}", divergence, f"{row.identical:.0%}",
        ]  # fmt: skip
        table.add_row(*cells, *([f"{row.cost_per_1m_tokens:.2f}"] if row.cost_per_1m_tokens is not None else []))
    # A narrow terminal must not cut the figures; in a log the width is unknown.
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _check_plot(path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'ssv[plot]'")
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise RequestError(f"--plot {path}: choose a .png file in a folder that exists")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Values in their places, moved up as far as no two are nearer than `gap`: labels that can be read."""
    placed: dict[int, float] = {}
    at = -math.inf
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        at = placed[index] = max(values[index], at + gap)
    return [placed[index] for index in range(len(values))]


def _plot(rows: Sequence[MethodRow], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    height = max(row.speedup_high for row in rows) - min(row.speedup_low for row in rows)
    heights = spread([row.speedup for row in rows], height / 16)
    for row, label in zip(rows, heights, strict=True):
        x = (row.divergence or 0.0) * 100
        error = [[max(0.0, row.speedup - row.speedup_low)], [max(0.0, row.speedup_high - row.speedup)]]
        axes.errorbar([x], [row.speedup], yerr=error, fmt="o", capsize=3)
        axes.annotate(row.method, (x, label), textcoords="offset points", xytext=(7, 2), fontsize=9)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("divergence: emitted tokens that are not the target's choice, %")
    axes.set_ylabel("speed-up over autoregressive")
    axes.margins(x=0.2, y=0.15)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
