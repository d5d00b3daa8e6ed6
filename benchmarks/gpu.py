"""What the CUDA engine takes for its steps, and what every method makes of it, on one GPU.

Steps: milliseconds of a replayed graph alone, and of a whole step with its answer on the host. Methods: tokens/s over
prompts that follow one another in so many rows, greedy and sampled, as a median with its range and as the median ratio
to the first method in the same turn, and whether lossless methods give plain decoding's text; how long a prompt alone
takes to its first token.

With `--context` prompts have other text before them, up to so many tokens. At such lengths prompts would take most of
the time, and the first rows would have ended before the last ones begin. So these prompts are in the prompt cache, rows
begin together, the next ones when all of them have ended, and the rate of decoding alone is told beside: tokens that
came behind the last row's first one, over the time from that until all had ended.

    python benchmarks/gpu.py --bundle bundles/smollm2-135m --out benchmarks/records/gpu.json
    python benchmarks/gpu.py --bundle bundles/smollm2-135m --no-steps --rows 1,8,32,64 --context 512,4000,7900 \\
        --waves 1 --repeats 2 --out benchmarks/records/gpu_contexts.json

The record is written whenever a further number of rows has been measured.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ssv import LLM, Chunk, Output, Request, SamplingParams
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.engines.contract import RoundRow
from ssv.runtime.engines.cuda.engine import CudaEngine, Shape
from ssv.runtime.engines.cuda.rounds import settings_of
from ssv.runtime.methods import policy_for
from ssv.support.console import run_command
from ssv.support.environment import versions, write_record
from ssv.support.errors import UserError
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
VARIED = ROOT / "builder/presets/prompts/varied.jsonl"
METHODS = "autoregressive,prompt-lookup,suffix,speculative,eagle,premium,balanced,turbo"
MARGIN = 64
"""Tokens by which prompts may be longer than asked for."""

CACHE_BYTES = 1 << 36
"""Of the prompt cache, on the GPU. 64 prompts of 7,900 tokens have 12 GB of keys and values, and are in it twice: with
what a draft has of them, and without."""

ALONE, ALONE_OF_LONG = 16, 3
"""Prompts that come alone, to see how long they take to their first token."""

PROMPT_TOKENS = (64, 128, 256, 512)
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
    parser.add_argument("--context", default="0", help="tokens of prompts, 0 as they are (default: 0)")
    parser.add_argument("--others", type=Path, default=VARIED, help="prompts that --context puts before them")
    parser.add_argument("--repeats", type=int, default=5, help="behind one that captures graphs (default: 5)")
    parser.add_argument("--no-steps", action="store_true", help="measure no steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [int(word) for word in args.rows.split(",")]
    wanted = [int(word) for word in args.context.split(",")]
    llms = {num: load(args.bundle, num, max(2048, max(wanted) + args.max_tokens + MARGIN)) for num in rows}
    llm = llms[rows[0]]
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "costs": llm.costs and llm.costs.model_dump()}
    if not args.no_steps:
        figures |= steps(llm, args)
    texts, others = read_prompts(args.prompts), read_prompts(args.others)
    cells = [(setting.strip(), tokens) for tokens in wanted for setting in args.settings.split(";")]
    for cell, (setting, tokens) in enumerate(cells):
        length = whole(llm, tokens) if tokens else 0
        prompts = longer(llm, texts, others, length) if length else [llm.chat_ids(text) for text in texts]
        if (most := max(map(len, prompts)) + args.max_tokens) > llm.max_length:
            raise UserError(f"prompts and outputs of {most} tokens: there are {llm.max_length} at most")
        params = [SamplingParams(max_tokens=args.max_tokens, seed=n, **SETTINGS[setting]) for n in range(len(prompts))]
        requests = list(zip(prompts, params, strict=True))
        key = ", ".join(["methods", *([] if setting == "greedy" else [setting])]) + (
            f" behind {length}" if length else ""
        )
        cache = llm.prompt_cache(CACHE_BYTES) if length else None
        for num in rows:
            # One cache for all, as their engines have the same weights and kernels.
            count = min(max(16, args.waves * num), len(requests))
            if length and count > num:
                count -= count % num  # rows are to be full
            found = methods(llms[num], requests[:count], args, num, cache)
            figures.setdefault(key, {})[num] = found
            is_last = cell == len(cells) - 1 and num == rows[-1]
            with redirect_stdout(sys.stdout if is_last else io.StringIO()):
                write_record(figures, args.out, versions("torch", "triton", "transformers"))
    return 0


def load(bundle: Path, rows: int, max_length: int = 2048) -> LLM:
    return LLM.load(
        bundle,
        device="cuda",
        max_batch=rows,
        max_length=max_length,
        say=lambda text: print(text, file=sys.stderr),
    )


def whole(llm: LLM, tokens: int) -> int:
    """A length of prompts near one, all of which the prompt cache can have but for their last token: rows that have
    nothing else to run begin together."""
    return max(round((tokens - 1) / llm.prefill_chunk), 1) * llm.prefill_chunk + 1


def longer(llm: LLM, texts: Sequence[str], others: Sequence[str], length: int) -> list[tuple[int, ...]]:
    """Prompts of so many tokens, with others of another order before each of them, so that none begins like the next
    one; those that are as long by themselves stay as they are."""
    lines = [f"- {other}\n" for other in others]
    num_tokens = {line: len(llm.tokenizer.encode(line)) for line in lines}
    prompts = []
    for number, text in enumerate(texts):
        alone = llm.chat_ids(text)
        ids, before, shuffled = alone, "", random.Random(number)
        while len(ids) < length:
            missing = length - len(ids)
            for line in shuffled.sample(lines, len(lines)):
                before += line
                missing -= num_tokens[line]
                if missing < 0:
                    break
            ids = llm.chat_ids(f"Others have asked:\n{before}\n{text}")
        surplus = max(len(ids) - length, 0) if ids is not alone else 0
        first = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), 0)
        prompts.append((*ids[:first], *ids[first + surplus :]))
    return prompts


def steps(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """What steps take, and choosing."""
    figures: dict[str, Any] = {}
    tokens = [int(word) for word in args.tokens.split(",")]
    for name, engine in (("pass", llm.target), ("draft_step", llm.draft)):
        assert isinstance(engine, CudaEngine)
        for context in map(int, args.contexts.split(",")):
            figures[f"{name}_at_{context}"] = {num: step_times(engine, num, context) for num in tokens}
            print(name, context, figures[f"{name}_at_{context}"], file=sys.stderr)
            if engine is llm.target:
                figures[f"prompt_at_{context}"] = found = {
                    num: step_times(engine, num, context, of_prompt=True) for num in PROMPT_TOKENS
                }
                print("prompt", context, found, file=sys.stderr)
    figures["chosen_ms"] = {setting: choosing_times(llm, setting) for setting in SETTINGS}
    print("chosen", figures["chosen_ms"], file=sys.stderr)
    return figures


def step_times(engine: CudaEngine, num: int, context: int, *, of_prompt: bool = False) -> dict[str, float]:
    """Milliseconds of a step of so many tokens behind a text: of its graph, and of all of it.

    Args:
        of_prompt: whether the last token alone gets logits, and all of them features.
    """
    ids, slot, gather = (
        torch.ones(1, num, dtype=torch.long),
        torch.tensor([context], dtype=torch.int32),
        torch.arange(num)[-1:] if of_prompt else torch.arange(num),
    )
    features = torch.zeros(1, num, engine.num_features, device=engine.device) if engine.num_features else None

    def step() -> None:
        out = engine.step(ids, slot, gather, features, features_out=of_prompt)
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


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts by a method.

    Attributes:
        tokens_per_s: of all of it.
        decoding_per_s: the same, but for what came before the last row's first token; None where prompts follow one
            another.
        share_of_rows: of these, that had not ended, on average over the time behind that.
    """

    outputs: list[Output]
    tokens_per_s: float
    decoding_per_s: float | None = None
    share_of_rows: float | None = None


def methods(
    llm: LLM,
    prompts: Sequence[tuple[tuple[int, ...], SamplingParams]],
    args: argparse.Namespace,
    rows: int,
    cache: PromptCache[Any] | None,
) -> dict[str, dict[str, Any]]:
    """Each method over all prompts: the middle one of some runs behind one that captures graphs, the methods in turns,
    as a host has faster and slower times.

    Args:
        cache: has, or gets, all of the prompts, and rows begin together; None: a row takes the next prompt when its own
            has ended.
    """
    names = args.methods.split(",")
    lane, num_alone = llm.lane, ALONE if cache is None else ALONE_OF_LONG
    if cache is not None:
        for name in names:
            llm.generate(
                [Request(ids, name, replace(params, max_tokens=1)) for ids, params in prompts], prompt_cache=cache
            )
        print(rows, "prompts are in the cache:", cache.stats, file=sys.stderr)
        llm.lane = None  # prompts of which one token is left to run need none, and are begun together without
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(1 + args.repeats):
        for name in names:
            requests = [Request(ids, name, params) for ids, params in prompts]
            runs[name].append(
                one_behind_another(llm, requests) if cache is None else together(llm, requests, rows, cache)
            )
    llm.lane = lane
    found: dict[str, dict[str, Any]] = {}
    plain = [output.token_ids for output in runs[names[0]][-1].outputs]
    for name in names:
        outputs = runs[name][-1].outputs
        emitted = sum(len(output.token_ids) for output in outputs)
        passes = sum(output.counters.target_passes for output in outputs)
        found[name] = {
            **rates(
                "tokens_per_s", "range", f"of_{names[0]}", runs[name], runs[names[0]], lambda run: run.tokens_per_s
            ),
            "tokens_per_pass": round((emitted - len(outputs)) / passes, 3) if passes else None,
            "first_token_ms": round(1e3 * first_token_s(llm, prompts[:num_alone], name), 2),
            "lossless": policy_for(name, llm.tiers).lossless,
            "same_text": sum(
                all(run.outputs[i].token_ids == plain[i] for run in runs[name]) for i in range(len(plain))
            ),
            "of": len(outputs),
        }
        if cache is not None:
            keys = "decoding_tokens_per_s", "decoding_range", f"decoding_of_{names[0]}"
            found[name] |= rates(*keys, runs[name], runs[names[0]], lambda run: run.decoding_per_s)
            found[name]["share_of_rows"] = round(statistics.median(run.share_of_rows or 0 for run in runs[name][1:]), 3)
        print(rows, name, found[name], file=sys.stderr)
    return found


def rates(
    rate: str, spread: str, ratio: str, runs: Sequence[Run], firsts: Sequence[Run], of: Callable[[Run], float | None]
) -> dict[str, Any]:
    """The middle one of rates, their range, and the middle ratio to the first method's in the same turn."""
    own, others = ([of(run) or 0.0 for run in each[1:]] for each in (runs, firsts))
    return {
        rate: round(statistics.median(own), 1),
        spread: [round(min(own), 1), round(max(own), 1)],
        ratio: round(statistics.median(a / b if b else 0.0 for a, b in zip(own, others, strict=True)), 3),
    }


def one_behind_another(llm: LLM, requests: Sequence[Request]) -> Run:
    """Prompts, a row taking the next one when its own has ended."""
    began = time.perf_counter()
    outputs = llm.generate(requests)
    return Run(outputs, sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began))


def together(llm: LLM, requests: Sequence[Request], rows: int, cache: PromptCache[Any]) -> Run:
    """As many prompts at a time as there are rows."""
    outputs: list[Output] = []
    num_decoded, decoding_s, rows_s, seconds = 0, 0.0, 0.0, 0.0
    for start in range(0, len(requests), rows):
        came: dict[int, list[tuple[float, int]]] = {}

        def watch(chunk: Chunk, came: dict[int, list[tuple[float, int]]] = came) -> None:
            came.setdefault(chunk.index, []).append((time.perf_counter(), len(chunk.token_ids)))

        began = time.perf_counter()
        outputs += llm.generate(requests[start : start + rows], prompt_cache=cache, watch=watch)
        seconds += time.perf_counter() - began
        all_in = max(chunks[0][0] for chunks in came.values())
        num_decoded += sum(num for chunks in came.values() for at, num in chunks if at > all_in)
        ends = [max(chunks[-1][0], all_in) - all_in for chunks in came.values()]
        decoding_s += max(ends)
        rows_s += sum(ends)
    num_tokens = sum(len(output.token_ids) for output in outputs)
    per_s, share = (num_decoded / decoding_s, rows_s / rows / decoding_s) if decoding_s else (0.0, 0.0)
    return Run(outputs, num_tokens / seconds, per_s, share)


def first_token_s(llm: LLM, prompts: Sequence[tuple[tuple[int, ...], SamplingParams]], name: str) -> float:
    """The median of prompts that come alone."""
    outputs = [llm.generate([Request(ids, name, replace(params, max_tokens=1))])[0] for ids, params in prompts]
    return statistics.median(output.counters.first_token_s for output in outputs)


if __name__ == "__main__":
    sys.exit(run_command(main))
