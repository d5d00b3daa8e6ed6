"""ssv-ab: what an arm costs and how well it answers, against another."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssv.ab import page
from ssv.ab.analysis import RunSettings
from ssv.ab.arms import check_arms, parse_arm
from ssv.ab.endpoints import connect
from ssv.ab.limits import parse_limits
from ssv.ab.live import METRICS, SHARES, guard_names
from ssv.ab.questions import RIGHT_OR_WRONG, read_questions
from ssv.ab.run import blocks_in_words, compare, digest, make_report, power_in_words, run
from ssv.ab.watch import watch
from ssv.support.console import add_version, run_command
from ssv.support.errors import UserError
from ssv.support.progress import terminal_report


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: args.command(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssv-ab", description="Compare servers or tiers: cost, latency, quality.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    report = commands.add_parser(
        "report", help="make the report of a run's folder again, also of one that was cut short"
    )
    report.add_argument("folder", type=Path, help="what `ssv-ab run` wrote")
    report.set_defaults(command=_report)
    both = commands.add_parser("compare", help="what has changed between two runs of the same prompts")
    both.add_argument("before", type=Path, help="folder of a run")
    both.add_argument("after", type=Path, help="folder of a later one")
    both.set_defaults(command=lambda args: compare(args.before, args.after))
    _add_watch(commands)
    return parser


def _add_watch(commands: Any) -> None:
    about = "Read the log of the model ab_router, and show the running comparison with intervals that hold at any time."
    parser = commands.add_parser(
        "watch", help="follow live traffic that ab_router splits", description=about, allow_abbrev=False
    )
    parser.add_argument("log", type=Path, help="JSON lines, the `log` of the file of arms")
    parser.add_argument(
        "--guard", default="", metavar="LIMITS",
        help='an arm that breaks one is taken out of service, such as "error_rate<2%%,e2e_p95<5s,divergence<5%%" '
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", default="tpot", choices=METRICS, help="that the advice to stop goes by (default: tpot)"
    )
    parser.add_argument(
        "--equivalence", type=float, default=0.05, help="difference that does not matter (default: 0.05)"
    )
    parser.add_argument(
        "--metrics-url", help="of the server, such as http://host:8002/metrics, for audited divergence (default: none)"
    )
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default: 5.0)"
    )
    parser.add_argument(
        "--once", action="store_true", help="one look; exit status 4 if an arm was taken out of service (default: off)"
    )
    parser.add_argument(
        "--no-fallback", action="store_true", help="only say that a guard-rail was broken (default: off)"
    )
    parser.set_defaults(command=_watch)


def _watch(args: argparse.Namespace) -> int:
    if not 0 < args.equivalence < 1:
        raise UserError(f"--equivalence {args.equivalence} must be a share between 0 and 1")
    if not 0 < args.every < float("inf"):
        raise UserError(f"--every {args.every} must be above 0")
    guards = parse_limits(args.guard, SHARES, guard_names()) if args.guard else ()
    return watch(
        args.log,
        guards,
        metric=args.metric,
        equivalence=args.equivalence,
        metrics_url=args.metrics_url,
        every=None if args.once else args.every,
        may_fall_back=not args.no_fallback,
    )


def _add_run(commands: Any) -> None:
    about = "Ask arms the same prompts with the same seeds, in turns, and compare what came."
    parser = commands.add_parser("run", help="compare arms on a file of prompts", description=about, allow_abbrev=False)
    arm = "NAME=grpc://host:8001?method=balanced, or NAME=http://host:8003/v1?model=NAME for any OpenAI endpoint"
    parser.add_argument("--a", required=True, metavar="ARM", help=f"what the others are compared with: {arm}")
    parser.add_argument("--b", required=True, metavar="ARM", help="what is compared with it")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="ARM", help="one more; repeatable (default: none)"
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON lines: prompt, and where known answer and check"
    )
    parser.add_argument("--num-prompts", type=int, help="only the first so many (default: all)")
    parser.add_argument("--concurrency", default="1", help="requests at a time, such as 1,4,8 (default: 1)")
    parser.add_argument("--blocks-of", type=int, help="prompts that run together (default: as many as the concurrency)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan and of sampling (default: 0)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for a response (default: 120.0)"
    )
    parser.add_argument("--price-per-hour", type=float, help="of a GPU, or of the machine (default: none)")
    parser.add_argument("--gpus", type=float, default=1.0, help="that are paid for (default: 1.0)")
    parser.add_argument(
        "--utilisation", type=float, default=1.0, help="share of the paid time in which there is work (default: 1.0)"
    )
    parser.add_argument(
        "--volume",
        type=float,
        default=1e9,
        metavar="TOKENS",
        help="output tokens a month, for what is saved (default: %(default)s)",
    )
    parser.add_argument(
        "--slo",
        default="",
        metavar="LIMITS",
        help='such as "ttft_p95<500ms,itl_p95<80ms", for the goodput (default: none)',
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="by which the mean score may be lower, such as 0.02: judges quality (default: none)",
    )
    parser.add_argument(
        "--discordant",
        type=float,
        default=0.1,
        help="share of prompts that arms are expected to differ on (default: 0.1)",
    )
    parser.add_argument(
        "--cost-per-correct", action="store_true", help="also the cost of a correct answer (default: off)"
    )
    parser.add_argument(
        "--tls-ca", type=Path, help="PEM that certificates of grpcs:// are checked with (default: the system's)"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: ab-runs/DATE-TIME)")
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    page.check_can_write()
    arms = tuple(parse_arm(text) for text in (args.a, args.b, *args.arm))
    check_arms(arms)
    _check(args)
    concurrency = _concurrencies(args.concurrency)
    questions = read_questions(args.prompts)[: args.num_prompts]
    with_answers = [question for question in questions if question.answers]
    if args.margin is not None and not with_answers:
        raise UserError(
            f"--margin judges quality, and no prompt of {args.prompts} has an answer", "add `answer` to them"
        )
    if args.cost_per_correct:
        if len(with_answers) < len(questions) or any(q.check not in RIGHT_OR_WRONG for q in questions):
            lacking = next((q.id for q in questions if not q.answers or q.check not in RIGHT_OR_WRONG), "")
            raise UserError(
                f"--cost-per-correct needs prompts whose answers are right or wrong, and {lacking!r} of {args.prompts} "
                "is not",
                "add `answer` to it",
            )
        if args.price_per_hour is None and any(
            a.price_per_hour is None and a.price_per_1m_tokens is None for a in arms
        ):
            raise UserError("--cost-per-correct needs a price", "give --price-per-hour")
    settings = RunSettings(
        arms=arms,
        prompts=str(args.prompts),
        prompts_sha256=digest(args.prompts),
        num_prompts=len(questions),
        num_answers=len(with_answers),
        concurrency=concurrency,
        blocks_of=args.blocks_of,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        timeout=args.timeout,
        price_per_hour=args.price_per_hour,
        gpus=args.gpus,
        utilisation=args.utilisation,
        slo=args.slo,
        margin=args.margin,
        cost_per_correct=args.cost_per_correct,
        volume=args.volume,
    )
    for words in (power_in_words(settings, questions, args.discordant), blocks_in_words(settings)):
        if words is not None:
            print(f"before the run: {words}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is reported then, too
    folder = args.out or Path("ab-runs") / time.strftime("%Y%m%d-%H%M%S")
    with terminal_report() as report:
        return run(settings, questions, folder, connect=lambda arm: connect(arm, ca=args.tls_ca), report=report)


def _report(args: argparse.Namespace) -> int:
    page.check_can_write()
    return make_report(args.folder)


def _check(args: argparse.Namespace) -> None:
    above_zero = ("price_per_hour", "gpus", "timeout", "num_prompts", "blocks_of", "max_tokens", "volume")
    for name in above_zero:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    for name in ("utilisation", "margin", "discordant"):
        value = getattr(args, name)
        if value is not None and not (0 < value < 1 or (name == "utilisation" and value == 1)):
            raise UserError(f"--{name} {value} must be a share between 0 and 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature} must be 0 or above")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} must be a whole number from 0 to 2^64 - 1")
    if args.slo:
        parse_limits(args.slo)


def _concurrencies(text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(1 <= concurrency <= 1024 for concurrency in found):
        raise UserError(f"--concurrency {text!r}", "give whole numbers from 1 to 1024, such as 1,4,8")
    return found


if __name__ == "__main__":
    sys.exit(main())
