"""What an operator sees and relies on: metrics, logs, rows that are freed, a queue with an end, doors that are shut."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import tritonclient.grpc as grpcclient
from prometheus_text import families
from triton_asks import SECONDS, Stream, endless, full, metric, read_metrics, tensor, value, wait_until
from tritonclient.utils import InferenceServerException

from ssv.client.triton import Client, ServerError, Settings
from ssv.runtime.serving.metrics import COUNTERS, GAUGES, REQUESTS

BUSY = ("ssv_requests_decoding", "ssv_requests_joining", "ssv_requests_waiting")
ENDLESS = {"max_tokens": 1000, "ignore_eos": True}


class Server(Protocol):
    grpc_url: str
    grpc_address: str
    http_url: str
    metrics_url: str
    log: Path
    max_rows: int
    max_waiting: int


def is_idle(server: Server) -> bool:
    found = read_metrics(server.metrics_url)
    return all(found.get((name, frozenset()), 0.0) == 0 for name in BUSY)


def cancelled(server: Server, tier: str = "premium") -> float:
    return metric(server.metrics_url, REQUESTS[0], tier=tier, reason="cancelled")


def emitted(server: Server) -> float:
    """Tokens so far of requests that have ended."""
    return metric(server.metrics_url, "ssv_tokens_emitted", tier="premium")


@pytest.fixture(autouse=True)
def idle(server: Server) -> Iterator[None]:
    """Every test begins and leaves the server with nothing to do."""
    wait_until(lambda: is_idle(server), "the server is idle")
    yield
    wait_until(lambda: is_idle(server), "the server is idle again")


# --- metrics and logs -----------------------------------------------------------------------------------------------


def test_metrics_count_a_request(server: Server) -> None:
    def counted() -> dict[str, float]:
        found = read_metrics(server.metrics_url)
        return {name: found.get((name, frozenset({("tier", "turbo")})), 0.0) for name in COUNTERS}

    before, ended = counted(), metric(server.metrics_url, REQUESTS[0], tier="turbo", reason="length")
    settings = Settings(tier="turbo", max_tokens=40, ignore_eos=True)
    with Client(server.grpc_url) as client:
        last = list(client.stream("Explain how rainbows form.", settings))[-1]
    after = counted()
    gained = {name: after[name] - before[name] for name in COUNTERS}
    assert gained["ssv_tokens_emitted"] == 40
    assert gained["ssv_prompt_tokens"] == last.num_input_tokens
    assert gained["ssv_prompt_tokens_cached"] == last.cached_tokens
    assert gained["ssv_target_passes"] == gained["spec_decode_num_drafts"] == last.target_passes > 0
    assert gained["ssv_tokens_verified"] == gained["spec_decode_num_draft_tokens"] == last.judged
    assert gained["spec_decode_num_accepted_tokens"] == last.accepted
    assert gained["ssv_tokens_trusted"] == last.unverified > 0
    # Each pass takes what was drafted and one token more.
    drafted = gained["ssv_target_tokens"] - gained["ssv_target_passes"]
    assert drafted == last.accepted + last.unverified + gained["ssv_tokens_rolled_back"]
    assert 0 < gained["ssv_first_token_seconds"] < gained["ssv_request_seconds"]
    assert metric(server.metrics_url, REQUESTS[0], tier="turbo", reason="length") == ended + 1


def test_all_metrics_are_there(server: Server) -> None:
    with urlopen(server.metrics_url, timeout=SECONDS) as response:
        text = response.read().decode()
    assert {*COUNTERS, *GAUGES, REQUESTS[0]} <= families(text).keys()
    assert {name for name, _ in read_metrics(server.metrics_url)} >= {*GAUGES, REQUESTS[0]}
    assert metric(server.metrics_url, "ssv_engine_alive") == 1


def test_log_lines_are_json_with_the_ids_of_requests(server: Server) -> None:
    with Client(server.grpc_url) as client:
        last = list(client.stream("Hello", Settings(max_tokens=5, ignore_eos=True), request_id="my-request"))[-1]

    def entries() -> list[dict[str, Any]]:
        lines = [line for line in server.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines]

    wait_until(lambda: any(entry.get("id") == "my-request" for entry in entries()), "a line about the request")
    (entry,) = [entry for entry in entries() if entry.get("id") == "my-request"]
    assert (entry["event"], entry["level"], entry["reason"]) == ("request", "info", "length")
    assert (entry["tier"], entry["emitted"], entry["prompt_tokens"]) == ("premium", 5, last.num_input_tokens)
    assert all({"time", "level", "event"} <= entry.keys() for entry in entries())


def test_health(server: Server) -> None:
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("ensemble")
    with urlopen(f"{server.http_url}/v2/health/ready", timeout=SECONDS) as response:
        assert response.status == 200


# --- cancellation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_closing_a_stream_frees_the_row(server: Server, streaming: bool) -> None:
    before = cancelled(server)
    with Stream(server.grpc_address) as stream:
        stream.send(*endless(streaming))
        if streaming:
            stream.next()
        wait_until(lambda: metric(server.metrics_url, "ssv_requests_decoding") == 1, "the request decodes")
        stream.cancel()
    wait_until(lambda: is_idle(server), "the row is free")
    assert cancelled(server) == before + 1


def test_leaving_the_iteration_frees_the_row(server: Server) -> None:
    before = cancelled(server)
    with Client(server.grpc_url) as client, contextlib.closing(client.stream("Hello", Settings(**ENDLESS))) as replies:
        next(replies)
    wait_until(lambda: cancelled(server) == before + 1, "it is counted as cancelled")


@pytest.mark.parametrize(
    "path",
    [
        "generate_stream",
        # Triton does not look at a connection before it has something to write.
        pytest.param("generate", marks=pytest.mark.xfail(strict=True, reason="Triton notices no disconnect here")),
    ],
)
def test_disconnecting_http_frees_the_row(server: Server, path: str) -> None:
    before, emitted_before = cancelled(server), emitted(server)
    body = {"text_input": "Once upon a time", "stream": path == "generate_stream", **ENDLESS}
    body |= {"max_tokens": 150} if path == "generate" else {}  # it runs to its end
    data = json.dumps(body).encode()
    at = urlsplit(server.http_url)
    with socket.create_connection((at.hostname, at.port), timeout=SECONDS) as connection:
        head = f"POST /v2/models/ensemble/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        if path == "generate_stream":
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: emitted(server) > emitted_before or not is_idle(server), "the request decodes")
    wait_until(lambda: is_idle(server), "the row is free")
    assert cancelled(server) == before + 1


def test_killing_a_client_frees_the_row(server: Server) -> None:
    before = cancelled(server)
    body = json.dumps({"text_input": "Once upon a time", "stream": True, **ENDLESS})
    url = f"{server.http_url}/v2/models/ensemble/generate_stream"
    client = subprocess.Popen(["curl", "-sN", url, "-d", body], stdout=subprocess.PIPE)
    assert client.stdout is not None
    client.stdout.readline()
    client.kill()
    client.wait()
    client.stdout.close()
    wait_until(lambda: cancelled(server) == before + 1, "it is counted as cancelled")


def test_cancelling_a_request_that_waits(server: Server) -> None:
    before = cancelled(server)
    with contextlib.ExitStack() as stack:
        for _ in range(server.max_rows):
            stack.enter_context(Stream(server.grpc_address)).send(*endless())
        wait_until(lambda: metric(server.metrics_url, "ssv_requests_decoding") == server.max_rows, "all rows are taken")
        with Stream(server.grpc_address) as waiting:
            waiting.send(*endless())
            wait_until(lambda: metric(server.metrics_url, "ssv_requests_waiting") == 1, "one waits")
        wait_until(lambda: metric(server.metrics_url, "ssv_requests_waiting") == 0, "none waits")
        assert metric(server.metrics_url, "ssv_requests_decoding") == server.max_rows
        assert cancelled(server) == before + 1
    wait_until(lambda: cancelled(server) == before + 1 + server.max_rows, "all are counted as cancelled")


# --- limits ---------------------------------------------------------------------------------------------------------


def test_more_than_can_wait_are_refused_at_once(server: Server) -> None:
    with full(server), Client(server.grpc_url) as client:
        with pytest.raises(ServerError, match=r"waiting already: try again later") as raised:
            next(client.stream("Hello", Settings(max_tokens=2)))
        assert raised.value.status == "UNAVAILABLE"
        with pytest.raises(HTTPError) as refused:
            body = json.dumps({"text_input": "Hello"}).encode()
            urlopen(Request(f"{server.http_url}/v2/models/ensemble/generate", body), timeout=SECONDS)
        assert "try again later" in refused.value.read().decode()
        assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "1")
        assert metric(server.metrics_url, "ssv_requests_decoding") == server.max_rows
    wait_until(lambda: is_idle(server), "all have left")
    with Client(server.grpc_url) as client:
        assert list(client.stream("Hello", Settings(max_tokens=2)))


# --- doors that are shut --------------------------------------------------------------------------------------------


def test_administration_is_refused_over_grpc(server: Server) -> None:
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        for call in (
            lambda: client.load_model("ensemble"),
            lambda: client.unload_model("ensemble"),
            lambda: client.get_model_repository_index(),
            lambda: client.register_system_shared_memory("a", "/a", 8),
            lambda: client.get_system_shared_memory_status(),
            lambda: client.register_cuda_shared_memory("a", b"YWJj", 0, 8),
            lambda: client.update_log_settings({"log_verbose_level": 4}),
            lambda: client.update_trace_settings("ensemble", {"trace_level": ["TENSORS"]}),
        ):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                call()
        assert client.is_model_ready("ensemble")


@pytest.mark.parametrize(
    "path",
    [
        "repository/index",
        "repository/models/ensemble/unload",
        "systemsharedmemory/region/a/register",
        "cudasharedmemory/region/a/register",
        "logging",
        "trace/setting",
    ],
)
def test_administration_is_refused_over_http(server: Server, path: str) -> None:
    body = json.dumps({"key": "/a", "offset": 0, "byte_size": 8}).encode()
    with pytest.raises(HTTPError) as raised:
        urlopen(Request(f"{server.http_url}/v2/{path}", body), timeout=SECONDS)
    assert raised.value.code == 403


@pytest.mark.parametrize("settings", ["nonsense", "{}", '{"method": "gold", "params": {"stop": []}}'])
def test_nonsense_given_to_an_inner_model_does_no_harm(server: Server, settings: str) -> None:
    """They can be called from outside as well."""
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("prompt_ids", "INT32", 1, 2), tensor("settings", "BYTES", settings), model="ssv")
        with pytest.raises(InferenceServerException):
            stream.next()
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("piece", "BYTES", settings), model="postprocessing")
        with pytest.raises(InferenceServerException):
            stream.next()
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("text_input", "BYTES", "Hello"), tensor("max_tokens", "INT32", 3))
        assert value(stream.next(), "num_output_tokens") == 3
