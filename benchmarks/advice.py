"""How far is what `ssv-build advise` predicts from what is measured, on a pair that runs here?

Costs and some rounds are measured and prompts are watched as the command does it; then the same prompts are decoded by
each method, the methods in turns. What is compared is the speed behind the first token: the prompt's own pass is not
predicted.

    python benchmarks/advice.py --bundle bundles/smollm2-135m --out benchmarks/records/advice.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ssv import LLM, Request, SamplingParams
from ssv.builder.advice.command import REPEATS
from ssv.builder.advice.positions import acceptance, drawn, watch
from ssv.builder.advice.rounds import decoding, seconds_of_rounds
from ssv.builder.advice.speed import Basis, break_even, speeds
from ssv.bundle.survival import Survival
from ssv.runtime.counters import Counters
from ssv.runtime.decode.round import DecodeBatch
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--every", type=int, default=8, help="take each so-manieth prompt (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--precision", help="(default: the bundle's)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(args.bundle, precision=args.precision, threads=args.threads)
    assert llm.draft is not None
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[:: args.every]]
    costs = llm.costs = llm.measure_costs(repeats=REPEATS)
    batch = DecodeBatch(llm.target, llm.draft, sorted(llm.eos_token_ids), llm.max_length)
    texts = watch(batch, prompts, args.max_tokens)
    of_steps = Basis(costs, llm.survival or Survival(), llm.draft.num_features > 0, recorded=costs)
    basis = of_steps.timed(seconds_of_rounds(prompts, decoding(llm)))
    found = speeds(texts, basis, llm.tiers)
    by_steps = {s.method: s for s in speeds(texts, of_steps, llm.tiers)}
    table = json.loads((args.bundle / "calibration.json").read_text())["survival"]["reliability"]
    by_table = {s.method: s for s in speeds(drawn(table), replace(basis, survival=Survival()), {})}
    measured = {s.method: Counters(requests=0) for s in found if s.method != "tree"}
    length = next(int(s.shape.split()[-1]) for s in found if s.method == "speculative")
    params = SamplingParams(max_tokens=args.max_tokens)
    for number, ids in enumerate(prompts):
        for turn in range(len(measured)):
            method = list(measured)[(number + turn) % len(measured)]
            measured[method] += llm.generate([Request(ids, method, params, length)])[0].counters
    again = llm.measure_costs(repeats=REPEATS)
    rows = {}
    plain = _speed(measured["autoregressive"])
    for each in found:
        if (counters := measured.get(each.method)) is None:
            continue
        speed = _speed(counters)
        rows[each.method] = {
            "shape": each.shape,
            "predicted_tokens_per_s": round(each.tokens_per_s, 1),
            "measured_tokens_per_s": round(speed, 1),
            "tokens_per_s_off_by": round(each.tokens_per_s / speed - 1, 3),
            "tokens_per_s_by_steps_alone": round(by_steps[each.method].tokens_per_s, 1),
            "predicted_speedup": round(each.speedup, 3),
            "measured_speedup": round(speed / plain, 3),
            "speedup_off_by": round(each.speedup / (speed / plain) - 1, 3),
            "predicted_tokens_per_pass": round(each.tokens_per_pass, 3),
            "measured_tokens_per_pass": round(counters.tokens_per_pass, 3),
            "predicted_nodes_per_pass": round(each.nodes_per_pass, 2),
            "measured_nodes_per_pass": round(counters.drafted / counters.target_passes, 2),
        }
        if (other := by_table.get(each.method)) is not None:
            rows[each.method]["speedup_by_survival_table"] = round(other.speedup, 3)
            rows[each.method]["of"] = other.shape
        print(each.method, rows[each.method], file=sys.stderr)
    even = break_even(texts, basis)
    figures = {
        "what": "predictions of ssv-build advise beside measurements, greedy, one request at a time",
        "place": llm.place,
        "prompts": f"each {args.every}th of {args.prompts.name}: {len(prompts)}",
        "max_tokens": args.max_tokens,
        "methods": rows,
        "acceptance_by_depth_and_rank": [[round(share, 3) for share in of_depth[:4]] for of_depth in acceptance(texts)],
        "break_even": {"acceptance": even.acceptance, "draft_share": even.draft_share, "now": even.draft_share_now},
        "costs": costs.model_dump(),
        "seconds_of_a_round_beside_its_steps": asdict(basis.overhead),
        "target_seconds_afterwards": again.target.seconds,
    }
    write_record(figures, args.out, versions("torch", "transformers"))
    return 0


def _speed(counters: Counters) -> float:
    """Tokens per second behind the first of each output."""
    return (counters.emitted - counters.requests) / (counters.total_s - counters.first_token_s)


if __name__ == "__main__":
    sys.exit(main())
