"""How long rows that decode wait for their next token while long prompts join them, on one GPU.

Some rows decode; prompts come one after the other, each when the rounds have gone on for some. With a lane for prompts
(the default) and without, by turns. Milliseconds between the chunks of a row, from the first of the prompts' arrival to
the last one's first token; until these prompts have their first tokens; and tokens/s of all.

    python benchmarks/gpu_joining.py --bundle bundles/smollm2-135m --out benchmarks/records/gpu_joining.json
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import load

from ssv import LLM, Request, SamplingParams
from ssv.runtime.methods import policy_for
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--rows", type=int, default=8, help="that decode (default: 8)")
    parser.add_argument("--joining", type=int, default=4, help="prompts that join (default: 4)")
    parser.add_argument("--length", type=int, default=1500, help="tokens of each of these (default: 1500)")
    parser.add_argument("--every", type=int, default=10, help="rounds between their arrivals (default: 10)")
    parser.add_argument("--max-tokens", type=int, default=500, help="of the rows that decode (default: 500)")
    parser.add_argument("--methods", default="autoregressive,speculative,premium,balanced")
    parser.add_argument("--repeats", type=int, default=3, help="behind one that captures graphs (default: 3)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = load(args.bundle, args.rows + args.joining)
    lane = llm.lane
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "methods": {}}
    for method in args.methods.split(","):
        found: dict[str, list[dict[str, float]]] = {"beside the rounds": [], "between the rounds": []}
        for _ in range(1 + args.repeats):
            for name, runs in found.items():
                llm.lane = lane if name == "beside the rounds" else None
                runs.append(joined(llm, method, args))
        figures["methods"][method] = {
            name: {key: round(float(np.median([run[key] for run in runs[1:]])), 2) for key in runs[0]}
            for name, runs in found.items()
        }
        print(method, figures["methods"][method], file=sys.stderr)
    write_record(figures, args.out, versions("torch", "triton"))
    return 0


def joined(llm: LLM, method: str, args: argparse.Namespace) -> dict[str, float]:
    """One run."""
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)][: args.rows]
    policy, loop = policy_for(method, llm.tiers), llm.loop()

    def submit(index: int, ids: tuple[int, ...], max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        loop.submit(index, Request(ids, method, params), policy, None)

    came: dict[int, list[float]] = {}
    arrived: list[float] = []
    num_tokens, num_steps, until = 0, 0, 0
    began = time.perf_counter()
    for index, ids in enumerate(prompts):
        submit(index, ids, args.max_tokens)
    while loop.has_work:
        num_steps += 1
        if not until and len(came) == args.rows:
            until = num_steps + args.every
        if until and num_steps >= until and len(arrived) < args.joining:
            ids = prompts[len(arrived) % len(prompts)] * args.length
            arrived.append(time.perf_counter())
            submit(args.rows + len(arrived) - 1, ids[: args.length], 32)
            until += args.every
        for chunk in loop.step():
            came.setdefault(chunk.index, []).append(time.perf_counter())
            num_tokens += len(chunk.token_ids)
    ended = time.perf_counter()
    firsts = [came[args.rows + n][0] for n in range(len(arrived))]
    gaps = [b - a for row in range(args.rows) for a, b in pairwise(came[row]) if arrived[0] <= b and a <= max(firsts)]
    return {
        "gap_ms_p50": 1e3 * float(np.median(gaps)),
        "gap_ms_p99": 1e3 * float(np.percentile(gaps, 99)),
        "gap_ms_most": 1e3 * max(gaps),
        "first_token_ms": 1e3 * float(np.median([first - at for first, at in zip(firsts, arrived, strict=True)])),
        "all_in_after_ms": 1e3 * (max(firsts) - arrived[0]),
        "tokens_per_s": num_tokens / (ended - began),
    }


if __name__ == "__main__":
    sys.exit(main())
