"""The doors before tritonserver: what they pass on, what they say themselves, and what they count."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ssv.runtime.serving.live_audit import Standing
from ssv.runtime.serving.metrics import Metrics, Reader
from ssv.triton_repo.front import Front, State

MODEL = "/v2/models/ensemble"
ASKED = b'{"text_input": "a"}'


def nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = [value]
    return value


class Triton(BaseHTTPRequestHandler):
    """Answers as it is told to, by path; remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    replies: dict[str, Callable[[Triton], None]]
    asked: list[tuple[str, str, dict[str, str], bytes]]

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.asked.append((self.command, self.path, dict(self.headers), body))
        self.replies.get(self.path.partition("?")[0], lambda triton: triton.reply(404, b"{}"))(self)

    do_POST = do_PUT = do_GET

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def pieces(self, *pieces: bytes, ends: bool = True) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if ends:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Doors:
    def __init__(self, folder: Path) -> None:
        self.replies: dict[str, Callable[[Triton], None]] = {}
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        handler = type("Told", (Triton,), {"replies": self.replies, "asked": self.asked})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.http, self.metrics = (each.getsockname()[1] for each in sockets)
        self.reader = Reader(folder)
        self.engines = Metrics(folder, "ssv")
        self.resets: list[str] = []
        self.is_heard = True
        self.front = Front(*sockets, Metrics(folder, "serve"), self.reader, self.reset, "x-admin=secret")
        self.front.lead_to(self.server.server_port, self.server.server_port)

    def reset(self, tier: str) -> bool:
        """Plays the engines' process, which hears of it a moment later."""
        self.resets.append(tier)
        if self.is_heard:
            standing = Standing(evidence=1.0, is_withdrawn=False)
            threading.Timer(0.05, self.engines.stands, (tier, standing)).start()
        return self.is_heard

    def be(self, state: State) -> None:
        self.front.state = state

    def ask(
        self, path: str, body: bytes | None = None, method: str | None = None, port: int = 0, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", port or self.http, timeout=30.0)
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        response = connection.getresponse()
        found = response.status, dict(response.headers), response.read()
        connection.close()
        return found

    def refused(self, reason: str) -> float:
        return self.reader.get("ssv_requests_refused", reason=reason)

    def triton_dies(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def close(self) -> None:
        self.front.close()
        self.triton_dies()


@pytest.fixture
def doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doors]:
    monkeypatch.setattr(
        logging.getLogger("ssv"), "propagate", True
    )  # a command that has run before has it write to stderr alone
    made = Doors(tmp_path)
    made.be("serving")
    yield made
    made.close()


def message(body: bytes) -> str:
    return str(json.loads(body)["error"])


# What is passed on


def test_requests_and_answers_pass_as_they_are(doors: Doors) -> None:
    doors.replies[f"{MODEL}/infer"] = lambda triton: triton.reply(200, b"\x00\xff", Inference_Header_Content_Length="2")
    status, headers, body = doors.ask(
        f"{MODEL}/infer?a=%2F", b"\x01\xfe", X_Request_Id="mine", Inference_Header_Content_Length="1"
    )
    assert (status, body, headers["Inference-Header-Content-Length"]) == (200, b"\x00\xff", "2")
    ((method, path, sent, data),) = doors.asked
    assert (method, path, data) == ("POST", f"{MODEL}/infer?a=%2F", b"\x01\xfe")
    assert (sent["X_Request_Id"], sent["Inference_Header_Content_Length"]) == ("mine", "1")


def test_what_is_packed_stays_packed(doors: Doors) -> None:
    packed = b"\x1f\x8b not really"
    doors.replies[f"{MODEL}/infer"] = lambda triton: triton.reply(200, packed, Content_Encoding="gzip")
    _, headers, body = doors.ask(f"{MODEL}/infer", packed, **{"Content-Encoding": "gzip"})
    assert (body, headers["Content-Encoding"]) == (packed, "gzip")
    assert doors.asked[0][3] == packed


def test_a_stream_comes_as_it_is_made(doors: Doors) -> None:
    goes_on = threading.Event()

    def reply(triton: Triton) -> None:
        triton.send_response(200)
        triton.send_header("Transfer-Encoding", "chunked")
        triton.end_headers()
        triton.wfile.write(b"3\r\none\r\n")
        assert goes_on.wait(30.0)
        triton.wfile.write(b"3\r\ntwo\r\n0\r\n\r\n")

    doors.replies[f"{MODEL}/generate_stream"] = reply
    connection = HTTPConnection("127.0.0.1", doors.http, timeout=30.0)
    connection.request("POST", f"{MODEL}/generate_stream", ASKED)
    response = connection.getresponse()
    assert response.read1() == b"one"
    assert doors.front.num_running == 1
    goes_on.set()
    assert response.read() == b"two"
    connection.close()


def test_a_client_that_leaves_takes_its_request_along(doors: Doors) -> None:
    began, left = threading.Event(), threading.Event()

    def reply(triton: Triton) -> None:
        triton.pieces(b"one", ends=False)
        triton.wfile.flush()
        began.set()
        assert triton.rfile.read(1) == b"", "the connection is closed"
        left.set()

    doors.replies[f"{MODEL}/generate_stream"] = reply
    connection = HTTPConnection("127.0.0.1", doors.http, timeout=30.0)
    connection.request("POST", f"{MODEL}/generate_stream", ASKED)
    connection.getresponse().read1()
    assert began.wait(30.0)
    connection.close()
    assert left.wait(30.0)


def test_a_stream_that_breaks_does_not_look_whole(doors: Doors) -> None:
    doors.replies[f"{MODEL}/generate_stream"] = lambda triton: triton.pieces(b"data: 1\n\n", ends=False)
    with pytest.raises((IncompleteRead, ConnectionError)):
        doors.ask(f"{MODEL}/generate_stream", ASKED)


# Errors


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("in ensemble 'ensemble', UNAVAILABLE: 6 requests are waiting already: try again later", 503),
        ("in ensemble 'ensemble', INVALID_ARGUMENT: top_p 5 must be above 0", 400),
        ("in ensemble 'ensemble', INTERNAL: broken", 500),
        ("Unable to parse 'x': attempt to access JSON non-boolean", 400),
        ("failed to parse the request JSON buffer: Invalid value. at 0", 400),
        ("attempt to get members for non-object", 400),
    ],
)
@pytest.mark.parametrize("door", ["generate", "generate_stream", "infer"])
def test_errors_have_the_status_that_they_mean(doors: Doors, door: str, text: str, status: int) -> None:
    """Triton 2.51 answers `generate` with 400 whatever it is."""
    body = json.dumps({"error": text}).encode()
    if door == "generate_stream":
        body = b"data: " + body + b"\n\n"
    for said in (400, 500) if "parse" in text or "non-object" in text else (400,):
        doors.replies[f"{MODEL}/{door}"] = lambda triton, said=said: triton.reply(said, body)
        found, headers, text_found = doors.ask(f"{MODEL}/{door}", ASKED)
        assert (found, text_found) == (status, body)
        assert headers.get("Retry-After") == ("1" if status == 503 else None)


@pytest.mark.parametrize(
    "body",
    [
        {"text_input": "a", "stream": True},
        {"ssv_messages": "[]", "stream": [True]},
        {"input_ids": [1], "stream": True},
        {"text_input": "a", "parameters": {"stream": True}},
    ],
)
def test_generate_has_no_stream_and_says_what_has(
    doors: Doors, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Triton 2.51 decodes all of it, and then says 200 and that there is an error."""
    status, _, found = doors.ask(f"{MODEL}/generate", json.dumps(body).encode())
    words = f"stream is true, and generate gives one answer: ask {MODEL}/generate_stream, or leave stream out"
    assert (status, message(found)) == (400, words)
    assert not doors.asked and doors.reader.get("ssv_requests_invalid") == 1
    assert [(record.message, record.ssv) for record in caplog.records if record.name == "ssv.serve"] == [
        ("request", {"reason": "invalid", "error": words})
    ]


@pytest.mark.parametrize("door", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([{"text_input": "a"}], "the body must be a JSON object"),
        (None, "the body must be a JSON object"),
        ({"text_input": "a", "parameters": 5}, "parameters must be a JSON object"),
        ({}, "text_input is missing: give a prompt there, or in input_ids, or a conversation in ssv_messages"),
        (
            {"nothing": 1, "parameters": {"none": 2}},
            "text_input is missing: give a prompt there, or in input_ids, or a",
        ),
        ({"text_input": "a", "max_tokens": 2**32 + 3}, "max_tokens 4294967299 is too large: give at most 2147483647"),
        ({"text_input": "a", "parameters": {"top_k": -(2**31) - 1}}, "top_k -2147483649 is too small: give at least -"),
        ({"input_ids": nested(900, 2**31)}, "input_ids 2147483648 is too large: give at most 2147483647"),
        ({"input_ids": [[5, 2**31]]}, "input_ids 2147483648 is too large: give at most 2147483647"),
    ],
)
def test_what_triton_would_misread_never_gets_there(doors: Doors, door: str, body: Any, says: str) -> None:
    """Triton 2.51 decodes with the lower 32 bits of a number, and answers 500 to what is no object."""
    status, _, found = doors.ask(f"{MODEL}/{door}", json.dumps(body).encode())
    assert status == 400 and message(found).startswith(says)
    assert not doors.asked and doors.reader.get("ssv_requests_invalid") == 1


@pytest.mark.parametrize("size", [10, 3 << 20])
@pytest.mark.parametrize(
    ("door", "given"),
    [
        ("generate", {"text_input": "a", "stream": False}),
        ("generate", {"max_tokens": 2**31 - 1, "stop_token_ids": [-(2**31)], "seed": 2**64 - 1, "stream": True}),
        ("generate", {"parameters": {"text_input": "a"}}),
        ("generate_stream", {"text_input": "a", "stream": True}),
    ],
)
def test_other_requests_pass_whatever_their_length(doors: Doors, door: str, given: Any, size: int) -> None:
    doors.replies[f"{MODEL}/{door}"] = lambda triton: triton.reply(200, b'{"text_output": "b"}')
    body = json.dumps(given).encode() + b" " * size
    status, _, found = doors.ask(f"{MODEL}/{door}", body)
    assert (status, found) == (200, b'{"text_output": "b"}')
    ((*_, asked),) = doors.asked
    assert asked == body


def test_an_error_is_no_answer_whatever_its_status(doors: Doors) -> None:
    body = b'{"error":"generate expects model to produce exactly 1 response"}'
    doors.replies[f"{MODEL}/generate"] = lambda triton: triton.reply(200, body)
    status, _, found = doors.ask(f"{MODEL}/generate", b"x")
    assert (status, found) == (400, body)


def test_other_answers_keep_their_status(doors: Doors) -> None:
    doors.replies["/v2/repository/index"] = lambda triton: triton.reply(403, b"UNAVAILABLE: no")
    assert doors.ask("/v2/repository/index", b"")[0] == 403
    assert doors.ask("/v2/nothing")[0] == 404


# States


READINESS = ("/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready")


@pytest.mark.parametrize("path", READINESS)
def test_readiness_is_the_servers_while_it_serves(doors: Doors, path: str) -> None:
    doors.replies[path] = lambda triton: triton.reply(200, b"")
    assert doors.ask(path)[0] == 200
    doors.replies[path] = lambda triton: triton.reply(400, b"")
    status, headers, _ = doors.ask(path)
    assert (status, headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("state", ["starting", "draining"])
@pytest.mark.parametrize("path", READINESS)
def test_readiness_is_false_at_once(doors: Doors, path: str, state: State) -> None:
    doors.replies[path] = doors.replies["/v2/health/live"] = lambda triton: triton.reply(200, b"")
    doors.be(state)
    status, headers, _ = doors.ask(path)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert doors.ask("/v2/health/live")[0] == 200
    assert not doors.asked, "whatever Triton says"


def test_before_and_between_servers_requests_are_refused_and_counted(
    doors: Doors, caplog: pytest.LogCaptureFixture
) -> None:
    doors.be("starting")
    for door in ("generate", "generate_stream", "infer"):
        status, headers, body = doors.ask(f"{MODEL}/{door}", ASKED)
        assert (status, headers["Retry-After"], message(body)) == (503, "1", "the server is starting: try again later")
    assert doors.refused("starting") == 3
    told = [record.ssv for record in caplog.records if record.message == "request"]
    assert told == [{"reason": "refused", "error": "the server is starting: try again later"}] * 3
    assert not doors.asked


def test_while_it_drains_the_models_refuse(doors: Doors) -> None:
    """They count what they refuse."""
    doors.replies[f"{MODEL}/generate"] = lambda triton: triton.reply(400, b'{"error":"UNAVAILABLE: it drains"}')
    doors.be("draining")
    assert doors.ask(f"{MODEL}/generate", ASKED)[0] == 503
    assert doors.refused("draining") == 0


@pytest.mark.parametrize(("state", "reason"), [("serving", "starting"), ("draining", "draining")])
def test_a_server_that_is_gone(doors: Doors, state: State, reason: str) -> None:
    doors.be(state)
    doors.triton_dies()
    status, headers, _ = doors.ask(f"{MODEL}/generate", ASKED)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert doors.refused(reason) == 1
    assert doors.ask("/v2/health/ready")[0] == 503
    assert doors.ask("/v2/health/live")[0] == 200, "it is started again"


def test_a_server_that_dies_while_it_answers(doors: Doors) -> None:
    def reply(triton: Triton) -> None:
        triton.close_connection = True

    doors.replies[f"{MODEL}/generate"] = reply
    status, headers, body = doors.ask(f"{MODEL}/generate", ASKED)
    assert status == 500 and "Retry-After" not in headers
    assert "failed while the request ran" in message(body)
    assert doors.refused("starting") == 0, "it was taken"


# Metrics


def test_the_servers_metrics_stand_before_tritons(doors: Doors) -> None:
    doors.replies["/metrics"] = lambda triton: triton.reply(200, b"nv_inference_count 3\n")
    status, headers, body = doors.ask("/metrics", port=doors.metrics)
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.decode() == doors.reader.text() + "nv_inference_count 3\n"


def test_metrics_are_there_without_triton(doors: Doors) -> None:
    doors.triton_dies()
    assert doors.ask("/metrics", port=doors.metrics)[2].decode() == doors.reader.text()
    assert doors.ask("/v2/health/live", port=doors.metrics)[0] == 404


def test_connections_of_clients_are_kept(doors: Doors) -> None:
    doors.replies[f"{MODEL}/generate"] = lambda triton: triton.reply(400, b'{"error":"UNAVAILABLE: x"}')
    connection: Any = HTTPConnection("127.0.0.1", doors.http, timeout=30.0)
    for _ in range(3):
        connection.request("POST", f"{MODEL}/generate", ASKED)
        assert connection.getresponse().read()
    own = connection.sock
    assert own is not None and own.fileno() > 0
    connection.close()


# --- tiers that are withdrawn ---------------------------------------------------------------------------------------

RESET = "/v2/ssv/tiers/balanced/reset"


def withdrawn(doors: Doors) -> float:
    return doors.reader.get("ssv_tier_withdrawn", tier="balanced")


@pytest.fixture
def broken(doors: Doors) -> Doors:
    """Their server has withdrawn a tier."""
    doors.engines.stands("balanced", Standing(evidence=200.0, is_withdrawn=True))
    return doors


def test_an_operator_resets_a_tier(broken: Doors) -> None:
    status, _, body = broken.ask(RESET, b"", **{"x-admin": "secret"})
    assert (status, json.loads(body)) == (200, {"tier": "balanced", "withdrawn": False})
    assert broken.resets == ["balanced"] and not withdrawn(broken)
    assert not broken.asked, "tritonserver has no part in it"


@pytest.mark.parametrize("headers", [{}, {"x-admin": "guess"}, {"x-admin": ""}, {"x-other": "secret"}])
def test_nobody_else_does(broken: Doors, headers: dict[str, str]) -> None:
    status, _, body = broken.ask(RESET, b"", **headers)
    assert status == 403 and "--admin-key" in json.loads(body)["error"]
    assert not broken.resets and withdrawn(broken)


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        (RESET, "GET", 405),
        ("/v2/ssv/tiers/premium/reset", "POST", 404),
        ("/v2/ssv/tiers/gold/reset", "POST", 404),
    ],
)
def test_what_cannot_be_reset(broken: Doors, path: str, method: str, expected: int) -> None:
    assert broken.ask(path, None, method, **{"x-admin": "secret"})[0] == expected
    assert not broken.resets and withdrawn(broken)


def test_a_reset_that_nobody_hears(broken: Doors) -> None:
    broken.is_heard = False
    status, headers, _ = broken.ask(RESET, b"", **{"x-admin": "secret"})
    assert status == 503 and headers["Retry-After"] and withdrawn(broken)
    broken.be("draining")
    assert broken.ask(RESET, b"", **{"x-admin": "secret"})[0] == 503 and len(broken.resets) == 1


def test_without_an_admin_key_it_is_shut_to_all(tmp_path: Path) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port = sockets[0].getsockname()[1]
    front = Front(*sockets, Metrics(tmp_path, "serve"), Reader(tmp_path), lambda _: True)
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=30.0)
        connection.request("POST", RESET, b"", {"x-admin": "secret"})
        assert connection.getresponse().status == 403
        connection.close()
    finally:
        front.close()
