"""A server of this repository, started for a measurement and watched from outside."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

from ssv.client.triton import Client, Reply, ServerError, Settings


class ServerUnderTest:
    """ssv-serve on free ports of this machine.

    Attributes:
        grpc_url, http_url: endpoints.
        openai_url: of the OpenAI API; empty where it is not served.
        process: ssv-serve's.
    """

    def __init__(
        self, bundle: Path, *options: str, has_openai: bool = False, python: str | Path = sys.executable
    ) -> None:
        """Starts it.

        Args:
            options: of ssv-serve.
            has_openai: whether the OpenAI API is served.
            python: interpreter of the checkout whose server it is.
        """
        names = ("--http-port", "--grpc-port", "--metrics-port", *(("--openai-port",) if has_openai else ()))
        ports = _free_ports(len(names))
        self.grpc_url, self.http_url = f"grpc://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[0]}"
        self._metrics_url = f"http://127.0.0.1:{ports[2]}/metrics"
        self._log_path = Path(tempfile.mkstemp(prefix="ssv-serve-", suffix=".log")[1])
        command = [str(python), "-m", "ssv.triton_repo.serve", "--bundle", str(bundle.resolve()), *options]
        command += [part for pair in zip(names, map(str, ports), strict=True) for part in pair]
        self.openai_url = f"http://127.0.0.1:{ports[3]}" if has_openai else ""
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603
        self.wait_serving(1)
        if has_openai:
            self.wait_openai()

    def __enter__(self) -> ServerUnderTest:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log_path.unlink()

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The server's log lines of one event."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_serving(self, times: int, timeout: float = 300.0) -> None:
        """Until the server has become ready so many times."""
        deadline = time.monotonic() + timeout
        while len(self.events("serving")) < times:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"ssv-serve did not start:\n{self.log}")
            time.sleep(0.2)

    def wait_openai(self, timeout: float = 120.0) -> None:
        """Until the OpenAI API answers: it is started after the server."""
        deadline = time.monotonic() + timeout
        while not self.is_openai_ready():
            if time.monotonic() > deadline:
                raise SystemExit(f"the OpenAI API did not start:\n{self.log}")
            time.sleep(0.2)

    def is_openai_ready(self) -> bool:
        try:
            with urlopen(f"{self.openai_url}/health", timeout=10) as response:  # noqa: S310
                return bool(response.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """Sends SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def client(self) -> Client:
        return Client(self.grpc_url)

    def stubs(self) -> dict[str, psutil.Process]:
        """Processes of the Python models, by model."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            match = re.search(r"/models/(\w+)/1/model.py", " ".join(process.cmdline()))
            if match:
                found[match.group(1)] = process
        return found

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each process of the server, and what it has in shared memory."""
        found = {name: process.memory_info().rss / 2**20 for name, process in self.stubs().items()}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            command = process.cmdline()
            if command and Path(command[0]).name == "tritonserver":
                found["tritonserver"] = process.memory_info().rss / 2**20
            elif "ssv.triton_repo.openai.process" in command:
                found["openai"] = process.memory_info().rss / 2**20
        shared = Path("/dev/shm").glob(f"ssv_{self.process.pid}_*")  # noqa: S108
        found["shared"] = sum(path.stat().st_blocks * 512 for path in shared) / 2**20
        return {name: round(mb, 1) for name, mb in found.items()}

    def num_graphs(self) -> int:
        """CUDA graphs that were captured."""
        return int(self.metrics().get("ssv_gpu_graphs", 0))

    def gpu_mb(self) -> dict[str, float]:
        """Memory of the GPU that the engines' allocator holds, and that is not free, whoever has it; none on a CPU."""
        names = {"gpu_reserved": "ssv_gpu_memory_reserved_bytes", "gpu_used": "ssv_gpu_memory_used_bytes"}
        metrics = self.metrics()
        return {name: round(metrics[metric] / 2**20, 1) for name, metric in names.items() if metric in metrics}

    def metrics(self, **labels: str) -> dict[str, float]:
        """Sums over what has these labels, by name."""
        with urlopen(self._metrics_url, timeout=10) as response:  # noqa: S310
            text = response.read().decode()
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not labels.items() <= sample.labels.items():
                    continue
                # The parser ends a counter's name as OpenMetrics does.
                name = family.name if family.type == "counter" else sample.name
                sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def num_requests(self) -> int:
        """Requests in the server."""
        names = ("ssv_requests_decoding", "ssv_requests_joining", "ssv_requests_waiting")
        return int(sum(self.metrics().get(name, 0.0) for name in names))

    def wait_idle(self, timeout: float = 60.0) -> float:
        """Until there are none; the seconds that took."""
        start = time.monotonic()
        while self.num_requests():
            if time.monotonic() - start > timeout:
                raise SystemExit(f"requests are left in the server after {timeout} s:\n{self.log[-4000:]}")
            time.sleep(0.05)
        return time.monotonic() - start


def ask(client: Client, prompt: str, settings: Settings, stream: bool = True) -> tuple[str, Reply | ServerError]:
    """Text and last reply of a request, or how it failed."""
    text = ""
    try:
        for reply in client.stream(prompt, settings, stream=stream):
            text += reply.text
    except ServerError as error:
        return text, error
    return text, reply


def reference(server: ServerUnderTest, max_tokens: int = 32) -> str:
    """Text of a request whose output is known: whether the server is well."""
    with server.client() as client:
        text, last = ask(client, "Explain how rainbows form.", Settings(max_tokens=max_tokens))
    return str(last) if isinstance(last, ServerError) else text


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def pid_exists(pid: int) -> bool:
    """Whether a process runs. One that has ended, and that the system has not cleared away yet, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
