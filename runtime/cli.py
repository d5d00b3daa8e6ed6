"""ssv-generate: streams an answer to a prompt.

May import: ssv.builder.console; ssv.runtime.llm, .request, .strategies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssv.builder.console import add_device, add_engine, add_precision, run_command
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.strategies import METHODS


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssv-generate", description="Stream an answer to a prompt.")
    parser.add_argument("prompt", help="the user's message; - reads it from stdin")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--method", default="premium", choices=METHODS, help="default: premium")
    parser.add_argument("--num-draft-tokens", type=int, default=5, help="of `speculative` (default: 5)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--min-tokens", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    parser.add_argument("--max-delay", type=float, metavar="S", help="verify what is pending after so many seconds")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="no counts on stderr")
    return parser


def _run(args: argparse.Namespace) -> int:
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=tuple(args.stop),
        max_delay=args.max_delay,
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    from ssv.runtime.llm import LLM  # after the arguments have been checked: it takes seconds

    llm = LLM.load(args.bundle, engine=args.engine, precision=args.precision, device=args.device)
    ids = tuple(llm.tokenizer.encode(prompt)) if args.raw else llm.chat_ids(prompt)
    for chunk in llm.stream([Request(ids, args.method, params, args.num_draft_tokens)]):
        print(chunk.text, end="", flush=True)
        if chunk.counters is not None and not args.quiet:
            c = chunk.counters
            speed = c.emitted / c.total_s
            print(
                f"\n[{args.method}: {c.emitted} tokens, {speed:.0f} tokens/s, first after {c.first_token_s * 1e3:.0f} ms; "
                f"{c.target_passes} target passes, {c.drafted} drafted, {c.accepted} accepted, {c.trusted} trusted unseen; "
                f"ended by {chunk.finish_reason}]",
                end="",
                file=sys.stderr,
            )
    print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
