"""What the server costs: one stream over gRPC against the same decoding in-process, and many streams against one.

Each round decodes the same prompts in-process and over gRPC, one after the other, in turns; then with one client and
with as many as `--clients` says at the same time. In-process decoding and the server take turns too: neither runs while
the other is measured. The ratios within the run are what counts. The outputs of all are compared.

    python benchmarks/serving.py --bundle bundles/smollm2-135m --out benchmarks/records/serving.json
    python benchmarks/serving.py --bundle bundles/smollm2-135m --device cuda --clients 8,32 --out serving_gpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from server_under_test import ServerUnderTest, percentile

from ssv.client.triton import Settings
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.support.console import add_device
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]

PAUSE_SECONDS = 0.3
"""Between two measurements: OpenMP's threads of the one before still spin for a while, and take the cores from the one
after.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/demo.jsonl")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", default="8", help="at the same time: numbers, separated by commas")
    parser.add_argument("--requests-per-client", type=int, default=3, help="of those at the same time")
    add_device(parser)
    parser.add_argument("--methods", default="premium,balanced,turbo,autoregressive")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)[: args.num_prompts]
    tiers, most = args.methods.split(","), max(map(int, args.clients.split(",")))
    llm = LLM.load(args.bundle, device=args.device, max_batch=most)
    # Neither run may find what another has computed.
    options = ("--device", args.device, "--max-rows", str(most), "--prompt-cache-mb", "0")
    with ServerUnderTest(args.bundle, *options) as server:
        figures = {tier: measure(llm, server, prompts, tier, args) for tier in tiers}
        status = server.stop()
    write_record(
        {"tiers": figures, "exit_status": status},
        args.out,
        versions("torch", "nvidia-pytriton", "tritonclient", "grpcio"),
        args.device,
    )
    return 0


def measure(
    llm: LLM, server: ServerUnderTest, prompts: list[str], tier: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Ratios of one tier."""
    settings = Settings(tier=tier, max_tokens=args.max_tokens)
    params = SamplingParams(max_tokens=args.max_tokens)
    client = server.client()

    def inside(prompt: str) -> tuple[str, float]:
        time.sleep(PAUSE_SECONDS)
        start = time.perf_counter()
        output = llm.generate([Request(llm.chat_ids(prompt), tier, params)])[0]
        return output.text, time.perf_counter() - start

    def outside(prompt: str) -> tuple[str, float, float]:
        time.sleep(PAUSE_SECONDS)
        start, first, text = time.perf_counter(), 0.0, ""
        for reply in client.stream(prompt, settings):
            first = first or time.perf_counter() - start
            text += reply.text
        return text, first, time.perf_counter() - start

    inside(prompts[0]), outside(prompts[0])
    expected, ratios, firsts, alone, different, compared = {}, [], [], [], 0, 0
    together: dict[int, list[tuple[float, list[float], int]]] = {int(num): [] for num in args.clients.split(",")}
    for number in range(args.rounds):
        for prompt in prompts:
            if number % 2:
                (served, first, served_s), (text, own_s) = outside(prompt), inside(prompt)
            else:
                (text, own_s), (served, first, served_s) = inside(prompt), outside(prompt)
            expected[prompt] = text
            different += served != text
            ratios.append(own_s / served_s)
            firsts.append(first)
        alone.append(load(server, prompts, settings, 1, expected))
        for num, runs in together.items():
            asked = [prompts[i % len(prompts)] for i in range(num * args.requests_per_client)]
            runs.append(load(server, asked, settings, num, expected))
            compared += len(asked)
        rates = " ".join(f"{runs[-1][0]:.1f}" for runs in (alone, *together.values()))
        print(f"{tier} round {number + 1}: {ratios[-1]:.3f} {rates}", file=sys.stderr, flush=True)
    client.close()
    different += sum(wrong for runs in (alone, *together.values()) for *_, wrong in runs)
    return {
        "one_stream_of_in_process": round(statistics.median(ratios), 3),
        "one_stream_of_in_process_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "first_token_ms_median": round(statistics.median(firsts) * 1e3, 1),
        "tokens_per_s_one": round(statistics.median(rate for rate, *_ in alone), 1),
        "together": {str(num): figures_together(runs, alone) for num, runs in together.items()},
        "different_outputs": different,
        "outputs_compared": args.rounds * len(prompts) * 2 + compared,
    }


def figures_together(
    runs: list[tuple[float, list[float], int]], alone: list[tuple[float, list[float], int]]
) -> dict[str, Any]:
    """Figures of many clients, each run against one client of the same round."""
    gains = [many[0] / one[0] for one, many in zip(alone, runs, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(rate for rate, *_ in runs), 1),
        "over_one": round(statistics.median(gains), 2),
        "over_one_range": [round(min(gains), 2), round(max(gains), 2)],
        "first_token_ms_p95": round(percentile([f for _, all, _ in runs for f in all], 0.95) * 1e3, 1),
    }


def load(
    server: ServerUnderTest, prompts: list[str], settings: Settings, clients: int, expected: dict[str, str]
) -> tuple[float, list[float], int]:
    """Tokens per second of so many clients that share the prompts, times to first tokens, and how many outputs were
    other than expected.
    """
    todo, lock = list(prompts), threading.Lock()
    firsts: list[float] = []
    tokens = wrong = 0

    def work() -> None:
        nonlocal tokens, wrong
        with server.client() as client:
            while True:
                with lock:
                    if not todo:
                        return
                    prompt = todo.pop()
                start, first, text, count = time.perf_counter(), 0.0, "", 0
                for reply in client.stream(prompt, settings):
                    first = first or time.perf_counter() - start
                    text += reply.text
                    count += reply.num_output_tokens
                with lock:
                    firsts.append(first)
                    tokens += count
                    wrong += text != expected[prompt]

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tokens / (time.perf_counter() - start), firsts, wrong


if __name__ == "__main__":
    sys.exit(main())
