"""The gRPC client without a server, and ssv-generate's options for one."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread, Timer

import grpc
import pytest
from certificates import self_signed
from cryptography import x509
from tritonclient.utils import InferenceServerException

from ssv.client.cli import main
from ssv.client.triton import Client, ServerError, Settings, request_inputs, server_error, split_url
from ssv.client.triton_aio import AsyncClient
from ssv.runtime.reply import Reply
from ssv.support.errors import UserError


def sent(prompt: object, settings: Settings, stream: bool = True) -> dict[str, tuple[list[int], str]]:
    tensors = request_inputs(prompt, settings, stream=stream)  # type: ignore[arg-type]
    return {t.name(): (t.shape(), t.datatype()) for t in tensors}


def test_only_what_is_set_is_sent() -> None:
    assert sent("a", Settings()) == {
        "text_input": ([1, 1], "BYTES"),
        "ssv_chat": ([1, 1], "BOOL"),
        "stream": ([1, 1], "BOOL"),
    }
    assert sent("a", Settings(tier="turbo", stop=("x", "y"), temperature=0.0, seed=0)).keys() - sent(
        "a", Settings()
    ).keys() == {
        "ssv_tier",
        "stop_words",
        "temperature",
        "seed",
    }
    assert sent("a", Settings(latency_bound_ms=40.0))["latency_bound_ms"] == ([1, 1], "FP32")
    assert sent("a", Settings(fates=True))["ssv_return_fates"] == ([1, 1], "BOOL")
    assert sent("a", Settings(stop=("x", "y")))["stop_words"] == ([1, 2], "BYTES")


def test_a_conversation_is_sent_as_messages() -> None:
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "a"}]
    tensors = {t.name(): t for t in request_inputs(messages, Settings(), stream=False)}
    assert "ssv_chat" not in tensors
    raw = tensors["ssv_messages"]._get_content()
    assert json.loads(raw[4:]) == messages
    assert "é".encode() in raw, "escaped text would reach the server's limit of bytes early"


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "http://h:8001", "grpc://h", "grpc://:8001", "grpc://h:8001/x", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="give grpc://"):
        split_url(url)


def test_addresses() -> None:
    assert split_url("grpc://h:1") == ("h:1", False)
    assert split_url("grpcs://h:1") == ("h:1", True)


@pytest.mark.parametrize(
    ("message", "status", "text"),
    [
        ("in ensemble 'ensemble', UNAVAILABLE: try later", "UNAVAILABLE", "try later"),
        ("in ensemble 'ensemble', INVALID_ARGUMENT: a: b\nc", "INVALID_ARGUMENT", "a: b\nc"),
        ("unexpected inference input 'x'", "UNKNOWN", "unexpected inference input 'x'"),
        ("failed to connect to all addresses", "UNAVAILABLE", "no server answers at grpc://h:1"),
        ("errors resolving h:1: [Domain name not found]", "UNAVAILABLE", "the host of grpc://h:1 is not known: check"),
        (
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1: Socket closed",
            "UNAVAILABLE",
            "grpc://h:1 closes the connection instead of speaking gRPC: if it is shutting down, ask another one; with "
            "TLS give the address as grpcs://",
        ),
    ],
)
def test_errors_say_what_the_server_said(message: str, status: str, text: str) -> None:
    error = server_error(InferenceServerException(message), "grpc://h:1")
    assert error.status == status
    assert str(error).startswith(text)


@pytest.mark.parametrize(
    ("of", "trusts", "message"),
    [
        (
            "127.0.0.1",
            None,
            r"the certificate of {} is not trusted \(self signed certificate\): give the PEM .*--tls-ca",
        ),
        (
            "elsewhere.example",
            "server.pem",
            "the certificate of {} is valid for another host: give the address by a name",
        ),
        ("127.0.0.1", "empty.pem", "the PEM for checking the certificate of {} has no certificate in it: give another"),
        ("127.0.0.1", "server.pem", "Method not found"),  # what stands behind the certificate is asked
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_wrong_with_a_certificate_is_said(
    tmp_path: Path, of: str, trusts: str | None, message: str, asynchronous: bool
) -> None:
    name = x509.DNSName(of) if of[0] == "e" else x509.IPAddress(ip_address(of))
    certificate, key = self_signed(tmp_path, "server", of=of, san=[name], ca=True)
    (tmp_path / "empty.pem").write_text("nothing")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    server = grpc.server(ThreadPoolExecutor(1))
    url = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    ask = ask_asynchronously if asynchronous else ask_one
    with pytest.raises(ServerError, match=message.format(re.escape(url))) as raised:
        ask(url, None if trusts is None else tmp_path / trusts)
    assert raised.value.is_unreachable == (message != "Method not found")
    server.stop(None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_refusal_is_told_also_while_the_request_is_being_written(asynchronous: bool) -> None:
    """Which of the two is first is chance: some of 100 requests are refused so."""
    server = grpc.server(ThreadPoolExecutor(1))
    url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    for _ in range(100):
        with pytest.raises(ServerError, match="Method not found!") as raised:
            (ask_asynchronously if asynchronous else ask_one)(url, None)
        assert raised.value.status == "UNIMPLEMENTED"
    server.stop(None)


def test_an_interruption_that_wakes_nobody_ends_a_stream_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes right before the main thread falls asleep, or another thread takes it."""

    class Silent:
        cancelled = False

        def start_stream(self, callback: object) -> None:
            Timer(0.05, lambda: signal.raise_signal(signal.SIGINT)).start()

        def async_stream_infer(self, *args: object, **options: object) -> None:
            pass

        def stop_stream(self, *, cancel_requests: bool) -> None:
            self.cancelled = cancel_requests

    client, silent = Client("grpc://127.0.0.1:1"), Silent()
    monkeypatch.setattr(client, "_client", silent)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(client.stream("hello", Settings(), patience=60.0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert silent.cancelled and time.monotonic() - began < 30.0


def test_what_does_not_speak_as_the_address_says_is_told() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(ServerError, match="does not speak TLS: give the address as grpc://"):
        ask_one(f"grpcs://127.0.0.1:{port}", None)
    server.stop(None)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        thread = Thread(target=web.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(ServerError, match=r"speaks HTTP/1\.1, not gRPC: give the port of gRPC"):
            ask_one(f"grpc://127.0.0.1:{web.server_port}", None)
        web.shutdown()


def ask_one(url: str, ca: Path | None) -> None:
    with Client(url, ca=ca) as client:
        next(client.stream("a", Settings()))


def ask_asynchronously(url: str, ca: Path | None) -> None:
    async def ask() -> None:
        client = AsyncClient(url, certificate=ca)
        try:
            async for _ in client.stream("a", Settings(), request_id="", stream=True):
                pass
        finally:
            await client.aclose()

    asyncio.run(ask())


def test_no_server() -> None:
    with Client("grpc://127.0.0.1:9") as client, pytest.raises(ServerError):
        next(client.stream("a", Settings()))


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--threads", "3"]])
def test_what_is_the_servers_to_say_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "grpc://127.0.0.1:9", *option, "hello"]) == 2
    assert "cannot be set for a server" in capsys.readouterr().err


class Asked:
    """Stands for the client; keeps what a server is asked."""

    settings: Settings | None = None

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompt: str, settings: Settings) -> Iterator[Reply]:
        Asked.settings = settings
        raise ServerError("asked", "UNAVAILABLE")


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ([], {}),
        (["--policy", '{"max_depth": 3, "children": [4]}'], {"max_depth": 3, "children": [4]}),
        (["--method", "speculative", "--num-draft-tokens", "3"], {"max_pending": 3}),
        (
            ["--method", "speculative", "--num-draft-tokens", "3", "--policy", '{"risk_budget": 0.5}'],
            {"max_pending": 3, "risk_budget": 0.5},
        ),
    ],
)
def test_a_server_is_asked_for_what_the_options_say_of_the_policy(
    monkeypatch: pytest.MonkeyPatch, options: list[str], policy: dict[str, object]
) -> None:
    monkeypatch.setattr("ssv.client.triton.Client", Asked)
    assert main(["--url", "grpc://127.0.0.1:9", *options, "hello"]) == 2
    assert Asked.settings is not None and Asked.settings.policy == policy
    tensors = {t.name(): t for t in request_inputs("hello", Asked.settings, stream=True)}
    assert json.loads(tensors["ssv_policy"]._get_content()[4:] if policy else "{}") == policy


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-draft-tokens", "3"], "--num-draft-tokens is of the method speculative, not of premium"),
        (["--policy", "{"], "'{' is not JSON"),
        (["--policy", "3"], "'3' is no JSON object"),
        (
            ["--method", "speculative", "--num-draft-tokens", "3", "--policy", '{"max_pending": 4}'],
            "--num-draft-tokens and max_pending of --policy are the same setting: give one of them",
        ),
    ],
)
@pytest.mark.parametrize("where", [["--url", "grpc://127.0.0.1:9"], ["--bundle", "/nowhere"]])
def test_options_of_a_policy_that_cannot_be(
    where: list[str], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main([*where, *options, "hello"]) == 2
    except SystemExit as error:  # argparse's own
        assert error.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("hint: ", "").split()).replace(" give one", ": give one")
