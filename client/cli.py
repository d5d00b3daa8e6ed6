"""ssv-generate: streams an answer to a prompt, from a bundle here or from a server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssv.client.explain import Explanation
from ssv.runtime.fates import fate_entry
from ssv.runtime.methods import METHODS, check_num_draft_tokens, policy_for, policy_of, with_options
from ssv.runtime.request import Request, SamplingParams
from ssv.support.console import add_device, add_engine, add_precision, add_threads, add_version, run_command
from ssv.support.errors import UserError
from ssv.support.imports import collecting_later
from ssv.support.json_text import parse_json


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssv-generate", description="Stream an answer to a prompt.")
    add_version(parser)
    parser.add_argument("prompt", help="the user's message; - reads it from stdin")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--bundle", type=Path, help="decode here")
    where.add_argument("--url", help="ask a server: grpc://host:8001, or grpcs:// for TLS")
    parser.add_argument("--method", default="premium", choices=METHODS, help="how to decode (default: premium)")
    parser.add_argument("--num-draft-tokens", type=int, help="of `speculative` (default: 5)")
    parser.add_argument(
        "--policy",
        type=_policy,
        metavar="JSON",
        help='what is otherwise in the method\'s policy, as {"max_depth": 4} (default: none)',
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of the answer, at most (default: 256)")
    parser.add_argument("--min-tokens", type=int, default=0, help="of the answer, before it may end (default: 0)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0.0)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default: 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled output (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable (default: none)"
    )
    parser.add_argument(
        "--latency-bound-ms",
        type=float,
        metavar="MS",
        help="verify what is pending so many milliseconds after the last pass (default: none)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text itself, without the chat template (default: off)"
    )
    parser.add_argument(
        "--tls-ca",
        type=Path,
        help="PEM that the server's certificate is checked with, at grpcs:// (default: the system's)",
    )
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument(
        "--explain",
        action="store_true",
        help="in place of the text show how each token came about, a line for each pass of the target (default: off)",
    )
    parser.add_argument("--quiet", action="store_true", help="no counts on stderr (default: off)")
    return parser


def _policy(text: str) -> dict[str, Any]:
    try:
        options = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, as {{"max_depth": 4}}')
    return options


def _run(args: argparse.Namespace) -> int:
    if any("\udc80" <= char <= "\udcff" for text in args.stop for char in text):
        raise UserError("--stop has bytes that are no UTF-8", "give it as text")
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=tuple(args.stop),
        fates=args.explain,
        latency_bound_ms=args.latency_bound_ms,
    )
    if args.num_draft_tokens is not None and "max_pending" in (args.policy or {}):
        raise UserError("--num-draft-tokens and max_pending of --policy are the same setting", "give one of them")
    prompt = _prompt(args.prompt)
    summary = _ask(args, prompt, params) if args.url else _decode(args, prompt, params)
    if not args.explain:
        print(flush=True)
    if not args.quiet:
        print(f"[{args.method}: {summary}]", file=sys.stderr)
    return 0


def _explanation(args: argparse.Namespace) -> Explanation | None:
    return Explanation() if args.explain else None


def _bound(lossless: bool, limit: float | None) -> str:
    """What is promised of a text.

    Args:
        limit: of the divergence of a method that is not lossless; None where there is none.
    """
    if lossless:
        return "lossless: plain decoding's text"
    if limit is None:
        return "without a bound on divergence"
    return f"divergence of at most {limit:.1%} on prompts like those calibrated on"


def _prompt(given: str) -> str:
    """The prompt as text: bytes that are no UTF-8 would reach the tokenizer as half characters."""
    data = sys.stdin.buffer.read() if given == "-" else given.encode(errors="surrogateescape")
    try:
        return data.decode("utf-8-sig" if given == "-" else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 (byte {error.start} is {data[error.start]:#04x})",
            "convert it, for example with iconv",
        ) from error


def _decode(args: argparse.Namespace, prompt: str, params: SamplingParams) -> str:
    num_draft_tokens = check_num_draft_tokens(args.num_draft_tokens, [args.method])
    with collecting_later():
        from ssv.runtime.llm import load_for  # after the arguments have been checked: it takes seconds

    llm = load_for(args)
    ids = llm.tokenizer.encode(prompt) if args.raw else llm.chat_ids(prompt)
    policy = None
    if args.policy:
        policy = with_options(args.method, policy_for(args.method, llm.tiers, num_draft_tokens), args.policy)
    request = Request(ids, args.method, params, num_draft_tokens, policy)
    explanation = _explanation(args)
    for chunk in llm.stream([request]):
        if explanation is None:
            print(chunk.text, end="", flush=True)
        else:
            explanation.push([fate_entry(fate, llm.tokenizer) for fate in chunk.fates])
    c = chunk.counters
    if explanation is not None:
        lossless = policy_of(request, llm.tiers).lossless_for(greedy=params.greedy)
        explanation.close(c.target_passes, _bound(lossless, llm.limits.get(args.method)))
    measured = "; no profile of this machine: costs were measured first, `ssv-build profile` keeps them"
    return (
        f"{c.emitted} tokens, {c.emitted / c.total_s:.0f} tokens/s, first after {c.first_token_s * 1e3:.0f} ms; "
        f"{c.target_passes} target passes, {c.drafted} drafted, {c.accepted} accepted "
        f"({c.typical} as typical), {c.trusted} trusted unseen; "
        f"ended by {chunk.finish_reason}{measured if llm.measured else ''}"
    )


def _ask(args: argparse.Namespace, prompt: str, params: SamplingParams) -> str:
    from ssv.client.triton import Client, Settings

    unused = {"--engine": args.engine != "torch", "--precision": args.precision, "--device": args.device != "cpu"}
    unused |= {"--threads": args.threads}
    if wrong := [name for name, given in unused.items() if given not in (None, False)]:
        raise UserError(
            f"{', '.join(wrong)} cannot be set for a server, which has its own", "give --bundle to decode here"
        )
    policy = args.policy or {}
    if args.num_draft_tokens is not None:
        policy = {**policy, "max_pending": check_num_draft_tokens(args.num_draft_tokens, [args.method])}
    settings = Settings(
        tier=args.method,
        policy=policy,
        chat=not args.raw,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens or None,
        temperature=params.temperature,
        top_k=params.top_k or None,
        top_p=params.top_p,
        seed=params.seed,
        stop=params.stop,
        fates=args.explain,
        latency_bound_ms=params.latency_bound_ms,
    )
    explanation = _explanation(args)
    started, first, num_tokens = time.monotonic(), 0.0, 0
    with Client(args.url, ca=args.tls_ca) as client:
        for reply in client.stream(prompt, settings):
            first = first or time.monotonic() - started
            num_tokens += reply.num_output_tokens
            if explanation is None:
                print(reply.text, end="", flush=True)
            elif reply.fates:
                explanation.push(json.loads(reply.fates))
        seconds = time.monotonic() - started
        withdrawn = f"{reply.withdrawn_tier} is withdrawn, decoded by {reply.tier}; " if reply.withdrawn_tier else ""
        if explanation is not None:
            tiers = json.loads(client.parameter("ssv_disclosure") or "{}").get("tiers", {})
            limit = tiers.get(args.method, {}).get("divergence")
            explanation.close(reply.target_passes, withdrawn + _bound(reply.lossless, limit))
    return (
        f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s, "
        f"first after {first * 1e3:.0f} ms; {reply.target_passes} target passes, "
        f"{reply.accepted} of {reply.judged} judged accepted ({reply.typical} as typical), "
        f"{reply.unverified} trusted unseen; {withdrawn}"
        f"lossless: {'yes' if reply.lossless else 'no'}; ended by {reply.finish_reason}"
    )


if __name__ == "__main__":
    sys.exit(main())
