"""What the host takes of a round that the engines run by themselves, a row: processor time from a round's coming to
the host's waiting for the next one, with text, counters and the choice of what pays.

A GPU runs the next round meanwhile, so where this is longer than a round, it is what decides. No GPU is needed to see
it: rounds are replayed here, of the tokens of a text, and take no time. Their results have been read already.

    python benchmarks/host_share.py --bundle bundles/smollm2-135m
    python benchmarks/host_share.py --bundle bundles/smollm2-135m --before ../before/.venv/bin/python

--before is the interpreter of an older checkout's environment: both run this file in turn, and the ratio is told too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CELLS = (("autoregressive", 1, 1), ("autoregressive", 32, 1), ("speculative", 8, 3), ("premium", 8, 3))
"""Method, rows, tokens that a row gains by a round."""

NUM_ROUNDS = 96
TEXT = Path(__file__).parents[1] / "docs/serving.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="interpreter of an older checkout")
    parser.add_argument("--repeats", type=int, default=40, help="of each cell; the shortest counts (default: 40)")
    parser.add_argument("--turns", type=int, default=3, help="with --before (default: 3)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tell", action="store_true", help="measure this checkout alone, and print its figures")
    args = parser.parse_args()
    if args.tell:
        print(json.dumps(measured(args)))
        return 0
    who = {"now": Path(sys.executable)} | ({"before": args.before} if args.before is not None else {})
    told: dict[str, list[list[float]]] = {name: [] for name in who}
    for _ in range(args.turns if args.before is not None else 1):
        for name, interpreter in who.items():
            told[name].append(_told(interpreter))
    cells = []
    for cell, (method, rows, tokens) in enumerate(CELLS):
        found: dict[str, Any] = {"method": method, "rows": rows, "tokens_a_round": tokens}
        shortest = {name: min(turn[cell] for turn in turns) for name, turns in told.items()}
        found |= {f"us_a_row_{name}": round(1e6 * seconds, 2) for name, seconds in shortest.items()}
        if "before" in shortest:
            found["of_before"] = round(shortest["now"] / shortest["before"], 3)
        print(found, file=sys.stderr)
        cells.append(found)
    from ssv.support.environment import versions, write_record

    write_record({"cells": cells}, args.out, versions("torch", "tokenizers"))
    return 0


def _told(interpreter: Path) -> list[float]:
    done = subprocess.run(  # noqa: S603
        [interpreter, __file__, *sys.argv[1:], "--tell"], stdout=subprocess.PIPE, text=True, check=True
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(args: argparse.Namespace) -> list[float]:
    """Seconds a row and round, of each cell."""
    from ssv.runtime.llm import LLM

    llm = LLM.load(args.bundle, max_batch=max(rows for _, rows, _ in CELLS), verify=False, threads=1)
    ids = llm.tokenizer.encode(TEXT.read_text())
    return [min(_seconds(llm, ids, *cell) for _ in range(args.repeats)) for cell in CELLS]


def _seconds(llm: Any, ids: Sequence[int], method: str, rows: int, tokens: int) -> float:
    from ssv.runtime.decode.ahead import Ahead
    from ssv.runtime.llm import policy_of
    from ssv.runtime.request import Request, SamplingParams

    most = NUM_ROUNDS * tokens
    texts = [ids[50 * row : 50 * row + most] for row in range(rows)]
    loop = llm.loop()
    batch = loop.batch
    batch._ahead = Ahead(Replay(texts, tokens), batch.drafters.get("model"), frozenset(llm.eos_token_ids))
    request = Request(tuple(ids[:6]), method, SamplingParams(max_tokens=most, ignore_eos=True))
    for row in range(rows):
        text = llm.tokenizer.text_stream(request.prompt_ids, request.params)
        loop.submit(row, request, policy_of(request, llm.tiers), text)
    while len(loop.scheduler.rows) < rows:
        list(loop.step())
    num_rounds, began = NUM_ROUNDS // 2, time.process_time()
    for _ in range(num_rounds):
        assert sum(len(chunk.token_ids) for chunk in loop.step()) == rows * tokens
    return (time.process_time() - began) / num_rounds / rows


class Replay:
    """A `RoundsEngine` whose rounds are known before: each gives every row the next tokens of its text."""

    most_tokens, most_pending, in_flight = 512, 128, 0

    def __init__(self, texts: Sequence[Sequence[int]], tokens: int) -> None:
        self._texts, self._tokens = texts, tokens
        self._rounds: list[list[Any]] = []

    def seconds(self, num_rows: int, shape: Any) -> float:
        return 1.0

    def measure(self) -> None:
        pass

    def begin(self, rows: Sequence[Any], features_BTF: Any, corrections: Any) -> None:
        self._rounds = list(reversed(self._results(len(rows))))

    def _results(self, num_rows: int) -> list[list[Any]]:
        import numpy as np

        from ssv.runtime.decode.ahead import MOST_DEPTH
        from ssv.runtime.engines.contract import GAIN_SIZES, RoundResult

        step, gains = self._tokens, np.ones((MOST_DEPTH, len(GAIN_SIZES)), dtype=np.float32)
        return [
            [
                RoundResult(tuple(text[at : at + step]), step, step, step - 1, gains if step > 1 else None)
                for text in self._texts[:num_rows]
            ]
            for at in range(0, len(self._texts[0]), step)
        ]

    def run(self, shape: Any) -> None:
        self.in_flight += 1

    def take(self) -> list[Any]:
        self.in_flight -= 1
        return self._rounds.pop()

    def end(self) -> tuple[list[int], None]:
        return [-1] * len(self._texts), None


if __name__ == "__main__":
    sys.exit(main())
