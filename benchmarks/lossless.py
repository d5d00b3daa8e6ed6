"""Is the text of every lossless method plain decoding's: greedy and sampled, at any size of tree, whatever the prompt
cache holds?

Each prompt is decoded plainly and alone, greedily and sampled. Then every lossless method decodes it twice, side by
side with other prompts by other methods: first with a prompt cache that has nothing of it, and then with what has left
there, the other way of choosing. With `--once` it is once, and the cache is kept, so that what a method finds
there is what others have left. Trees may have 1 to 64 nodes, by turns; steps are said to cost nothing that matters, so
that what drafts only what pays fills them.

Where the engines run rounds by themselves (CUDA), they do so for rows of one policy. So half of each turn's prompts
stand beside others of the same method and the same trees, and every second of these groups has trees that such rounds
have room for. Half of what drafts what pays drafts whatever it finds instead: trees of exactly so many nodes.

    python benchmarks/lossless.py --bundle bundles/smollm2-135m --precision int8 --rows 8 --threads 1 \\
        --out benchmarks/records/lossless_int8_8.json
    python benchmarks/lossless.py --bundle bundles/smollm2-135m --device cuda --rows 1,8,64 --num-prompts 1000 --once \\
        --prompts builder/presets/prompts/varied.jsonl --max-tokens 32 --out benchmarks/records/lossless_gpu.json

The record is written after each of its turns, with each number of rows: every prompt has then been decoded by one more
method.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ssv import LLM, Chunk, Request, SamplingParams
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.counters import Counters
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.engines.contract import Corrections, RoundResult, RoundRow, RoundsEngine, RoundShape
from ssv.runtime.methods import METHODS, policy_for
from ssv.runtime.request import Output
from ssv.support.console import run_command
from ssv.support.environment import versions, write_record
from ssv.support.errors import UserError
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
CHUNK = 32
"""Tokens of a block of the prompt cache: short prompts have some, and none that is the chat template's alone."""

CACHE_BYTES = 1 << 32

FLAT = Curve(tokens=(1, 512), seconds=(1.0, 1.001))
COSTS = Costs(target=FLAT, draft=Curve(tokens=(1, 512), seconds=(1e-4, 1e-4)))
SAMPLED = ((0.7, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.0, 0.95, 40))
"""Temperature, top_p and top_k, by turns."""


LEAST_GROUP = 8
"""Prompts of a policy that stand side by side, at the least: the rows come and go."""

SIZES = (0, 1, 3, 7, 15, 31, MAX_PENDING)
"""Nodes of a tree at the most, of each part of a record's counts."""


class FlatRounds:
    """Rounds of engines, said to take as long whatever they draft.

    Attributes:
        nodes: how many trees had so many nodes, of all rows.
    """

    def __init__(self, rounds: RoundsEngine) -> None:
        self._rounds, self.nodes = rounds, Counter[int]()
        self.most_tokens, self.most_pending = rounds.most_tokens, rounds.most_pending

    @property
    def in_flight(self) -> int:
        return self._rounds.in_flight

    def seconds(self, num_rows: int, shape: RoundShape) -> float:
        return FLAT.at(num_rows * (1 + shape.nodes))

    def measure(self) -> None:
        """Nothing is to be known."""

    def begin(
        self, rows: Sequence[RoundRow], features_BTF: Tensor | None, corrections: tuple[Corrections, Corrections]
    ) -> None:
        self._rounds.begin(rows, features_BTF, corrections)

    def run(self, shape: RoundShape) -> None:
        self._rounds.run(shape)

    def take(self) -> list[RoundResult]:
        results = self._rounds.take()
        self.nodes.update(result.num_nodes for result in results)
        return results

    def end(self) -> tuple[list[int], Tensor | None]:
        return self._rounds.end()

    def reset(self) -> None:
        self._rounds.reset()


@dataclass(slots=True)
class Found:
    """Outputs of one method.

    Attributes:
        outputs: by what the prompt cache had of their prompts, and by how tokens were chosen.
        nodes: how many passes of a row had trees of so many nodes; where several passes have come to their end at
            once, all of them have their mean.
        different: prompt, most nodes and the key of `outputs`, of those that are not plain decoding's.
    """

    outputs: Counter[str] = field(default_factory=Counter)
    nodes: Counter[int] = field(default_factory=Counter)
    counters: Counters = field(default_factory=lambda: Counters(requests=0))
    different: list[list[object]] = field(default_factory=list)

    def add(self, output: Output, expected: Output, greedy: bool, where: Sequence[object]) -> None:
        counters = output.counters
        what = f"{'hit' if counters.cached_tokens else 'miss'}, {'greedy' if greedy else 'sampled'}"
        self.outputs[what] += 1
        self.counters += counters
        if (output.token_ids, output.text, output.finish_reason) != (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        ):
            self.different.append([*where, what])

    def figures(self) -> dict[str, Any]:
        return {
            "outputs": dict(self.outputs),
            "different": self.different,
            "tokens_per_pass": round(self.counters.tokens_per_pass, 2),
            "trees": trees(self.nodes),
        }


def trees(nodes: Mapping[int, int]) -> dict[str, Any]:
    """Trees of passes by their size, in words of a record."""
    seen = {size: count for size, count in nodes.items() if count}
    parts = {}
    for most, before in zip(SIZES, (-1, *SIZES), strict=False):
        name = f"{before + 1} to {most}" if most > before + 1 else str(most)
        if count := sum(count for size, count in seen.items() if before < size <= most):
            parts[name] = count
    return {
        "most_nodes": max(seen, default=0),
        "different_sizes": len(seen.keys() - {0}),
        "passes_by_nodes": parts,
    }


@dataclass(slots=True)
class Side:
    """Some rows side by side, and what was found of them.

    Attributes:
        rounds: of its engines; None where the host runs all of them.
        cache: of prompts.
    """

    llm: LLM
    rounds: FlatRounds | None
    cache: PromptCache[Any]
    found: dict[str, Found]

    @property
    def num_rows(self) -> int:
        return self.llm.target.max_batch

    def figures(self) -> dict[str, Any]:
        return {
            "outputs_compared": self.num_compared,
            "outputs_different": self.num_different,
            **({} if self.rounds is None else {"trees_of_rounds_by_the_engines": trees(self.rounds.nodes)}),
            "methods": {method: each.figures() for method, each in self.found.items()},
        }

    @property
    def num_compared(self) -> int:
        return sum(each.outputs.total() for each in self.found.values())

    @property
    def num_different(self) -> int:
        return sum(len(each.different) for each in self.found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=96, help="(default: 96)")
    parser.add_argument("--max-tokens", type=int, default=16, help="(default: 16)")
    parser.add_argument("--rows", default="8", help="decoded side by side, one number or several (default: 8)")
    parser.add_argument("--methods", help="(default: all lossless ones)")
    parser.add_argument("--turns", type=int, help="at most (default: as many as there are methods)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--precision", help="(default: int8 on a CPU, bf16 on a GPU)")
    parser.add_argument("--threads", type=int, help="(default: as many as there are free cores)")
    parser.add_argument("--once", action="store_true", help="each prompt once by each method")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sides = [side(args, num) for num in sorted({int(word) for word in args.rows.split(",")})]
    llm = sides[0].llm
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    methods = [m for m in METHODS if m in llm.methods and policy_for(m, llm.tiers).lossless_for(greedy=True)]
    if args.methods is not None:
        if unknown := [name for name in args.methods.split(",") if name not in methods]:
            raise UserError(f"{unknown[0]!r} is no lossless method here", f"choose of {', '.join(methods)}")
        methods = args.methods.split(",")
    for each in sides:
        each.found = {method: Found() for method in methods}
    began = time.monotonic()
    plain = {greedy: decoded_alone(llm, prompts, greedy, args.max_tokens) for greedy in (True, False)}
    alone_s = round(time.monotonic() - began, 1)
    print(f"{len(prompts)} prompts alone, twice, took {alone_s} s", file=sys.stderr)
    if sides[0].rounds is not None:
        sides[0].rounds.nodes.clear()  # of what the others are compared with
    settings = {"precision": llm.precision, "device": args.device, "max_tokens": args.max_tokens}
    num_turns = min(args.turns or len(methods), len(methods))
    for turn in range(1, num_turns + 1):
        for each in sides:
            take_turn(each, prompts, plain, turn, args.max_tokens, once=args.once)
            done, wrong = sum(s.num_compared for s in sides), sum(s.num_different for s in sides)
            ended = f"{turn} of {len(methods)} turns, {each.num_rows} rows"
            print(f"{ended}, {time.monotonic() - began:.0f} s: {wrong} of {done} different", file=sys.stderr)
            figures = {
                **settings,
                "prompts": len(prompts),
                "ended": ended,
                "outputs_compared": done,
                "outputs_different": wrong,
                "seconds": round(time.monotonic() - began),
                "seconds_alone": alone_s,
                "rows": {str(s.num_rows): s.figures() for s in sides},
            }
            is_last = turn == num_turns and each is sides[-1]
            with redirect_stdout(sys.stdout if is_last else io.StringIO()):
                write_record(figures, args.out, versions("torch", "transformers"), args.device)
    return 1 if any(each.num_different for each in sides) else 0


def side(args: argparse.Namespace, num_rows: int) -> Side:
    """So many rows, whose trees are as large as they may be, whatever that costs here."""
    on_cpu = args.device == "cpu"
    llm = LLM.load(
        args.bundle,
        precision=args.precision or ("int8" if on_cpu else None),
        device=args.device,
        max_batch=num_rows,
        prefill_chunk=CHUNK,
        threads=args.threads,
        say=lambda text: print(text, file=sys.stderr),
    )
    llm.costs, llm.pass_tokens = COSTS, None
    rounds = FlatRounds(llm.rounds) if llm.rounds is not None else None
    llm.rounds = rounds
    return Side(llm, rounds, llm.prompt_cache(CACHE_BYTES), {})


@dataclass(frozen=True, slots=True)
class Turn:
    """Every prompt by one method.

    Attributes:
        number: from 1 on.
        others: of which prompts tokens are chosen the other way, in trees of other sizes.
    """

    number: int
    prompts: Sequence[tuple[int, ...]]
    max_tokens: int
    others: Sequence[bool]

    def method(self, number: int, methods: Sequence[str]) -> str:
        """Of a prompt."""
        return methods[(number + self.number) % len(methods)]

    def is_greedy(self, number: int, policy: Policy) -> bool:
        """Whether a prompt's tokens are chosen so: every second's, and those of what is lossless for them alone."""
        return (number % 2 == 0) != self.others[number] or not policy.lossless_for(greedy=False)

    def request(self, number: int, method: str, policy: Policy) -> tuple[int, Request]:
        """A prompt's, and its number."""
        params = _params(number, self.is_greedy(number, policy), self.max_tokens)
        return number, Request(self.prompts[number], method, params, policy=policy)


def take_turn(
    side: Side,
    prompts: Sequence[tuple[int, ...]],
    plain: Mapping[bool, Sequence[Output]],
    number: int,
    max_tokens: int,
    *,
    once: bool,
) -> None:
    """Every prompt by one method each, once or twice.

    Args:
        number: of the turn.
        once: with what is in the prompt cache already; else with nothing, and then with what has been left there.
    """
    if not once:
        side.cache = side.llm.prompt_cache(CACHE_BYTES)
    numbers = random.Random(number).sample(range(len(prompts)), len(prompts))
    middle = len(numbers) // 2 if side.rounds is not None else len(numbers)
    for again in (False,) if once else (False, True):
        others = [(n // 8 + number) % 2 == 1 if once else again for n in range(len(prompts))]
        turn = Turn(number, prompts, max_tokens, others)
        decode(side, mixed(side, turn, numbers[:middle]), plain)
        for group in alike(side, turn, numbers[middle:]):
            decode(side, group, plain)
        numbers = numbers[middle:] + numbers[:middle]


def mixed(side: Side, turn: Turn, numbers: Sequence[int]) -> list[tuple[int, Request]]:
    """Requests for prompts, of which those that stand side by side have different methods."""
    requests, methods = [], list(side.found)
    for number in numbers:
        method = turn.method(number, methods)
        policy = sized(policy_for(method, side.llm.tiers), number + turn.others[number] * MAX_PENDING // 2)
        if side.rounds is not None and number // len(methods) % 2:
            policy = filled(policy)
        requests.append(turn.request(number, method, policy))
    return requests


def alike(side: Side, turn: Turn, numbers: Sequence[int]) -> list[list[tuple[int, Request]]]:
    """The same in groups of one policy each; in every second turn there are some that choose greedily, all of them."""
    groups: list[list[tuple[int, Request]]] = []
    methods, size = list(side.found), max(LEAST_GROUP, side.num_rows)
    most_tokens = side.rounds.most_tokens if side.rounds is not None else 0
    room = max(most_tokens // side.num_rows - 1, 1)
    for method in methods:
        own = policy_for(method, side.llm.tiers)
        of_method = [number for number in numbers if turn.method(number, methods) == method]
        if turn.number % 2:
            of_method.sort(key=lambda number: turn.is_greedy(number, own))
        for start in range(0, len(of_method), size):
            # Sizes go on from group to group and from turn to turn; 29 and 64 have no divisor in common.
            step, has_room = divmod(len(groups) + turn.number * len(methods), 2)
            policy = sized(own, 29 * step, room if has_room else MAX_PENDING)
            if (step // 2 + turn.number) % 2:
                policy = filled(policy)
            groups.append([turn.request(number, method, policy) for number in of_method[start : start + size]])
    return groups


def decode(side: Side, call: Sequence[tuple[int, Request]], plain: Mapping[bool, Sequence[Output]]) -> None:
    """Decodes requests side by side, and compares their outputs."""
    last: dict[int, tuple[int, int]] = {}

    def watch(chunk: Chunk) -> None:
        counters, (drafted, passes) = chunk.counters, last.get(chunk.index, (0, 0))
        last[chunk.index] = counters.drafted, counters.target_passes
        if num := counters.target_passes - passes:
            each, more = divmod(counters.drafted - drafted, num)
            side.found[call[chunk.index][1].method].nodes += Counter({each: num - more, each + 1: more})

    outputs = side.llm.generate([request for _, request in call], prompt_cache=side.cache, watch=watch)
    for (number, request), output in zip(call, outputs, strict=True):
        assert request.policy is not None
        greedy = request.params.greedy
        side.found[request.method].add(output, plain[greedy][number], greedy, (number, request.policy.max_pending))


def sized(policy: Policy, number: int, most: int = MAX_PENDING) -> Policy:
    """With trees of 1 to so many nodes at the most, by turns; plain decoding has none."""
    return policy.model_copy(update={"max_pending": 1 + number % most}) if policy.max_pending else policy


def filled(policy: Policy) -> Policy:
    """One that drafts what it can, whether that pays or not."""
    return policy.model_copy(update={"pays": False})


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
    sys.exit(run_command(main))
