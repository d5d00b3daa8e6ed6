"""What becomes of the CPU engine when other processes use the cores?

Every setting of threads decodes the same prompt in turn, each in a process of its own, on an idle machine and beside so
many processes that do nothing but compute. The ratios to the fixed number of threads on the idle machine, in the same
run, are what counts. Servers that run already are asked as well.

    python benchmarks/busy_neighbours.py --bundle bundles/smollm2-135m --out benchmarks/records/busy_neighbours.json
        [--url follows=grpc://127.0.0.1:8001 --url fixed=grpc://127.0.0.1:8011]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssv.client.triton import Client, Settings
from ssv.runtime.threads import chosen_by_operator
from ssv.support.environment import versions, write_record

PROMPT = "Explain how rainbows form."

WORKER = """
import json, sys, time
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
settings = json.loads(sys.stdin.readline())
llm = LLM.load(settings["bundle"], threads=settings["threads"])
ids = llm.chat_ids(settings["prompt"])
print("ready", flush=True)
for line in sys.stdin:
    method, tokens = json.loads(line)
    start = time.perf_counter()
    (output,) = llm.generate([Request(ids, method, SamplingParams(max_tokens=tokens, ignore_eos=True))])
    print(output.counters.emitted / (time.perf_counter() - start), flush=True)
"""

NEIGHBOUR = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it does not outlive who has started it
    for _ in range(1_000_000):
        pass
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--methods", default="autoregressive,premium")
    parser.add_argument("--neighbours", default="0,1,2", help="busy processes (default: 0,1,2)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", help="comma-separated names of settings (default: all)")
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="a server to ask too; repeatable"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if chosen_by_operator():
        sys.exit("error: the environment fixes the number of threads\nhint: unset OMP_NUM_THREADS and MKL_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    methods = args.methods.split(",")
    with _askers(args, cores) as askers:
        cells: dict[tuple[str, str, int], list[float]] = {}
        for number in map(int, args.neighbours.split(",")):
            with _neighbours(number):
                for round_number in range(-1, args.rounds):
                    for method in methods:
                        for name, ask in askers.items():
                            rate = ask(method, 16 if round_number < 0 else args.max_tokens)
                            if round_number >= 0:
                                cells.setdefault((name, method, number), []).append(rate)
                for (name, method, beside), rates in cells.items():
                    if beside == number:
                        print(
                            f"{number} neighbours {name:24} {method:15} {statistics.median(rates):6.1f}",
                            file=sys.stderr,
                        )
    fixed = f"threads {cores}"
    rows = []
    for (name, method, number), rates in cells.items():
        idle = cells["server " + args.url[-1].split("=")[0] if name.startswith("server") else fixed, method, 0]
        rows.append(
            {
                "setting": name,
                "method": method,
                "neighbours": number,
                "tokens_per_s": round(statistics.median(rates), 1),
                "lowest": round(min(rates), 1),
                "of_fixed_idle": round(statistics.median(rates) / statistics.median(idle), 3),
            }
        )
    figures = {
        "what": "tokens/s of one request, medians over rounds; of_fixed_idle: over the fixed number of threads without "
        "neighbours (of the servers: over the last one named)",
        "cores": cores,
        "rounds": args.rounds,
        "rows": rows,
    }
    write_record(figures, args.out, versions("torch"))
    return 0


@contextmanager
def _askers(args: argparse.Namespace, cores: int) -> Iterator[dict[str, Callable[[str, int], float]]]:
    """What answers, by name, with tokens/s."""
    settings: dict[str, int | None] = {"follows": None, f"threads {cores}": cores, "threads 1": 1}
    if args.settings is not None:
        if unknown := set(args.settings.split(",")) - settings.keys():
            sys.exit(f"--settings: {', '.join(sorted(unknown))} is unknown; known: {', '.join(settings)}")
        settings = {name: settings[name] for name in args.settings.split(",")}
    workers = []
    askers: dict[str, Callable[[str, int], float]] = {}
    for name, threads in settings.items():
        worker = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workers.append(worker)
        start = {"bundle": str(args.bundle.resolve()), "threads": threads, "prompt": PROMPT}
        assert _say(worker, start) == "ready\n", name
        askers[name] = lambda method, tokens, worker=worker: float(_say(worker, [method, tokens]))
    clients = []
    for named in args.url:
        name, _, url = named.partition("=")
        clients.append(Client(url))
        askers[f"server {name}"] = lambda method, tokens, client=clients[-1]: _ask_server(client, method, tokens)
    try:
        yield askers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for client in clients:
            client.close()


def _say(worker: subprocess.Popen[str], line: object) -> str:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(line) + "\n")
    worker.stdin.flush()
    return worker.stdout.readline()


def _ask_server(client: Client, method: str, tokens: int) -> float:
    start = time.perf_counter()
    replies = list(client.stream(PROMPT, Settings(tier=method, chat=True, max_tokens=tokens, min_tokens=tokens)))
    return sum(reply.num_output_tokens for reply in replies) / (time.perf_counter() - start)


@contextmanager
def _neighbours(number: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(number)]  # noqa: S603
    time.sleep(1)
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
