"""What happens to clients, server and memory when things go wrong: clients that disconnect in mid-stream, a storm of
requests, processes of the server killed in mid-stream, and SIGTERM under load.

    python benchmarks/serving_faults.py --bundle bundles/smollm2-135m --out benchmarks/records/serving_faults.json
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from server_under_test import ServerUnderTest, ask, percentile, pid_exists, reference

from ssv.client.triton import Client, ServerError, Settings
from ssv.support.environment import versions, write_record

PROMPT = "Write a long story about a lighthouse."

ROWS, WAITING = 8, 24

KILLED_CLIENT = """
import sys
from ssv.client.triton import Client, Settings
with Client(sys.argv[1]) as client:
    for reply in client.stream(sys.argv[2], Settings(max_tokens=400, ignore_eos=True)):
        print(reply.text, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--disconnects", type=int, default=200)
    parser.add_argument("--storm", type=int, default=10, help="times the server's capacity")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    options = ["--max-rows", str(ROWS), "--max-waiting", str(WAITING), "--threads", "1"]
    with ServerUnderTest(args.bundle, *options) as server:
        expected = reference(server)
        for name, fault in (
            ("disconnects", lambda: disconnects(server, args.disconnects)),
            ("storm", lambda: storm(server, args.storm)),
            ("kill -9", lambda: kills(server)),
        ):
            figures[name] = {**fault(), "normal_afterwards": reference(server) == expected}
            print(name, figures[name], file=sys.stderr, flush=True)
        figures["SIGTERM under load"] = sigterm(server)
        print("SIGTERM", figures["SIGTERM under load"], file=sys.stderr, flush=True)
    write_record(figures, args.out, versions("torch", "nvidia-pytriton", "tritonclient", "grpcio"))
    return 0


def disconnects(server: ServerUnderTest, times: int) -> dict[str, Any]:
    """Clients that go away in mid-stream: they leave the stream, close the connection, or (one in ten) die."""
    rng = random.Random(0)
    how_many: Counter[str] = Counter()

    def leave(number: int) -> None:
        how = "killed" if number % 10 == 0 else rng.choice(("left", "closed"))
        how_many[how] += 1
        if how == "killed":
            command = [sys.executable, "-c", KILLED_CLIENT, server.grpc_url, PROMPT]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
            process.wait()
            process.stdout.close()
            return
        client = server.client()
        stream = client.stream(PROMPT, Settings(max_tokens=400, ignore_eos=True), stream=number % 5 != 1)
        if number % 5 == 1:  # gone before anything came: the request is not streaming
            threading.Timer(0.3, client.close).start()
            with contextlib.suppress(ServerError):
                next(stream, None)
            return
        for _ in range(rng.randint(1, 5)):
            next(stream)
        if how == "left":
            stream.close()
        client.close()

    for number in range(20):  # caches and pools have their size after some requests
        leave(number)
    server.wait_idle()
    before = server.memory_mb()
    freed = []
    for number in range(times):
        leave(number)
        freed.append(server.wait_idle())
    after = server.memory_mb()
    return {
        "disconnects": dict(how_many),
        "requests_left": server.num_requests(),
        "seconds_until_freed_median": round(percentile(freed, 0.5), 3),
        "seconds_until_freed_max": round(max(freed), 3),
        "memory_mb_before": before,
        "memory_mb_after": after,
    }


def storm(server: ServerUnderTest, factor: int) -> dict[str, Any]:
    """So many times more requests at once than the server takes."""
    before = server.memory_mb()
    outcomes: Counter[str] = Counter()
    refused_after: list[float] = []
    num, lock = factor * (ROWS + WAITING), threading.Lock()
    peak = dict(before)

    def one() -> None:
        with server.client() as client:
            start = time.monotonic()
            _, last = ask(client, PROMPT, Settings(max_tokens=24))
        with lock:
            if isinstance(last, ServerError):
                outcomes[last.status or "no status"] += 1
                refused_after.append(time.monotonic() - start)
            else:
                outcomes["answered"] += 1

    threads = [threading.Thread(target=one) for _ in range(num)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for name, mb in server.memory_mb().items():
            peak[name] = max(peak[name], mb)
        time.sleep(0.5)
    return {
        "requests": num,
        "capacity": ROWS + WAITING,
        "outcomes": dict(outcomes),
        "seconds": round(time.monotonic() - start, 1),
        "refused_after_s_median": round(percentile(refused_after, 0.5), 3) if refused_after else None,
        "refused_after_s_p95": round(percentile(refused_after, 0.95), 3) if refused_after else None,
        "memory_mb_before": before,
        "memory_mb_peak": peak,
        "memory_mb_after": server.memory_mb(),
    }


def kills(server: ServerUnderTest) -> dict[str, Any]:
    """kill -9 of each Python model in mid-stream."""
    found = {}
    for number, model in enumerate(("ssv", "postprocessing", "preprocessing")):
        clients = [Stream(server.client()) for _ in range(3)]
        time.sleep(2.0)
        start = time.monotonic()
        server.stubs()[model].kill()
        for client in clients:
            client.join(60)
        error_s = time.monotonic() - start
        server.wait_serving(number + 2)
        found[model] = {
            "clients": [client.outcome for client in clients],
            "seconds_until_clients_know": round(error_s, 2),
            "seconds_until_ready": round(time.monotonic() - start, 1),
        }
    return {"models": found, "restarts": len(server.events("server died"))}


def sigterm(server: ServerUnderTest) -> dict[str, Any]:
    """SIGTERM while streams run; one more client asks afterwards."""
    clients = [Stream(server.client(), Settings(max_tokens=120)) for _ in range(4)]
    time.sleep(2.0)
    children = [process.pid for process in server.stubs().values()]
    start = time.monotonic()
    server.process.terminate()
    time.sleep(0.5)
    late = Stream(server.client())
    for client in (*clients, late):
        client.join(60)
    status = server.process.wait(60)
    return {
        "running_streams": [client.outcome for client in clients],
        "late_request": late.outcome,
        "exit_status": status,
        "seconds": round(time.monotonic() - start, 1),
        "processes_left": [pid for pid in children if pid_exists(pid)],
        "shared_memory_left": [path.name for path in Path("/dev/shm").glob("triton_python*")],  # noqa: S108
    }


class Stream(threading.Thread):
    """A request in a thread of its own.

    Attributes:
        outcome: how it ended.
    """

    def __init__(self, client: Client, settings: Settings | None = None) -> None:
        super().__init__()
        self.outcome = "nothing"
        self._client, self._settings = client, settings or Settings(max_tokens=400, ignore_eos=True)
        self.start()

    def run(self) -> None:
        _, last = ask(self._client, PROMPT, self._settings)
        failed = isinstance(last, ServerError)
        self.outcome = f"{last.status}: {last}" if isinstance(last, ServerError) else f"finished: {last.finish_reason}"
        if not failed:
            self._client.close()


if __name__ == "__main__":
    sys.exit(main())
