"""What becomes of requests when there are too many, when the server ends, and when its processes are killed: what the
metrics say is what a client has counted, to the request.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil
import pytest
import tritonclient.grpc as grpcclient
from triton_asks import free_ports, full, read_metrics, wait_until

from ssv.client.triton import Client, ServerError, Settings
from ssv.runtime.serving.metrics import ANSWERED, REQUESTS
from ssv.triton_repo.supervisor import EXIT_DIED

PROMPT = "Once upon a time"
LONG_SECONDS = 600.0
"""For what has to happen at all, on a machine of any speed."""


class Server(Protocol):
    grpc_url: str
    grpc_address: str
    http_url: str
    metrics_url: str
    openai_url: str
    pid: int
    log: Path
    max_rows: int
    max_waiting: int


Another = Callable[..., AbstractContextManager[Server]]


# What a client does and counts


def post(url: str, body: dict[str, Any]) -> tuple[int, str | None, str]:
    """Status, Retry-After and body; status 0 for a connection that broke."""
    at = urlsplit(url)
    connection = HTTPConnection(str(at.hostname), at.port, timeout=LONG_SECONDS)
    try:
        connection.request("POST", at.path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers["Retry-After"], response.read().decode()
    except (OSError, HTTPException) as error:
        return 0, None, repr(error)
    finally:
        connection.close()


def outcome(found: tuple[int, str | None, str]) -> str:
    status, retry_after, body = found
    if status == 503:
        assert retry_after == "1", body
        return "refused"
    if status == 200 and '"error"' not in body:
        return "answered"
    return "failed"


def ask_generate(server: Server, tokens: int) -> str:
    body = {"text_input": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    return outcome(post(f"{server.http_url}/v2/models/ensemble/generate", body))


def ask_generate_stream(server: Server, tokens: int) -> str:
    body = {"text_input": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return outcome(post(f"{server.http_url}/v2/models/ensemble/generate_stream", body))


def ask_openai(server: Server, tokens: int) -> str:
    body = {"model": server_model(server), "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    return outcome(post(f"{server.openai_url}/completions", body))


def ask_grpc(server: Server, tokens: int) -> str:
    with Client(server.grpc_url) as client:
        try:
            list(client.stream(PROMPT, Settings(chat=False, max_tokens=tokens, ignore_eos=True)))
        except ServerError as error:
            return "failed" if error.is_cut_off or error.status != "UNAVAILABLE" else "refused"
    return "answered"


DOORS: tuple[Callable[[Server, int], str], ...] = (ask_generate, ask_generate_stream, ask_openai, ask_grpc)


def server_model(server: Server) -> str:
    connection = HTTPConnection(urlsplit(server.openai_url).netloc, timeout=LONG_SECONDS)
    connection.request("GET", "/v1/models")
    return str(json.loads(connection.getresponse().read())["data"][0]["id"])


def storm(server: Server, asks: Sequence[Callable[[Server, int], str]], tokens: int) -> Counter[str]:
    """All at a time."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return Counter(pool.map(lambda ask: ask(server, tokens), asks))


# What the server counted


def counted(server: Server) -> Counter[str]:
    found: Counter[str] = Counter()
    for (name, labels), value in read_metrics(server.metrics_url).items():
        if name == REQUESTS[0]:
            reason = dict(labels)["reason"]
            found["answered" if reason in ANSWERED else "failed"] += int(value)
        elif name == "ssv_requests_refused":
            found["refused"] += int(value)
        elif name == "ssv_requests_running":
            found["running"] += int(value)
    return found


def gained(server: Server, before: Counter[str]) -> dict[str, int]:
    return {name: value - before[name] for name, value in counted(server).items() if value != before[name]}


def get(url: str, path: str) -> tuple[int, str | None]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=LONG_SECONDS)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.headers["Retry-After"]


def processes(server: Server) -> dict[str, psutil.Process]:
    """The server's processes, by what they are: tritonserver, openai, or a model's name."""
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
        if "ssv.triton_repo.openai.process" in command:
            found["openai"] = process
        elif "guardian.py" in command:
            found["guardian"] = process
        elif "/1/model.py" in command:
            found[command.split("/1/model.py")[0].rpartition("/")[2]] = process
        elif "--model-repository" in command:
            found["tritonserver"] = process
    return found


def shared_memory(server: Server) -> list[Path]:
    return list(Path("/dev/shm").glob(f"ssv_{server.pid}_*"))


def work_folder(server: Server) -> Path:
    """Where ssv-serve keeps what is of this server."""
    return Path(processes(server)["guardian"].cmdline()[-2])


def is_ready(server: Server) -> bool:
    return get(server.http_url, "/v2/health/ready")[0] == 200


# Too many


def test_a_storm_is_counted_to_the_request(server: Server) -> None:
    """A few while the server is full, which are refused however fast it answers, and then ten times what it can take,
    through all doors at once.
    """
    places = server.max_rows + server.max_waiting
    asks = DOORS * 2
    before = counted(server)
    with full(server):
        assert storm(server, asks, tokens=32) == {"refused": len(asks)}
        assert gained(server, before) == {"refused": len(asks), "running": places}
    wait_until(lambda: counted(server)["running"] == 0, "all have left")
    assert gained(server, before) == {"refused": len(asks), "failed": places}, "those that left count as cancelled"
    before, asks = counted(server), tuple(DOORS[i % len(DOORS)] for i in range(10 * places))
    found = storm(server, asks, tokens=32)
    assert found.total() == len(asks) and found.keys() <= {"answered", "refused"}
    assert found["answered"] >= places
    assert gained(server, before) == dict(found)


def test_times_are_of_answered_requests(server: Server) -> None:
    """However many are refused: the mean is what answered clients have waited."""
    name = "ssv_time_to_first_token_seconds"

    def summed(end: str) -> float:
        return sum(v for (series, _), v in read_metrics(server.metrics_url).items() if series == f"{name}_{end}")

    before = summed("count")
    found = storm(server, [ask_generate] * (4 * (server.max_rows + server.max_waiting)), tokens=8)
    assert summed("count") - before == found["answered"] > 0


# The end


def test_draining(another_server: Another) -> None:
    """Readiness is false at every door while what runs is finished; what comes is refused and counted."""
    with another_server("--drain-timeout", "600", max_rows=2, max_waiting=4) as server:
        model, before = server_model(server), counted(server)
        long: list[str] = []
        threads = [threading.Thread(target=lambda ask=ask: long.append(ask(server, 1000))) for ask in DOORS]
        for thread in threads:
            thread.start()
        wait_until(lambda: counted(server)["running"] == len(DOORS), "they run")
        assert is_ready(server)
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(server), "it drains")
        assert get(server.http_url, "/v2/health/ready") == (503, "1")
        assert get(server.http_url, "/v2/models/ensemble/ready") == (503, "1")
        assert get(server.http_url, "/v2/health/live")[0] == 200
        with grpcclient.InferenceServerClient(server.grpc_address) as client:
            wait_until(lambda: not client.is_server_ready(), "gRPC says that it is not ready")
            assert client.is_server_live()
        assert get(server.openai_url, "/health") == (503, "1")
        refused = [ask(server, 2) for ask in DOORS if ask is not ask_openai]
        body = {"model": model, "prompt": PROMPT, "max_tokens": 2}
        refused.append(outcome(post(f"{server.openai_url}/completions", body)))
        assert refused == ["refused"] * len(DOORS)
        found = gained(server, before)
        assert found.pop("refused") == len(DOORS)
        assert found.keys() <= {"running", "answered"} and sum(found.values()) == len(DOORS), "none is lost"
        for thread in threads:
            thread.join()
        assert long == ["answered"] * len(DOORS)
    assert not shared_memory(server)
    entries = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert [e["event"] for e in entries if e["event"] in ("draining", "stopped")][-1] == "stopped"
    assert Counter(e["reason"] for e in entries if e["event"] == "request") == {"length": 4, "refused": 4}
    assert not [line for line in server.log.read_text().splitlines() if line.startswith(("E", "W"))], (
        "nothing was wrong"
    )
    assert all(entry["level"] != "error" for entry in entries)


# Processes that are killed


def test_killing_processes(another_server: Another) -> None:
    with another_server("--restarts", "9", max_rows=2, max_waiting=4) as server:
        before, engines = counted(server), processes(server)

        # The OpenAI API: it alone is started again. Its clients have gone, for all that the server knows.
        def openai() -> None:
            failed.append(ask_openai(server, 1000))

        failed: list[str] = []
        threads = [threading.Thread(target=openai) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: counted(server)["running"] == 2, "they run")
        engines["openai"].kill()
        for thread in threads:
            thread.join()
        assert failed == ["failed", "failed"]
        wait_until(lambda: gained(server, before) == {"failed": 2}, "both are counted")
        wait_until(
            lambda: processes(server).get("openai", engines["openai"]).pid != engines["openai"].pid, "it is back"
        )
        wait_until(lambda: _answers(server), "it answers")
        now = processes(server)
        assert {name: now[name].pid for name in now if name != "openai"} == {
            name: engines[name].pid for name in engines if name != "openai"
        }, "the engines went on"
        assert read_metrics(server.metrics_url)["ssv_restarts", frozenset({("process", "openai")})] == 1

        # What belongs to tritonserver: all of it is started again, and nothing that was counted is lost.
        three = (ask_generate, ask_openai, ask_grpc)
        for victim in ("ssv", "postprocessing", "tritonserver"):
            before = counted(server)
            failed.clear()
            threads = [threading.Thread(target=lambda ask=ask: failed.append(ask(server, 1000))) for ask in three]
            for thread in threads:
                thread.start()
            wait_until(lambda: counted(server)["running"] == len(three), "they run")
            processes(server)[victim].kill()
            for thread in threads:
                thread.join()
            assert failed == ["failed"] * len(three), victim
            wait_until(lambda: not is_ready(server), "it is not ready")
            assert get(server.http_url, "/v2/health/live")[0] == 200
            refused = [ask_generate(server, 2), ask_generate_stream(server, 2)]
            assert refused == ["refused"] * 2, "while it starts again"
            wait_until(lambda: is_ready(server), "it is back")
            assert gained(server, before) == {"failed": len(three), "refused": 2}, victim
            wait_until(lambda: ask_openai(server, 2) == "answered", "the OpenAI API has found it again")
        assert read_metrics(server.metrics_url)["ssv_restarts", frozenset({("process", "tritonserver")})] == 3

        # The guardian: another takes its place.
        guardian = processes(server)["guardian"]
        guardian.kill()
        wait_until(lambda: processes(server).get("guardian", guardian).pid != guardian.pid, "it is back")

        # ssv-serve itself: nobody and nothing is left behind.
        left, folder = processes(server), work_folder(server)
        assert {"tritonserver", "openai", "ssv", "preprocessing", "postprocessing", "guardian"} == left.keys()
        assert folder.is_dir() and shared_memory(server)
        psutil.Process(server.pid).kill()
        _, alive = psutil.wait_procs(left.values(), timeout=LONG_SECONDS)
        assert not alive
        assert not folder.exists() and not shared_memory(server)


@pytest.mark.parametrize("victim", ["tritonserver", "serve"])
def test_killing_while_the_models_start(another_server: Another, bundle: Path, tmp_path: Path, victim: str) -> None:
    """When nobody is ready, and tritonserver has only just forked what is to run a model."""
    command = [sys.executable, "-m", "ssv.triton_repo.serve", "--bundle", str(bundle)]
    for name, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True):
        command += [f"--{name}-port", str(port)]
    environment = os.environ | {"SSV_ADMIN_KEY": "admin=s3cret"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    server: Any = SimpleNamespace(pid=process.pid)
    shown = ""

    def start() -> bool:
        nonlocal shown
        has_begun = "ssv" in processes(server)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                shown += path.read_text(errors="replace")
        return has_begun

    wait_until(start, "its models start")
    assert "--http-restricted-api" in shown and "s3cret" not in shown, "the key is not seen at any time"
    left = processes(server)
    (left["tritonserver"] if victim == "tritonserver" else psutil.Process(process.pid)).kill()
    _, alive = psutil.wait_procs(left.values(), timeout=LONG_SECONDS)
    assert not alive
    assert process.wait(LONG_SECONDS) == (EXIT_DIED if victim == "tritonserver" else -signal.SIGKILL)
    assert not shared_memory(server)


def test_a_request_that_hangs_does_not_hold_the_end(another_server: Another) -> None:
    """As many hang as there may be, each for much longer than the drain."""
    with another_server("--drain-timeout", "0.5", max_rows=1, max_waiting=1) as server:
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(ask_generate(server, 1000))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: counted(server)["running"] == 2, "they run")
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert set(found) <= {"failed", "refused"}
    assert not shared_memory(server)


def _answers(server: Server) -> bool:
    try:
        return get(server.openai_url, "/health")[0] == 200
    except OSError:
        return False
