"""What becomes of the CPU engine when other processes use the cores?

Every setting of threads decodes the same prompt in turn, each in a process of its own, on an idle machine and beside so
many processes that do nothing but compute. The ratios to the fixed number of threads on the idle machine, in the same
run, are what counts. Servers that run already are asked as well. More threads than cores are free for are slow, and all
wait for them in turn: `--settings ""` asks the servers alone.

    python benchmarks/busy_neighbours.py --bundle bundles/smollm2-135m --out benchmarks/records/busy_neighbours.json
        [--url follows=grpc://127.0.0.1:8001 --url fixed=grpc://127.0.0.1:8011]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ssv.client.triton import Client, ServerError, Settings
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


Ask = Callable[[str, int], float]
"""Tokens/s of a method's answer of so many tokens."""

Cells = dict[tuple[str, str, int], list[float]]
"""What was measured, by setting, method and number of neighbours."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--methods", default="autoregressive,premium", help="(default: autoregressive,premium)")
    parser.add_argument("--neighbours", default="0,1,2", help="busy processes (default: 0,1,2)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="at the most (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="after which no further round begins (default: 600)"
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait for an answer, else it ends (default: 120)"
    )
    parser.add_argument("--settings", help='comma-separated names of settings; "" for the servers alone (default: all)')
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="a server to ask too; repeatable (default: none)"
    )
    parser.add_argument("--out", type=Path, help="the record (default: standard output alone)")
    args = parser.parse_args(argv)
    if chosen_by_operator():
        sys.exit("error: the environment fixes the number of threads\nhint: unset OMP_NUM_THREADS and MKL_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    numbers = [int(number) for number in args.neighbours.split(",")]
    with _askers(args, cores) as askers:
        cells = _measured(askers, args.methods.split(","), numbers, args)
    figures = {
        "what": "tokens/s of one request, medians over rounds; of_fixed_idle: over the fixed number of threads without "
        "neighbours (of the servers: over the last one named), null where that was not measured",
        "cores": cores,
        "max_tokens": args.max_tokens,
        "rows": _rows(cells, f"threads {cores}", f"server {_name(args.url[-1])}" if args.url else None),
    }
    write_record(figures, args.out, versions("torch"))
    return 0


def _measured(
    askers: Mapping[str, Ask], methods: Sequence[str], numbers: Sequence[int], args: argparse.Namespace
) -> Cells:
    """Asks everybody in turn, so that what the machine does meanwhile meets all of them.

    Every number of neighbours has an equal part of the time that is left and at least one round: beside two busy
    processes the slowest setting takes twenty times as long as on an idle machine.
    """
    cells: Cells = {}
    end = time.monotonic() + args.seconds
    for i, number in enumerate(numbers):
        now = time.monotonic()
        stop = now + max(0.0, end - now) / (len(numbers) - i)
        with _neighbours(number):
            for round_number in range(-1, args.rounds):
                if round_number > 0 and time.monotonic() > stop:
                    break
                for method in methods:
                    for name, ask in askers.items():
                        rate = ask(method, 16 if round_number < 0 else args.max_tokens)
                        if round_number >= 0:
                            cells.setdefault((name, method, number), []).append(rate)
                print(f"{number} neighbours, round {round_number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for (name, method, beside), rates in cells.items():
            if beside == number:
                print(
                    f"{number} neighbours {name:24} {method:15} {statistics.median(rates):6.1f}",
                    file=sys.stderr,
                    flush=True,
                )
    return cells


def _rows(cells: Cells, fixed: str, own_server: str | None) -> list[dict[str, object]]:
    """The record's rows.

    Args:
        fixed: the setting that others are compared with.
        own_server: the server that servers are compared with.
    """
    rows: list[dict[str, object]] = []
    for (name, method, number), rates in cells.items():
        compared_with = own_server if own_server and name.startswith("server ") else fixed
        idle = cells.get((compared_with, method, 0))
        rows.append(
            {
                "setting": name,
                "method": method,
                "neighbours": number,
                "rounds": len(rates),
                "tokens_per_s": round(statistics.median(rates), 1),
                "lowest": round(min(rates), 1),
                "of_fixed_idle": round(statistics.median(rates) / statistics.median(idle), 3) if idle else None,
            }
        )
    return rows


def _name(named_url: str) -> str:
    return named_url.partition("=")[0]


@contextmanager
def _askers(args: argparse.Namespace, cores: int) -> Iterator[dict[str, Ask]]:
    """What answers, by name."""
    settings: dict[str, int | None] = {"follows": None, f"threads {cores}": cores, "threads 1": 1}
    if args.settings is not None:
        wanted = [name for name in args.settings.split(",") if name]
        if unknown := set(wanted) - settings.keys():
            sys.exit(f"--settings: {', '.join(sorted(unknown))} is unknown; known: {', '.join(settings)}")
        settings = {name: settings[name] for name in wanted}
    if not settings and not args.url:
        sys.exit("error: there is nobody to ask\nhint: name settings with --settings, or servers with --url")
    workers: list[subprocess.Popen[str]] = []
    clients: list[Client] = []
    askers: dict[str, Ask] = {}
    try:
        for name, threads in settings.items():
            worker = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            workers.append(worker)
            start = {"bundle": str(args.bundle.resolve()), "threads": threads, "prompt": PROMPT}
            if (said := _say(worker, start, args.patience)) != "ready\n":
                sys.exit(f"error: the process of {name} said {said!r} instead of ready")
            askers[name] = lambda method, tokens, worker=worker: float(_say(worker, [method, tokens], args.patience))
        for named in args.url:
            clients.append(Client(named.partition("=")[2]))
            askers[f"server {_name(named)}"] = lambda method, tokens, client=clients[-1]: _ask_server(
                client, method, tokens, args.patience
            )
        yield askers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for client in clients:
            client.close()


def _say(worker: subprocess.Popen[str], line: object, patience: float) -> str:
    """A worker's answer to a line, which is a line."""
    assert worker.stdin is not None and worker.stdout is not None
    with suppress(BrokenPipeError):  # whose end shows below
        worker.stdin.write(json.dumps(line) + "\n")
        worker.stdin.flush()
    if not select.select([worker.stdout], [], [], patience)[0]:
        sys.exit(f"error: no answer came in {patience:g} s\nhint: give more --patience, or fewer --max-tokens")
    if not (said := worker.stdout.readline()):
        sys.exit(f"error: a process that decodes ended with status {worker.wait()}")
    return said


def _ask_server(client: Client, method: str, tokens: int, patience: float) -> float:
    start = time.perf_counter()
    settings = Settings(tier=method, chat=True, max_tokens=tokens, min_tokens=tokens)
    try:
        replies = list(client.stream(PROMPT, settings, patience=patience))
    except ServerError as error:
        sys.exit(f"error: {error}")
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
