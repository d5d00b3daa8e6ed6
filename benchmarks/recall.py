"""What the text itself adds to `premium`: the same tier with and without what followed the same words before, as
candidates of its trees (`Policy.recalls`), on prompts whose answers repeat them and on others.

    python benchmarks/recall.py --bundle bundles/smollm2-135m --out benchmarks/records/recall.json

Both take turns on each prompt, and plain decoding with them. Texts have to be the same. What pays goes by the costs of
the bundle's first profile of the precision, so that tokens per pass are the same on a busy machine. Speeds are by
the processor's time of this process, in which other work on the machine shows less.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ssv.ab.statistics import mean_ratio_interval
from ssv.bundle.manifest import read_manifest
from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.runtime.llm import LLM
from ssv.runtime.methods import AUTOREGRESSIVE
from ssv.runtime.request import Output, Request, SamplingParams
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

PROMPTS = Path(__file__).parent / "prompts"


class WithoutRecall(Policy):
    """The same policy, by the draft alone."""

    @property
    def recalls(self) -> bool:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", default="edits,heldout", help="of benchmarks/prompts (default: edits,heldout)")
    parser.add_argument("--num-prompts", type=int, default=32, help="of each, at most (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each output (default: 96)")
    parser.add_argument("--temperature", default="0,0.7", help="comma-separated (default: 0,0.7)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each prompt is decoded (default: 1)")
    parser.add_argument("--precision", default="int8", help="(default: int8)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--out", type=Path, help="a record (default: none)")
    args = parser.parse_args()
    llm = LLM.load(args.bundle, precision=args.precision, threads=args.threads)
    profiles = read_manifest(args.bundle, verify=False).profiles
    llm.costs = next(costs for place, costs in profiles.items() if place.startswith(f"torch {args.precision} "))
    premium = llm.tiers["premium"]
    policies = {
        "plain": AUTOREGRESSIVE,
        "without": WithoutRecall.model_validate(premium.model_dump()),
        "with": premium,
    }
    rows = []
    for name in args.prompts.split(","):
        prompts = [llm.chat_ids(text) for text in read_prompts(PROMPTS / f"{name}.jsonl")[: args.num_prompts]]
        for temperature in map(float, args.temperature.split(",")):
            rows.append(compare(llm, policies, prompts, temperature, args) | {"prompts": name})
            print(rows[-1], file=sys.stderr, flush=True)
    what = {"precision": args.precision, "threads": args.threads, "costs": llm.costs.model_dump(), "rows": rows}
    write_record(what, args.out, versions("torch", "transformers"))
    return 0 if all(row["same_text"] for row in rows) else 1


def compare(
    llm: LLM,
    policies: dict[str, Policy],
    prompts: list[tuple[int, ...]],
    temperature: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Decodes prompts with each policy, in turns."""
    seconds: dict[str, list[float]] = {name: [0.0] * len(prompts) for name in policies}
    outputs: dict[str, list[Output]] = {name: [] for name in policies}
    names = list(policies)
    for round_ in range(args.rounds):
        for number, ids in enumerate(prompts):
            params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=number)
            for turn in range(len(names)):
                name = names[(round_ + number + turn) % len(names)]
                start = time.process_time()
                (output,) = llm.generate([Request(ids, name, params, policy=policies[name])])
                seconds[name][number] += time.process_time() - start
                outputs[name].append(output)
    texts = [[output.token_ids for output in outputs[name]] for name in names]
    found: dict[str, Any] = {"temperature": temperature, "same_text": texts[0] == texts[1] == texts[2]}
    for name in ("without", "with"):
        counters = sum((output.counters for output in outputs[name]), Counters(requests=0))
        found[f"tokens_per_pass_{name}"] = counters.tokens_per_pass
        found[f"drafted_per_pass_{name}"] = counters.drafted / counters.target_passes
    tokens = [float(output.counters.emitted) for output in outputs["plain"][: len(prompts)]]
    for name, base in (("without", "plain"), ("with", "plain"), ("with", "without")):
        interval = mean_ratio_interval(tokens, seconds[base], tokens, seconds[name], level=0.95)
        found[f"speed_of_{name}_over_{base}"] = [1 + interval.estimate, 1 + interval.low, 1 + interval.high]
    return found


if __name__ == "__main__":
    sys.exit(main())
