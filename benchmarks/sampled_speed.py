"""How much of its greedy speed-up does speculation keep when tokens are sampled?

Each prompt is decoded with every setting by every method, in a rotating order; a speed-up is over plain decoding
sampled the same way, within the run. `kept` is the sampled speed-up over the greedy one. Acceptance and tokens per pass
say how much of a loss is drafted tokens being rejected, and the rest is what choosing costs.

    python benchmarks/sampled_speed.py --bundle bundles/smollm2-135m --out benchmarks/records/sampled_speed.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssv.runtime.counters import Counters
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
BASELINE, GREEDY = "autoregressive", "greedy"
SETTINGS: dict[str, dict[str, Any]] = {
    GREEDY: {},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 1": {"temperature": 1.0},
}

Cell = tuple[str, str]
"""A setting and a method."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--methods", default="autoregressive,speculative,premium")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the others count on")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import torch

    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Request, SamplingParams

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    llm = LLM.load(args.bundle, precision=args.precision)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    methods = args.methods.split(",")
    cells: list[Cell] = [(setting, method) for setting in SETTINGS for method in methods]
    counters: dict[Cell, list[Counters]] = {cell: [] for cell in cells}
    for number in range(-1, len(prompts)):
        for turn in range(len(cells)):
            setting, method = cell = cells[(number + turn) % len(cells)]
            params = SamplingParams(
                max_tokens=args.max_tokens, seed=args.seed + number, ignore_eos=True, **SETTINGS[setting]
            )
            (output,) = llm.generate([Request(prompts[max(number, 0)], method, params)])
            if number >= 0:  # the first is a warm-up
                counters[cell].append(output.counters)
        print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr)
    figures = {
        "what": "tokens/s after the first token; speed-ups over plain decoding sampled the same way, "
        "with 95 % intervals over prompts",
        "results": {
            setting: {method: _figures(counters, setting, method) for method in methods} for setting in SETTINGS
        },
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
    }
    write_record(figures, args.out, versions("torch", "transformers"))
    return 0


def _figures(counters: Mapping[Cell, Sequence[Counters]], setting: str, method: str) -> dict[str, Any]:
    own, indices = counters[setting, method], range(len(counters[setting, method]))
    total = sum(own, Counters(requests=0))
    figures: dict[str, Any] = {
        "tokens_per_s": 1e3 / _ms(own, indices),
        "tokens_per_pass": total.tokens_per_pass,
        "drafted_per_token": total.drafted / total.emitted,
    }
    if method == BASELINE:
        return figures
    greedy = counters[GREEDY, method]
    mine, theirs = _Ratio(own, counters[setting, BASELINE]), _Ratio(greedy, counters[GREEDY, BASELINE])
    rng = random.Random(0)
    draws = [rng.choices(indices, k=len(indices)) for _ in range(2000)]
    figures["acceptance_rate"] = total.acceptance_rate
    figures["speedup"] = mine.at(indices)
    figures["speedup_95"] = _interval([mine.at(drawn) for drawn in draws])
    figures["kept"] = mine.at(indices) / theirs.at(indices)
    figures["kept_95"] = _interval([mine.at(drawn) / theirs.at(drawn) for drawn in draws])
    return figures


class _Ratio:
    """Speed over the baseline's."""

    def __init__(self, own: Sequence[Counters], baseline: Sequence[Counters]) -> None:
        self._own, self._baseline = own, baseline

    def at(self, prompts: Sequence[int]) -> float:
        return _ms(self._baseline, prompts) / _ms(self._own, prompts)


def _ms(counters: Sequence[Counters], prompts: Sequence[int]) -> float:
    """Milliseconds of a token."""
    seconds = sum(counters[i].total_s - counters[i].first_token_s for i in prompts)
    return 1e3 * seconds / sum(counters[i].emitted - 1 for i in prompts)


def _interval(values: list[float]) -> list[float]:
    values = sorted(values)
    return [values[int(0.025 * len(values))], values[int(0.975 * len(values))]]


if __name__ == "__main__":
    sys.exit(main())
