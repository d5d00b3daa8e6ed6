"""How long requests that come at the same moment wait for their first tokens, and in Triton's queue before them.

A burst is as many requests as the server has rows, or fewer, each of a connection of its own that is open already, with
a prompt of its own. With `--before`, a server of another checkout stands beside this one's, and they take turns, burst
by burst: neither has a request while the other is measured.

    python benchmarks/bursts.py --bundle bundles/smollm2-135m --before ../before/.venv/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_under_test import ServerUnderTest, percentile

from ssv.client.triton import Client, Settings
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]

LATE_SECONDS = 0.45
"""Triton's batcher waits up to half a second where nobody wakes it."""

PAUSE_SECONDS = 0.3
"""Between two bursts: OpenMP's threads of the one before still spin for a while."""

QUEUE, COMPUTE = "nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us"


@dataclass(slots=True)
class Found:
    """What bursts of one size have shown.

    Attributes:
        firsts: seconds to the first token, of each request.
        queued_s, computed_s: sums over the requests, of `preprocessing`: in Triton's queue before it, and in it.
    """

    firsts: list[float] = field(default_factory=list)
    queued_s: float = 0.0
    computed_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        ms = {name: percentile(self.firsts, share) * 1e3 for name, share in (("p50", 0.5), ("p95", 0.95))}
        ms["most"] = max(self.firsts) * 1e3
        return {
            "requests": len(self.firsts),
            **{f"first_token_ms_{name}": round(value, 1) for name, value in ms.items()},
            f"first_token_after_{LATE_SECONDS:g}_s": sum(first > LATE_SECONDS for first in self.firsts),
            "preprocessing_queue_ms_mean": round(self.queued_s / len(self.firsts) * 1e3, 2),
            "preprocessing_compute_ms_mean": round(self.computed_s / len(self.firsts) * 1e3, 2),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="interpreter of another checkout, whose server is compared")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/demo.jsonl")
    parser.add_argument("--bursts", default="1,4,8", help="requests of a burst")
    parser.add_argument("--rounds", type=int, default=40, help="bursts of each size")
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--method", default="premium")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pythons = {"now": Path(sys.executable)} | ({"before": args.before} if args.before is not None else {})
    sizes = [int(size) for size in args.bursts.split(",")]
    prompts = read_prompts(args.prompts)
    settings = Settings(tier=args.method, max_tokens=args.max_tokens)
    found = {name: {size: Found() for size in sizes} for name in pythons}
    options = ("--max-rows", str(args.max_rows), "--prompt-cache-mb", "0")
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(ServerUnderTest(args.bundle, *options, python=python))
            for name, python in pythons.items()
        }
        clients = {
            name: [stack.enter_context(server.client()) for _ in range(max(sizes))] for name, server in servers.items()
        }
        for name, server in servers.items():  # connections open, engines warm
            burst(server, clients[name], prompts[: max(sizes)], settings, Found())
        for number in range(args.rounds):
            for size in sizes:
                chosen = [prompts[(number + at) % len(prompts)] for at in range(size)]
                for name in list(servers) if number % 2 else reversed(servers):
                    burst(servers[name], clients[name], chosen, settings, found[name][size])
    figures: dict[str, Any] = {
        "commits": {name: commit(python) for name, python in pythons.items()},
        "bursts": {size: {name: by_size[size].figures() for name, by_size in found.items()} for size in sizes},
    }
    write_record(figures, args.out, versions("torch", "nvidia-pytriton", "tritonclient", "grpcio"))
    return 0


def burst(
    server: ServerUnderTest, clients: Sequence[Client], prompts: Sequence[str], settings: Settings, found: Found
) -> None:
    """Asks for all prompts at the same moment, and adds what is seen."""
    time.sleep(PAUSE_SECONDS)
    before, firsts = server.metrics(model="preprocessing"), [0.0] * len(prompts)
    start = threading.Barrier(len(prompts))

    def ask(at: int) -> None:
        start.wait()
        began = time.perf_counter()
        for _ in clients[at].stream(prompts[at], settings):
            firsts[at] = firsts[at] or time.perf_counter() - began

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = server.metrics(model="preprocessing")
    found.firsts += firsts
    found.queued_s += (after[QUEUE] - before[QUEUE]) / 1e6
    found.computed_s += (after[COMPUTE] - before[COMPUTE]) / 1e6


def commit(python: Path) -> str:
    """The commit of an interpreter's checkout."""
    command = ["git", "-C", python.absolute().parent, "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
