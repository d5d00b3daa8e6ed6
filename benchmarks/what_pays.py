"""Is drafting what pays worth it: against a chain of 5, premium as it was before there were trees, and plain decoding,
however many rows share a pass?

`premium` was a chain then, which ended where the scorer's risk said so, by thresholds that were found on calibration
prompts for costs set by hand; its numbers are here, and today's draft, scorer and kernels decode by them. Methods take
turns on each group of as many prompts as there are rows, in a rotating order.

    python benchmarks/what_pays.py --bundle bundles/smollm2-135m --out benchmarks/records/what_pays.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssv import LLM, Request, SamplingParams
from ssv.ab.statistics import mean_ratio_interval
from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
PLAIN, CHAIN, BEFORE, PREMIUM = "autoregressive", "speculative", "premium before trees", "premium"
METHODS = (PLAIN, "prompt-lookup", "suffix", CHAIN, BEFORE, PREMIUM)
BEFORE_TREES = Policy(accept_below=0.0, verify_above=0.3, risk_budget=0.5, max_pending=6)
"""The tier `premium` of builder/presets/smollm2-135m/calibration.json at commit 26ff249."""


@dataclass(slots=True)
class Sums:
    """What a method did with each group of prompts, over all rounds.

    Attributes:
        different: outputs that are not plain decoding's.
    """

    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counters: Counters = field(default_factory=lambda: Counters(requests=0))
    different: int = 0

    def over(self, other: Sums) -> list[float]:
        """Tokens per second over another's, the geometric mean over groups, and its 95 % interval."""
        found = mean_ratio_interval(other.tokens, other.seconds, self.tokens, self.seconds, level=0.95)
        return [round(1 + share, 3) for share in (found.estimate, found.low, found.high)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=32, help="(default: 32)")
    parser.add_argument("--max-tokens", type=int, default=96, help="(default: 96)")
    parser.add_argument("--rows", default="1,2,4,8", help="decoded side by side (default: 1,2,4,8)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: 2)")
    parser.add_argument("--precision", default="int8", help="(default: int8)")
    parser.add_argument("--threads", type=int, help="(default: as many as there are free cores)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    row_counts = [int(each) for each in args.rows.split(",")]
    if args.num_prompts < 2 * max(row_counts):
        parser.error(f"--num-prompts {args.num_prompts}: an interval needs two groups of {max(row_counts)} prompts")
    llm = LLM.load(args.bundle, precision=args.precision, max_batch=max(row_counts), threads=args.threads)
    llm.know_costs()
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    params = SamplingParams(max_tokens=args.max_tokens)
    settings = {name: getattr(args, name) for name in ("precision", "num_prompts", "max_tokens", "rounds")}
    results = {}
    for count in row_counts:
        results[f"{count} rows"] = figures_of(measured(llm, prompts, count, args.rounds, params))
    wrong = sum(row["different"] for result in results.values() for row in result["methods"].values())
    costs = llm.costs.model_dump(mode="json") if llm.costs is not None else None
    write_record(
        {**settings, "place": llm.place, "costs": costs, "results": results},
        args.out,
        versions("torch", "transformers"),
    )
    return 1 if wrong else 0


def measured(
    llm: LLM, prompts: Sequence[tuple[int, ...]], count: int, rounds: int, params: SamplingParams
) -> Mapping[str, Sums]:
    """Decodes groups of so many prompts by every method, in turn."""
    groups = [prompts[start : start + count] for start in range(0, len(prompts) - count + 1, count)]
    found = {method: Sums([0.0] * len(groups), [0.0] * len(groups)) for method in METHODS}
    plain: dict[int, list[tuple[int, ...]]] = {}
    for number in range(-1, rounds * len(groups)):  # the first is a warm-up
        place = max(number, 0) % len(groups)
        texts = {}
        for turn in range(len(METHODS)):
            method = METHODS[(number + number // len(groups) + turn) % len(METHODS)]
            policy = BEFORE_TREES if method == BEFORE else None
            requests = [Request(ids, method, params, policy=policy) for ids in groups[place]]
            began = time.perf_counter()
            outputs = llm.generate(requests)
            seconds = time.perf_counter() - began
            texts[method] = [output.token_ids for output in outputs]
            if number >= 0:
                found[method].seconds[place] += seconds
                found[method].tokens[place] += sum(len(output.token_ids) for output in outputs)
                for output in outputs:
                    found[method].counters += output.counters
        plain.setdefault(place, texts[PLAIN])
        for method, sums in found.items():
            sums.different += sum(a != b for a, b in zip(texts[method], plain[place], strict=True))
        print(f"{count} rows: {number + 1} of {rounds * len(groups)} groups", file=sys.stderr)
    return found


def figures_of(found: Mapping[str, Sums]) -> dict[str, Any]:
    """Speeds over plain decoding's, and `premium`'s over the better of its rivals."""
    better = max((CHAIN, BEFORE), key=lambda method: found[method].over(found[PLAIN])[0])
    return {
        "methods": {
            method: {
                "tokens_per_s": round(sum(sums.tokens) / sum(sums.seconds), 1),
                "over_plain": sums.over(found[PLAIN]),
                "tokens_per_pass": round(sums.counters.tokens_per_pass, 2),
                "target_tokens_per_token": round(sums.counters.target_tokens / sums.counters.emitted, 2),
                "different": sums.different,
            }
            for method, sums in found.items()
        },
        "better_rival": better,
        "premium_over_the_better_rival": found[PREMIUM].over(found[better]),
    }


if __name__ == "__main__":
    sys.exit(main())
