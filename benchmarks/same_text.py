"""Is the text of every lossless method plain decoding's, for the same seed, alone and in company?

Cases are (prompt, seed, temperature). Each is decoded by every lossless method in batches of mixed methods, lossy ones
among them, and plainly alone.

    python benchmarks/same_text.py --bundle bundles/smollm2-135m --cases 200 --precision int8 \\
        --out benchmarks/records/same_text_int8.json
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from ssv import LLM, Request, SamplingParams
from ssv.runtime.methods import METHODS, policy_for
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
TEMPERATURES = (0.0, 0.5, 0.7, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--cases", type=int, default=200, help="(default: 200)")
    parser.add_argument("--max-tokens", type=int, default=32, help="(default: 32)")
    parser.add_argument("--rows", type=int, default=8, help="decoded side by side (default: 8)")
    parser.add_argument("--methods", help="comma-separated (default: all of the bundle that are lossless)")
    parser.add_argument("--precision", help="(default: the bundle's)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(args.bundle, precision=args.precision, max_batch=args.rows)
    wanted = llm.methods if args.methods is None else args.methods.split(",")
    known = [method for method in METHODS if method in wanted]
    lossless = [m for m in known if m != "autoregressive" and policy_for(m, llm.tiers).lossless]
    lossy = [tier for tier, policy in llm.tiers.items() if not policy.lossless]
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)]
    rng = random.Random(0)
    different: list[list[object]] = []
    compared = 0
    for case in range(args.cases):
        temperature = TEMPERATURES[case % len(TEMPERATURES)]
        params = SamplingParams(temperature=temperature, seed=case, max_tokens=args.max_tokens)
        number = rng.randrange(len(prompts))
        ids = prompts[number]
        (plain,) = llm.generate([Request(ids, "autoregressive", params)])
        company = [Request(rng.choice(prompts), rng.choice(lossy or ["autoregressive"]), params) for _ in range(2)]
        requests = [Request(ids, method, params) for method in lossless] + company
        rng.shuffle(requests)
        for request, output in zip(requests, llm.generate(requests), strict=True):
            if request.prompt_ids == ids and request.method in lossless:
                compared += 1
                if output.token_ids != plain.token_ids:
                    different.append([number, case, temperature, request.method])
        print(f"{case + 1} of {args.cases} cases, {len(different)} of {compared} different", file=sys.stderr)
    figures = {"cases": args.cases, "outputs_compared": compared, "different": different, "methods": lossless}
    settings = {"rows": args.rows, "max_tokens": args.max_tokens, "precision": args.precision or "the bundle's"}
    write_record({**settings, **figures}, args.out, versions("torch", "transformers"))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
