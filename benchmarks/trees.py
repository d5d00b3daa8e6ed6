"""How many tokens does a target pass give, by the shape of what is drafted?

Counts, no times: they do not depend on the machine.

Each shape is a lossless policy over the bundle's draft or, asked for by name, over its Medusa heads or the text itself,
with all that is drafted whatever it costs. Outputs are compared with plain decoding's.

    python benchmarks/trees.py --bundle bundles/smollm2-135m --precision int8 --out benchmarks/records/trees.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssv import LLM, Request, SamplingParams
from ssv.bundle.policy import verify_all
from ssv.runtime.counters import Counters
from ssv.runtime.methods import EAGLE, LOOKAHEAD, MEDUSA, PROMPT_LOOKUP, SPECINFER, SUFFIX
from ssv.support.environment import versions, write_record
from ssv.support.errors import UserError
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]


SHAPES = {
    "chain of 5": verify_all(5),
    "tree of 8": verify_all(8, children=(4,), beam=4, max_depth=6),
    "tree of 16": verify_all(16, children=(6,), beam=6, max_depth=7),
    "tree of 32": verify_all(32, children=(8,), beam=8, max_depth=8),
    "specinfer": SPECINFER,
    "eagle": EAGLE,
}
WITHOUT_DRAFT = {
    "prompt-lookup": PROMPT_LOOKUP.model_copy(update={"pays": False}),
    "suffix": SUFFIX.model_copy(update={"pays": False}),
    "lookahead": LOOKAHEAD,
    "medusa of 16": MEDUSA.model_copy(update={"max_pending": 16}),
    "medusa": MEDUSA,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=32, help="(default: 32)")
    parser.add_argument("--max-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0.0)")
    parser.add_argument(
        "--shapes",
        default=",".join(SHAPES),
        help=f"comma-separated, of: {', '.join(SHAPES | WITHOUT_DRAFT)} (default: those of the draft)",
    )
    parser.add_argument("--precision", help="(default: the bundle's)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    known, names = SHAPES | WITHOUT_DRAFT, args.shapes.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"shape {unknown[0]!r} is unknown", f"choose of: {', '.join(known)}")
    llm = LLM.load(args.bundle, precision=args.precision)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    params = [
        SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=i) for i in range(len(prompts))
    ]
    plain = [
        llm.generate([Request(ids, "autoregressive", p)])[0].token_ids for ids, p in zip(prompts, params, strict=True)
    ]
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        outputs = [
            llm.generate([Request(ids, name, p, policy=known[name])])[0] for ids, p in zip(prompts, params, strict=True)
        ]
        counters = sum((output.counters for output in outputs), Counters(requests=0))
        figures[name] = {
            "tokens_per_pass": round(counters.tokens_per_pass, 3),
            "drafted_per_pass": round(counters.drafted / counters.target_passes, 2),
            "identical": sum(o.token_ids == p for o, p in zip(outputs, plain, strict=True)) / len(plain),
        }
        print(name, figures[name], file=sys.stderr)
    settings = {
        "prompts": args.prompts.name,
        "num_prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "precision": args.precision or "the bundle's",
    }
    write_record({**settings, "shapes": figures}, args.out, versions("torch", "transformers"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
