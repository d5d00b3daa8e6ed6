"""Is a change one of form alone? Two checkouts decode the same prompts, and what they say is compared.

Greedy: outputs, drafted and accepted tokens of every method have to be the same, token for token. Sampled: tokens per
target pass of each, which may differ where the rule of acceptance does.

    python benchmarks/two_checkouts.py --before ../before/.venv/bin/python --after .venv/bin/python \\
        --bundle bundles/smollm2-135m

Each interpreter is that of a checkout's environment; it runs this file with --tell, which prints what it decoded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = "autoregressive,speculative,premium,balanced,turbo"
SETTINGS: dict[str, dict[str, float | int]] = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 1": {"temperature": 1.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="interpreter of the older checkout")
    parser.add_argument("--after", type=Path, help="interpreter of the newer one")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", default="demo,heldout", help="of benchmarks/prompts, by name")
    parser.add_argument("--num-prompts", type=int, help="of each (default: all)")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--settings", default="greedy", help=f"separated by a semicolon, of: {'; '.join(SETTINGS)}")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tell", action="store_true", help="decode in this checkout alone, and print a line a request")
    args = parser.parse_args()
    if args.tell:
        tell(args)
        return 0
    if args.before is None or args.after is None:
        parser.error("--before and --after: the interpreters of two checkouts' environments")
    words = [word for word in sys.argv[1:] if word != "--tell"]
    before, after = (told(interpreter, words) for interpreter in (args.before, args.after))
    figures = compare(before, after)
    from ssv.support.environment import versions, write_record

    what = {"precision": args.precision, "commits": {"before": before[0], "after": after[0]}}
    write_record({**what, **figures}, args.out, versions("torch", "transformers"))
    return 1 if figures["greedy_differences"] else 0


def tell(args: argparse.Namespace) -> None:
    # Nothing but these: an older checkout has the rest elsewhere.
    from ssv.runtime import llm as module
    from ssv.runtime.request import Request, SamplingParams

    llm = module.LLM.load(args.bundle, precision=args.precision)
    print(json.dumps(_commit(Path(module.__file__).parent)), flush=True)
    paths = [ROOT / "benchmarks/prompts" / f"{name}.jsonl" for name in args.prompts.split(",")]
    lines = [line for path in paths for line in path.read_text().splitlines()[: args.num_prompts]]
    prompts = [llm.chat_ids(json.loads(line)["prompt"]) for line in lines]
    for number, prompt in enumerate(prompts):
        for setting in args.settings.split("; "):
            chosen: dict[str, Any] = {"max_tokens": args.max_tokens, "seed": number, **SETTINGS[setting]}
            params = SamplingParams(**chosen)
            for method in args.methods.split(","):
                (output,) = llm.generate([Request(prompt, method, params)])
                counted = output.counters
                numbers = [counted.drafted, counted.accepted, counted.target_passes, counted.emitted]
                print(json.dumps([number, setting, method, output.token_ids, *numbers]), flush=True)
        print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr)


def _commit(folder: Path) -> str:
    """The commit of a checkout."""
    done = subprocess.run(  # noqa: S603
        ["git", "-C", folder, "rev-parse", "HEAD"],  # noqa: S607
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def told(interpreter: Path, words: Sequence[str]) -> list[Any]:
    done = subprocess.run(  # noqa: S603
        [interpreter, __file__, *words, "--tell"], stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """What differs among greedy requests, and tokens per pass of all."""
    assert len(before) == len(after)
    greedy = [pair for pair in zip(before[1:], after[1:], strict=True) if pair[0][1] == "greedy"]
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for name, lines in (("before", before[1:]), ("after", after[1:])):
        for (setting, method), counts in _sums(lines).items():
            passes, emitted, drafted, accepted = counts
            figures = {"tokens_per_pass": emitted / passes, "accepted_per_drafted": accepted / max(drafted, 1)}
            cells.setdefault(setting, {}).setdefault(method, {}).update({f"{k}_{name}": v for k, v in figures.items()})
    return {
        "greedy_requests": len(greedy),
        "greedy_differences": [one[:3] for one, other in greedy if one != other],
        "cells": cells,
    }


def _sums(lines: Sequence[Any]) -> Mapping[tuple[str, str], list[int]]:
    """Passes, emitted, drafted and accepted tokens. The first token of an output comes of its prompt."""
    found: dict[tuple[str, str], list[int]] = {}
    for _, setting, method, _, drafted, accepted, passes, emitted in lines:
        sums = found.setdefault((setting, method), [0, 0, 0, 0])
        for i, number in enumerate((passes, emitted - 1, drafted, accepted)):
            sums[i] += number
    return found


if __name__ == "__main__":
    sys.exit(main())
