"""Half an hour of mixed load: tiers, sampling, streaming and not, long and short, some clients that leave, some that
ask for what cannot be, and once a minute more at once than may wait.

Nothing but these may fail, and memory has to stay flat.

    python benchmarks/serving_soak.py --bundle bundles/smollm2-135m --out benchmarks/records/serving_soak.json
    python benchmarks/serving_soak.py --bundle bundles/smollm2-135m --device cuda --rows 32 --clients 24
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from server_under_test import ServerUnderTest

from ssv.client.triton import ServerError, Settings
from ssv.support.console import add_device
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
TIERS = ("premium", "balanced", "turbo", "autoregressive")
LENGTHS = (8, 32, 64, 128)
LEAVING, IMPOSSIBLE = 0.1, 0.03
"""Shares of the requests whose client leaves, and that ask for more tokens than an answer may have."""
LEFT_LENGTH, TOO_MANY = 512, 100_000
WAITING = 16
BURST_SECONDS = 60.0
# A cache of prompts that is full after minutes, and evicts from then on.
OPTIONS = ("--prompt-cache-mb", "64", "--audit-share", "0.2", "--max-waiting", str(WAITING))
SYSTEM = "You are a patient teacher. Answer in plain words, with one example. " * 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-minutes", type=float, default=3.0, help="before memory is compared")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8, help="of the server")
    add_device(parser)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    with ServerUnderTest(args.bundle, *OPTIONS, "--device", args.device, "--max-rows", str(args.rows)) as server:
        fill(server, prompts, args.rows)
        load = Load(server, prompts, args.clients, args.rows + WAITING + WAITING)
        samples: list[dict[str, float]] = []
        start = time.monotonic()
        while (minute := (time.monotonic() - start) / 60) < args.minutes:
            time.sleep(15)
            samples.append({"minute": round(minute, 1), **server.memory_mb(), **server.gpu_mb()})
            if args.device == "cuda":
                samples[-1]["graphs"] = server.num_graphs()
            print(samples[-1], dict(load.outcomes), load.errors[-1:], file=sys.stderr, flush=True)
        load.stop()
        server.wait_idle()
        metrics = server.metrics()
        deaths, status = len(server.events("server died")), server.stop()
    figures = {
        "minutes": args.minutes,
        "outcomes": dict(load.outcomes),
        "errors": load.errors,
        "server_died": deaths,
        "exit_status": status,
        "memory": growth(samples, args.warm_up_minutes),
        "memory_mb": samples[::4],
        "metrics": {name: value for name, value in metrics.items() if name.startswith(("ssv_", "spec_decode"))},
    }
    write_record(figures, args.out, versions("torch", "nvidia-pytriton", "tritonclient", "grpcio"), args.device)
    return int(bool(load.errors or deaths))


def fill(server: ServerUnderTest, prompts: list[str], rows: int) -> None:
    """Asks in all rows at once for the longest sequences that the load has, greedy and sampled, by each tier.

    The caches of rows take memory where a row has tokens, and malloc's arenas as much as the largest passes need, both
    for good. By chance alone the last row has its longest sequence after a quarter of an hour, and until then a leak
    could not be told from that.
    """
    longest = conversation(max(prompts, key=len))

    def ask(tier: str, temperature: float) -> None:
        length = max(LENGTHS)
        settings = Settings(
            tier=tier, max_tokens=length, min_tokens=length, temperature=temperature, top_p=0.9, seed=len(tier)
        )
        with server.client() as client:
            for _ in client.stream(longest, settings):
                pass

    for temperature in (0.0, 1.0):
        for tier in TIERS:
            threads = [threading.Thread(target=ask, args=(tier, temperature)) for _ in range(rows)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def conversation(prompt: str) -> list[dict[str, str]]:
    """The longer form in which the load asks a prompt."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def growth(samples: list[dict[str, float]], warm_up: float) -> dict[str, Any]:
    """Memory in the first and the last quarter after the warm-up, the means of each process and of all, and the change
    in percent. A GPU's is by itself.
    """
    counted = [sample for sample in samples if sample["minute"] >= warm_up]
    quarter = max(len(counted) // 4, 1)
    names = [name for name in samples[0] if name not in ("minute", "graphs")]

    def mean(part: list[dict[str, float]]) -> dict[str, float]:
        means = {name: sum(sample[name] for sample in part) / len(part) for name in names}
        return {**means, "all": sum(mb for name, mb in means.items() if not name.startswith("gpu"))}

    first, last = mean(counted[:quarter]), mean(counted[-quarter:])
    return {
        name: {
            "first_mb": round(first[name], 1),
            "last_mb": round(last[name], 1),
            "change_percent": round((last[name] / first[name] - 1) * 100, 2),
        }
        for name in first
    }


class Load:
    """Clients that ask until they are stopped.

    Attributes:
        outcomes: how requests ended.
        errors: messages of those that failed.
    """

    def __init__(self, server: ServerUnderTest, prompts: list[str], clients: int, burst: int) -> None:
        """Begins.

        Args:
            burst: requests that come at once, once a minute.
        """
        self._server, self._prompts = server, prompts
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(clients)]
        self._threads.append(threading.Thread(target=self._come_at_once, args=(burst,)))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        rng = random.Random(number)
        with self._server.client() as client:
            while not self._stopping.is_set():
                prompt: Any = rng.choice(self._prompts)
                if rng.random() < 0.3:
                    prompt = conversation(prompt)
                settings = Settings(
                    tier=rng.choice(TIERS),
                    max_tokens=rng.choice(LENGTHS),
                    temperature=rng.choice((0.0, 0.0, 0.7, 1.0)),
                    top_p=rng.choice((1.0, 0.9)),
                    seed=rng.randrange(2**31),
                    stop=rng.choice(((), (), ("\n\n",), ("the end", "."))),
                )
                leaves_after, kind = None, rng.random()
                if kind < LEAVING:  # long enough that the server is not done before
                    leaves_after = rng.randint(1, 3)
                    settings = replace(settings, max_tokens=LEFT_LENGTH, min_tokens=LEFT_LENGTH, stop=())
                elif kind < LEAVING + IMPOSSIBLE:
                    settings = replace(settings, max_tokens=TOO_MANY)
                is_streamed = leaves_after is not None or rng.random() < 0.8
                self._count(*self._ask(client, prompt, settings, is_streamed, leaves_after))
                if rng.random() < 0.2:
                    time.sleep(rng.random())

    def _come_at_once(self, num: int) -> None:
        """Asks, once a minute, for more answers than the server has rows and room to wait."""

        def ask(seed: int) -> None:
            settings = Settings(tier="premium", max_tokens=LENGTHS[1], temperature=1.0, seed=seed)
            with self._server.client() as client:
                self._count(*self._ask(client, self._prompts[seed % len(self._prompts)], settings, True, None))

        while not self._stopping.wait(BURST_SECONDS):
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(num)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _count(self, outcome: str, error: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            if error:
                self.errors.append(error)

    @staticmethod
    def _ask(client: Any, prompt: Any, settings: Settings, stream: bool, leaves_after: int | None) -> tuple[str, str]:
        try:
            for count, reply in enumerate(client.stream(prompt, settings, stream=stream), 1):
                if count == leaves_after and not reply.finish_reason:
                    return "left", ""
        except ServerError as error:
            if "are waiting already" in str(error):
                return "refused: full", ""
            if settings.max_tokens == TOO_MANY and error.status == "INVALID_ARGUMENT":
                return "refused: impossible", ""
            return "error", f"{error.status}: {error}"
        if settings.max_tokens == TOO_MANY:
            return "error", "an answer to what cannot be"
        return reply.finish_reason, ""


if __name__ == "__main__":
    sys.exit(main())
