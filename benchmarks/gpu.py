"""What the CUDA engine takes for its steps, and what every method makes of it, on one GPU.

Steps: milliseconds of a replayed graph alone, and of a whole step with its answer on the host. Methods: tokens/s over
prompts that follow one another in so many rows, greedy and sampled, as a median with its range and as the median ratio
to the first method in the same turn, and whether lossless methods give plain decoding's text; how long a prompt alone
takes to its first token.

    python benchmarks/gpu.py --bundle bundles/smollm2-135m --out benchmarks/records/gpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ssv import LLM, Output, Request, SamplingParams
from ssv.runtime.engines.contract import RoundRow
from ssv.runtime.engines.cuda.engine import CudaEngine, Shape
from ssv.runtime.engines.cuda.rounds import settings_of
from ssv.runtime.methods import policy_for
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
METHODS = "autoregressive,prompt-lookup,suffix,speculative,eagle,premium,balanced,turbo"
REPEATS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 1": {"temperature": 1.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--waves", type=int, default=4, help="prompts for each row, 16 in all at least (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--methods", default=METHODS, help=f"(default: {METHODS})")
    parser.add_argument("--settings", default="greedy", help=f"separated by semicolons, of: {'; '.join(SETTINGS)}")
    parser.add_argument("--rows", default="1,8", help="side by side (default: 1,8)")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64", help="of a pass (default: 1,2,4,8,16,32,64)")
    parser.add_argument("--contexts", default="128,1024", help="tokens before a pass (default: 128,1024)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [int(word) for word in args.rows.split(",")]
    llms = {num: load(args.bundle, num) for num in rows}
    llm = llms[rows[0]]
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "costs": llm.costs and llm.costs.model_dump()}
    tokens = [int(word) for word in args.tokens.split(",")]
    for name, engine in (("pass", llm.target), ("draft_step", llm.draft)):
        assert isinstance(engine, CudaEngine)
        for context in map(int, args.contexts.split(",")):
            figures[f"{name}_at_{context}"] = {num: step_times(engine, num, context) for num in tokens}
            print(name, context, figures[f"{name}_at_{context}"], file=sys.stderr)
    figures["chosen_ms"] = {setting: choosing_times(llm, setting) for setting in SETTINGS}
    print("chosen", figures["chosen_ms"], file=sys.stderr)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)]
    names = args.methods.split(",")
    for setting in args.settings.split(";"):
        params = [
            SamplingParams(max_tokens=args.max_tokens, seed=n, **SETTINGS[setting.strip()]) for n in range(len(prompts))
        ]
        requests = list(zip(prompts, params, strict=True))
        key = "methods" if setting == "greedy" else f"methods, {setting.strip()}"
        figures[key] = {num: methods(llms[num], requests[: max(16, args.waves * num)], names, num) for num in rows}
    write_record(figures, args.out, versions("torch", "triton", "transformers"))
    return 0


def load(bundle: Path, rows: int) -> LLM:
    return LLM.load(bundle, device="cuda", max_batch=rows, say=lambda text: print(text, file=sys.stderr))


def step_times(engine: CudaEngine, num: int, context: int) -> dict[str, float]:
    """Milliseconds of a step of so many tokens behind a text: of its graph, and of all of it."""
    ids, slot, gather = (
        torch.ones(1, num, dtype=torch.long),
        torch.tensor([context], dtype=torch.int32),
        torch.arange(num),
    )
    features = torch.zeros(1, num, engine.num_features, device=engine.device) if engine.num_features else None

    def step() -> None:
        out = engine.step(ids, slot, gather, features)
        assert out.token_R is not None
        out.token_R.tolist()

    step()
    return {
        "graph_ms": median_ms(engine.last_graph.replay, on_device=True),
        "step_ms": median_ms(step, on_device=False),
    }


def choosing_times(llm: LLM, setting: str) -> dict[str, float]:
    """Milliseconds that a pass of one token and of eight, and a draft's level of one, take with tokens chosen like
    that; of a graph whose logits are those of one text."""
    found = {}
    params = SamplingParams(seed=1, **SETTINGS[setting])
    row = RoundRow(128, 1, 100, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=1)
    settings = settings_of([row], [0])
    for name, engine, num in (
        ("pass of 1", llm.target, 1),
        ("pass of 8", llm.target, 8),
        ("draft level", llm.draft, 1),
    ):
        assert isinstance(engine, CudaEngine)
        step_times(engine, num, 128)
        engine.buffers.sample(settings)
        grows = (4, 4) if name == "draft level" else None
        shape = Shape(8, 1, True, False, grows, samples=not params.greedy, grown=grows is not None)
        numbers = engine.buffers.step.clone()
        graph = engine.graph(shape)

        def run(engine: CudaEngine = engine, numbers: torch.Tensor = numbers, graph: Any = graph) -> None:
            engine.buffers.step.copy_(numbers)
            graph.replay()

        found[name] = median_ms(run, on_device=True)
    return found


def median_ms(run: Callable[[], object], *, on_device: bool, repeats: int = 60) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    if on_device:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        found = [one.elapsed_time(other) for one, other in pairwise(events)]
    else:
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            found.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(found), 4)


def methods(
    llm: LLM, prompts: Sequence[tuple[tuple[int, ...], SamplingParams]], names: Sequence[str], rows: int
) -> dict[str, dict[str, Any]]:
    """Each method over all prompts, a row taking the next one when its own has ended: the middle one of `REPEATS` runs
    behind one that captures graphs, the methods in turns, as a host has faster and slower times."""
    runs: dict[str, list[tuple[float, list[Output]]]] = {name: [] for name in names}
    for _ in range(1 + REPEATS):
        for name in names:
            began = time.perf_counter()
            outputs = llm.generate([Request(ids, name, params) for ids, params in prompts])
            runs[name].append((sum(len(o.token_ids) for o in outputs) / (time.perf_counter() - began), outputs))
    found: dict[str, dict[str, Any]] = {}
    plain = [output.token_ids for output in runs[names[0]][-1][1]]
    for name in names:
        rates = [rate for rate, _ in runs[name][1:]]
        outputs = runs[name][-1][1]
        texts = [output.token_ids for output in outputs]
        emitted = sum(map(len, texts))
        passes = sum(output.counters.target_passes for output in outputs)
        of_first = [rate / first for rate, (first, _) in zip(rates, runs[names[0]][1:], strict=True)]
        found[name] = {
            "tokens_per_s": round(statistics.median(rates), 1),
            "range": [round(min(rates), 1), round(max(rates), 1)],
            f"of_{names[0]}": round(statistics.median(of_first), 3),
            "tokens_per_pass": round((emitted - len(texts)) / passes, 3),
            "first_token_ms": round(1e3 * first_token_s(llm, prompts[:16], name), 2),
            "lossless": policy_for(name, llm.tiers).lossless,
            "same_text": sum(all(turn[i].token_ids == plain[i] for _, turn in runs[name]) for i in range(len(plain))),
            "of": len(texts),
        }
        print(rows, name, found[name], file=sys.stderr)
    return found


def first_token_s(llm: LLM, prompts: Sequence[tuple[tuple[int, ...], SamplingParams]], name: str) -> float:
    """The median of prompts that come alone."""
    outputs = [llm.generate([Request(ids, name, replace(params, max_tokens=1))])[0] for ids, params in prompts]
    return statistics.median(output.counters.first_token_s for output in outputs)


if __name__ == "__main__":
    sys.exit(main())
