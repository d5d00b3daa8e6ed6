"""What does a target's pass over several tokens cost on a CPU, beside one of a single token?

Milliseconds of a step of the target with all its logits, by its tokens and by those of the text before it, in turns:
the least of all and the median, and the ratio of the least ones to a single token's. What else a machine does
lengthens a step and never shortens it, so the least time says most of the code.

    python benchmarks/cpu_pass.py --bundle bundles/smollm2-135m --out benchmarks/records/cpu_pass.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from ssv import LLM
from ssv.support.environment import versions, write_record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--precision", default="int8", help="(default: int8)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--tokens", default="1,2,4,8,16,32", help="of a pass (default: 1,2,4,8,16,32)")
    parser.add_argument("--contexts", default="0,128,512,1024", help="tokens before it (default: 0,128,512,1024)")
    parser.add_argument("--turns", type=int, default=60, help="(default: 60)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(args.bundle, precision=args.precision, threads=args.threads)
    tokens, contexts = ([int(word) for word in words.split(",")] for words in (args.tokens, args.contexts))
    seconds: dict[tuple[int, int], list[float]] = {(context, num): [] for context in contexts for num in tokens}
    for _ in range(args.turns):
        for (context, num), found in seconds.items():
            found.append(step_seconds(llm, num, context))
    figures = {
        "precision": args.precision,
        "threads": args.threads,
        **{f"behind_{context}": costs({num: seconds[context, num] for num in tokens}) for context in contexts},
    }
    write_record(figures, args.out, versions("torch"))
    return 0


def step_seconds(llm: LLM, num: int, context: int) -> float:
    ids, gather = torch.ones(1, num, dtype=torch.long), torch.arange(num)
    slot = torch.tensor([context], dtype=torch.int32)
    began = time.perf_counter()
    llm.target.step(ids, slot, gather)
    return time.perf_counter() - began


def costs(seconds: dict[int, list[float]]) -> dict[int, dict[str, float]]:
    one = min(next(iter(seconds.values())))
    return {
        num: {
            "least_ms": round(min(found) * 1e3, 3),
            "median_ms": round(statistics.median(found) * 1e3, 3),
            "of_first": round(min(found) / one, 3),
        }
        for num, found in seconds.items()
    }


if __name__ == "__main__":
    sys.exit(main())
