"""Is the text of every lossless method plain decoding's: greedy and sampled, at any size of tree, whatever the prompt
cache holds?

Each prompt is decoded plainly and alone, greedily and sampled. Then every lossless method decodes it twice, side by
side with other prompts by other methods: first with a prompt cache that has nothing of it, and then with what that has
left there, the other way of choosing. With `--once` it is once, and the cache is kept, so that what a method finds
there is what others have left. Trees may have 1 to 64 nodes, by turns; steps are said to cost nothing that matters, so
that what drafts only what pays fills them.

    python benchmarks/lossless.py --bundle bundles/smollm2-135m --precision int8 --rows 8 --threads 1 \\
        --out benchmarks/records/lossless_int8_8.json

The record is written after each of its turns: every prompt has then been decoded by one more method.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssv import LLM, Request, SamplingParams
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.counters import Counters
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.methods import METHODS, policy_for
from ssv.runtime.request import Output
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
CHUNK = 32
"""Tokens of a block of the prompt cache: short prompts have some, and none that is the chat template's alone."""

CACHE_BYTES = 1 << 32

FLAT = Curve(tokens=(1, 512), seconds=(1.0, 1.001))
COSTS = Costs(target=FLAT, draft=Curve(tokens=(1, 512), seconds=(1e-4, 1e-4)))
SAMPLED = ((0.7, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.0, 0.95, 40))
"""Temperature, top_p and top_k, by turns."""


@dataclass(slots=True)
class Found:
    """Outputs of one method.

    Attributes:
        outputs: by what the prompt cache had of their prompts, and by how tokens were chosen.
        most_nodes: of any output, drafted tokens per pass.
        different: prompt, most nodes and the key of `outputs`, of those that are not plain decoding's.
    """

    outputs: dict[str, int] = field(default_factory=dict)
    most_nodes: float = 0.0
    counters: Counters = field(default_factory=lambda: Counters(requests=0))
    different: list[list[object]] = field(default_factory=list)

    def add(self, output: Output, expected: Output, greedy: bool, where: Sequence[object]) -> None:
        counters = output.counters
        what = f"{'hit' if counters.cached_tokens else 'miss'}, {'greedy' if greedy else 'sampled'}"
        self.outputs[what] = self.outputs.get(what, 0) + 1
        self.most_nodes = max(self.most_nodes, counters.drafted / max(counters.target_passes, 1))
        self.counters += counters
        if (output.token_ids, output.text, output.finish_reason) != (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        ):
            self.different.append([*where, what])

    def figures(self) -> dict[str, Any]:
        return {
            "outputs": self.outputs,
            "different": self.different,
            "tokens_per_pass": round(self.counters.tokens_per_pass, 2),
            "most_nodes_a_pass": round(self.most_nodes, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=96, help="(default: 96)")
    parser.add_argument("--max-tokens", type=int, default=16, help="(default: 16)")
    parser.add_argument("--rows", type=int, default=8, help="decoded side by side (default: 8)")
    parser.add_argument("--precision", default="int8", help="(default: int8)")
    parser.add_argument("--threads", type=int, help="(default: as many as there are free cores)")
    parser.add_argument("--once", action="store_true", help="each prompt once by each method")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(
        args.bundle, precision=args.precision, max_batch=args.rows, prefill_chunk=CHUNK, threads=args.threads
    )
    # Trees are as large as they may be, whatever that costs here.
    llm.costs, llm.pass_tokens = COSTS, None
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    plain = {greedy: decoded_alone(llm, prompts, greedy, args.max_tokens) for greedy in (True, False)}
    methods = [m for m in METHODS if m in llm.methods and policy_for(m, llm.tiers).lossless_for(greedy=True)]
    found = {method: Found() for method in methods}
    settings = {name: getattr(args, name) for name in ("precision", "rows", "max_tokens")} | {"prompts": len(prompts)}
    cache = llm.prompt_cache(CACHE_BYTES)
    began, done, wrong = time.monotonic(), 0, 0
    for turn in range(1, len(methods) + 1):
        if args.once:
            others = [(number // 8 + turn) % 2 == 1 for number in range(len(prompts))]
            take_turn(llm, prompts, plain, found, turn, args.max_tokens, cache, others)
        else:
            cache = llm.prompt_cache(CACHE_BYTES)
            for again in (False, True):
                take_turn(llm, prompts, plain, found, turn, args.max_tokens, cache, [again] * len(prompts))
        done = sum(sum(each.outputs.values()) for each in found.values())
        wrong = sum(len(each.different) for each in found.values())
        print(f"{turn} of {len(methods)} turns, {wrong} of {done} different", file=sys.stderr)
        figures = {
            **settings,
            "turns": f"{turn} of {len(methods)}",
            "outputs_compared": done,
            "outputs_different": wrong,
            "seconds": round(time.monotonic() - began),
            "methods": {method: each.figures() for method, each in found.items()},
        }
        with redirect_stdout(sys.stdout if turn == len(methods) else io.StringIO()):
            write_record(figures, args.out, versions("torch", "transformers"))
    return 1 if wrong else 0


def take_turn(
    llm: LLM,
    prompts: Sequence[tuple[int, ...]],
    plain: Mapping[bool, Sequence[Output]],
    found: Mapping[str, Found],
    turn: int,
    max_tokens: int,
    cache: PromptCache[Any],
    others: Sequence[bool],
) -> None:
    """Every prompt by one method each, those that stand side by side by different ones.

    Args:
        others: of which prompts tokens are chosen the other way, in trees of other sizes.
    """
    methods = list(found)
    numbers = random.Random(turn).sample(range(len(prompts)), len(prompts))
    asked = []
    for number in numbers:
        method = methods[(number + turn) % len(methods)]
        policy = sized(policy_for(method, llm.tiers), number + others[number] * MAX_PENDING // 2)
        greedy = (number % 2 == 0) != others[number]
        greedy |= not policy.lossless_for(greedy=greedy)
        asked.append(Request(prompts[number], method, _params(number, greedy, max_tokens), policy=policy))
    for number, request, output in zip(numbers, asked, llm.generate(asked, prompt_cache=cache), strict=True):
        assert request.policy is not None
        greedy = request.params.greedy
        where = (number, request.policy.max_pending)
        found[request.method].add(output, plain[greedy][number], greedy, where)


def sized(policy: Policy, number: int) -> Policy:
    """With trees of 1 to 64 nodes at the most, by turns; plain decoding has none."""
    return policy.model_copy(update={"max_pending": 1 + number % MAX_PENDING}) if policy.max_pending else policy


def decoded_alone(llm: LLM, prompts: Sequence[tuple[int, ...]], greedy: bool, max_tokens: int) -> list[Output]:
    """Plain decoding, one prompt at a time."""
    return [
        llm.generate([Request(ids, "autoregressive", _params(number, greedy, max_tokens))])[0]
        for number, ids in enumerate(prompts)
    ]


def _params(number: int, greedy: bool, max_tokens: int) -> SamplingParams:
    if greedy:
        return SamplingParams(max_tokens=max_tokens)
    temperature, top_p, top_k = SAMPLED[number % len(SAMPLED)]
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=number, max_tokens=max_tokens)


if __name__ == "__main__":
    sys.exit(main())
