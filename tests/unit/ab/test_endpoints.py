"""What arms answer, and what they send instead of an answer: before servers that are made up, with the real clients."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from ab_cases import Respond, chunk, events, http_server, send, usage, whole_answer
from certificates import self_signed
from openai.resources.chat.completions import Completions
from openai.types.chat import ChatCompletionChunk
from starlette.testclient import TestClient
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ssv.ab import openai_endpoint
from ssv.ab.answers import Answer, EndpointError, Sampling
from ssv.ab.arms import parse_arm
from ssv.ab.endpoints import connect
from ssv.ab.openai_endpoint import OpenAIEndpoint
from ssv.client.triton import Reply
from ssv.support.errors import UserError
from ssv.triton_repo.openai.app import create_app
from ssv.triton_repo.openai.translation import Models

SAMPLING = Sampling(max_tokens=16, temperature=0.5, timeout=5.0)

# OpenAI.


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "SSV_AB_KEY_API", "SSV_AB_KEY_API_1_X"):
        monkeypatch.delenv(name, raising=False)


def ask(respond: Respond, *, arm: str = "api", sampling: Sampling = SAMPLING) -> Answer:
    with http_server(respond) as url:
        endpoint = connect(parse_arm(f"{arm}={url}?model=org/m"))
        try:
            assert endpoint.disclosure() is None
            return endpoint.ask("Hi", sampling, 7)
        finally:
            endpoint.close()


def sends(body: bytes, **options: Any) -> Respond:
    return lambda handler, _: send(handler, body, **options)


def test_a_request_is_openais_and_streams_with_usage() -> None:
    taken: list[tuple[str, str | None, dict[str, Any]]] = []

    def respond(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        taken.append((handler.path, handler.headers["authorization"], body))
        send(handler, whole_answer())

    answer = ask(respond)
    assert taken == [
        (
            "/v1/chat/completions",
            "Bearer none",
            {
                "model": "org/m",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 16,
                "temperature": 0.5,
                "seed": 7,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    ]
    assert (answer.text, answer.finish_reason) == ("Hello", "stop")
    assert (answer.output_tokens, answer.prompt_tokens, answer.cached_tokens) == (4, 7, 0)
    assert [tokens for _, tokens in answer.arrivals] == [2, 2]
    moments = [moment for moment, _ in answer.arrivals]
    assert 0 < moments[0] <= moments[1]
    assert answer.target_passes is answer.unverified is answer.tier is answer.lossless is None


@pytest.mark.parametrize(
    ("arm", "environment", "key"),
    [
        ("api", {"OPENAI_API_KEY": "openai's"}, "none"),  # which is for OpenAI, and not for whoever is compared with it
        ("api", {"OPENAI_API_KEY": "openai's", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, "openai's"),
        ("api", {"OPENAI_API_KEY": "openai's", "OPENAI_BASE_URL": "https://elsewhere/v1"}, "none"),
        ("api", {"OPENAI_API_KEY": "openai's", "SSV_AB_KEY_API": "own\n"}, "own"),
        ("api-1.x", {"SSV_AB_KEY_API_1_X": "own"}, "own"),
        ("api", {"SSV_AB_KEY_API_1_X": "another's"}, "none"),
    ],
)
def test_a_key_goes_to_the_host_that_it_is_for(
    arm: str, environment: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys = []

    def respond(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        keys.append(handler.headers["authorization"])
        send(handler, whole_answer())

    ask(respond, arm=arm)
    assert keys == [f"Bearer {key}"]


def test_the_first_token_comes_with_the_first_content(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)

    def stream(*_: Any, **__: Any) -> Iterator[ChatCompletionChunk]:
        for now, content in (
            (101.0, chunk("")),  # the role, at once
            (102.0, chunk()),
            (103.0, chunk("He")),
            (103.5, chunk("llo")),
            (105.0, chunk("!")),
            (106.0, chunk(reason="stop")),
            (109.0, usage(7)),
        ):
            clock.now = now
            yield ChatCompletionChunk.model_validate(content)

    monkeypatch.setattr(Completions, "create", stream)
    monkeypatch.setattr(openai_endpoint, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    answer = OpenAIEndpoint(parse_arm("api=http://127.0.0.1:1/v1?model=m")).ask("Hi", SAMPLING, 0)
    assert [moment for moment, _ in answer.arrivals] == [3.0, 3.5, 5.0]
    assert sum(tokens for _, tokens in answer.arrivals) == answer.output_tokens == 7


def test_tokens_are_those_of_usage_shared_out_among_the_chunks() -> None:
    body = events(
        *(chunk(c) for c in "abc"), chunk(reason="length"), usage(16, prompt_tokens_details={"cached_tokens": 3})
    )
    answer = ask(sends(body))
    assert (answer.output_tokens, answer.cached_tokens) == (16, 3)
    assert [tokens for _, tokens in answer.arrivals] == [5, 6, 5]
    fewer = ask(sends(events(*(chunk(c) for c in "abcd"), chunk(reason="stop"), usage(2))))
    assert sum(tokens for _, tokens in fewer.arrivals) == fewer.output_tokens == 2


def test_an_answer_without_text_is_one() -> None:
    answer = ask(sends(events(chunk(""), chunk(reason="stop"), usage(1))))
    assert (answer.text, answer.arrivals, answer.output_tokens) == ("", [], 1)


class Backend:
    """Behind ssv's own OpenAI API."""

    async def stream(self, *_: Any, **__: Any) -> AsyncGenerator[Reply, None]:
        known: dict[str, Any] = {"judged": 4, "accepted": 3, "unverified": 1, "typical": 0, "target_passes": 2}
        known["cached_tokens"] = 5
        for text, reason in (("Hel", ""), ("lo", "stop")):
            yield Reply(text, reason, 7, 2, **known, tier="turbo", lossless=False)

    async def is_ready(self) -> bool:
        return True

    async def aclose(self) -> None:
        pass


def test_what_ssvs_own_openai_api_discloses_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    app = TestClient(create_app(Backend(), Models("tiny", ("turbo",), 1)))
    monkeypatch.setattr(openai_endpoint, "http_client", lambda **_: app)
    answer = connect(parse_arm("api=http://testserver/v1?model=tiny:turbo")).ask("Hi", SAMPLING, 7)
    assert (answer.text, answer.finish_reason, answer.output_tokens) == ("Hello", "stop", 4)
    assert (answer.prompt_tokens, answer.cached_tokens) == (7, 5)
    assert (answer.tier, answer.lossless, answer.unverified, answer.target_passes) == ("turbo", False, 1, 2)
    assert answer.judged is answer.accepted is None  # it sends their ratio alone


def test_what_is_disclosed_in_another_shape_is_not_known() -> None:
    garbled = {"tier": {"x": 1}, "lossless": "no", "unverified_tokens": "many", "target_passes": [2]}
    answer = ask(sends(events(chunk("a"), chunk(reason="stop", ssv=garbled), usage(2))))
    assert (answer.tier, answer.lossless, answer.unverified, answer.target_passes) == (None, None, None, None)


REFUSAL = json.dumps({"error": {"message": "no such model", "type": "x"}}).encode()


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (b"<html>Bad gateway</html>", {"status": 500}, "InternalServerError: "),
        (REFUSAL, {"status": 404}, "no such model"),
        (b"", {"status": 429}, "RateLimitError: "),
        (b"<html>Welcome!</html>", {}, "what came is no stream of chat completions: give the address"),
        (json.dumps({"choices": []}).encode(), {}, "what came is no stream of chat completions: give"),
        (b"", {}, "what came is no stream of chat completions: give the address"),
        (events(b"{not JSON"), {}, "what came is no stream of chat completions"),
        (events(b"\xff\xfe"), {}, "what came is no stream of chat completions"),
        (events([1, 2]), {}, "what came is no stream of chat completions"),
        (events("text"), {}, "what came is no stream of chat completions"),
        (events({"choices": None}), {}, "what came is no stream of chat completions"),
        (events({"choices": [{"delta": None}]}), {}, "what came is no stream of chat completions"),
        (events({"choices": [{"index": 0, "delta": {"content": 5}}]}), {}, "what came is no stream"),
        (events({"choices": 7}), {}, "what came is no stream of chat completions"),
        (events({"error": {"message": "out of memory"}}), {}, "out of memory"),
        (events(chunk("a"), chunk(reason="stop"), usage("many")), {}, "what came is no stream"),
        (events(chunk("a"), chunk(reason="stop"), usage(None)), {}, "what came is no stream"),
        (events(chunk("a"), chunk(reason="stop", ssv=["turbo"]), usage(1)), {}, "what came is no stream"),
        (events(chunk("a"), chunk(reason="stop")), {}, "no usage came: tokens cannot be counted"),
        (events(chunk("a"), chunk(reason="stop"), usage(0)), {}, "0 tokens for 1 characters cannot be"),
        (events(chunk("a"), chunk(reason="stop"), usage(-3)), {}, "-3 tokens for 1 characters cannot be"),
        (events(chunk("a"), chunk(reason="stop"), usage(10**12)), {}, "1000000000000 tokens cannot be, of 16 at most"),
        (events(chunk("a"), usage()), {}, "the stream ended before the answer did"),
        (events(chunk("a"), done=False), {"missing": 50}, "APIConnectionError: Connection error"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_that_says_so(body: bytes, options: dict[str, int], message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        ask(sends(body, **options))
    assert message in str(caught.value)


def test_an_endpoint_that_is_not_there_or_hangs_up_or_never_answers_is_an_error() -> None:
    endpoint = connect(parse_arm("api=http://127.0.0.1:1/v1?model=m"))
    with pytest.raises(EndpointError, match="APIConnectionError"):
        endpoint.ask("Hi", SAMPLING, 0)
    with pytest.raises(EndpointError, match="APIConnectionError"):
        ask(lambda handler, _: handler.connection.close())
    with pytest.raises(EndpointError, match=r"[Tt]imed? ?out"):
        ask(sends(events(chunk("a"), done=False), missing=50, stall=True), sampling=Sampling(16, 0.5, 0.1))


def test_a_request_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        calls.append(1)
        send(handler, b"", status=503)

    with pytest.raises(EndpointError):
        ask(respond)
    assert len(calls) == 1


# What is an answer, and what of it.


@pytest.mark.parametrize("reason", ["stop", "length", "eos_token", "end_turn", "STOP", "MAX_TOKENS", "stop_sequence"])
def test_an_answer_ends_by_stop_or_length_or_what_servers_call_them(reason: str) -> None:
    answer = ask(sends(events(chunk("a"), chunk(reason=reason), usage(1))))
    assert (answer.text, answer.finish_reason) == ("a", reason)


@pytest.mark.parametrize(
    "reason",
    ["abort", "error", "content_filter", "cancelled", "deadline", "tool_calls", "repetition", "SAFETY", "stopped"],
)
def test_what_ends_by_anything_else_is_no_answer_and_named(reason: str) -> None:
    with pytest.raises(EndpointError, match=f"the response ended by '{reason}', which is no end of an answer"):
        ask(sends(events(chunk("a"), chunk(reason=reason), usage(1))))


def delta(**fields: Any) -> dict[str, Any]:
    made = chunk()
    made["choices"][0]["delta"] = fields
    return made


def broken(reason: str, error: Any) -> dict[str, Any]:
    made = chunk(reason=reason)
    made["choices"][0]["error"] = error
    return made


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (delta(refusal="I cannot."), "the model refused to answer: I cannot."),
        (delta(tool_calls=[{"index": 0, "function": {"name": "f"}}]), "the model called a tool"),
        ({"message": "overloaded"}, "no stream of chat completions: overloaded"),
        ({**chunk("b"), "choices": [{"index": 1, "delta": {"content": "b"}}]}, "several answers came"),
        ({"error": {"message": "engine died"}}, "engine died"),
        ({"error": "out of memory"}, "out of memory"),
        (broken("stop", {"code": 502, "message": "provider died"}), "the answer broke off: provider died"),
        (broken("error", "provider died"), "the answer broke off: provider died"),
    ],
)
def test_what_comes_among_an_answer_and_spoils_it_is_named(sent: Any, message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        ask(sends(events(chunk("a"), sent, chunk(reason="stop"), usage(2))))
    assert message in str(caught.value)


def timed(monkeypatch: pytest.MonkeyPatch, *sent: tuple[float, dict[str, Any]], address: str = "") -> Answer:
    """The answer to what comes at these moments."""
    clock = SimpleNamespace(now=100.0)

    def stream(*_: Any, **__: Any) -> Iterator[ChatCompletionChunk]:
        for now, content in sent:
            clock.now = 100.0 + now
            yield ChatCompletionChunk.model_validate(content)

    monkeypatch.setattr(Completions, "create", stream)
    monkeypatch.setattr(openai_endpoint, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return OpenAIEndpoint(parse_arm(f"api=http://127.0.0.1:1/v1?model=m{address}")).ask("Hi", SAMPLING, 0)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "reasoning_details"])
def test_reasoning_is_tokens_in_time_and_count_apart_from_the_answer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thought(second: int) -> Any:
        text = f"t{second} "
        return text if name != "reasoning_details" else [{"type": "reasoning.text", "text": text}]

    answer = timed(
        monkeypatch,
        (0.5, chunk("")),
        *((second, delta(content=None, **{name: thought(second)})) for second in (1, 2, 3)),
        (4, chunk("\n")),
        (5, chunk("Os")),
        (6, chunk("lo")),
        (6, chunk(reason="stop")),
        (6, usage(12)),
    )
    assert (answer.text, answer.reasoning) == ("\nOslo", "t1 t2 t3 ")
    assert answer.arrivals == [(float(second), 2) for second in range(1, 7)]
    assert (answer.output_tokens, answer.reasoning_tokens, answer.ttfo_s) == (12, 6, 5.0)


def test_an_answer_that_is_all_reasoning_has_times_and_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = timed(
        monkeypatch, (1, delta(reasoning="a")), (2, delta(reasoning="b")), (2, chunk(reason="length")), (2, usage(16))
    )
    assert (answer.text, answer.reasoning, answer.finish_reason, answer.ttfo_s) == ("", "ab", "length", None)
    assert (answer.arrivals, answer.reasoning_tokens) == ([(1.0, 8), (2.0, 8)], 16)


def test_reasoning_in_tags_counts_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = timed(
        monkeypatch,
        *((n, chunk(text)) for n, text in enumerate(("<think>", "Rome?", "</think>", "\n\n", "Oslo"), start=1)),
        (5, chunk(reason="stop")),
        (5, usage(5)),
    )
    assert answer.text == "<think>Rome?</think>\n\nOslo"
    assert (answer.reasoning_tokens, answer.ttfo_s, answer.arrivals[0][0]) == (3, 5.0, 1.0)


def test_reasoning_that_an_endpoint_keeps_to_itself_came_before_the_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def counted(**fields: Any) -> dict[str, Any]:
        return usage(**{"completion_tokens_details": {"reasoning_tokens": 8}, **fields})

    sent = ((4, chunk("Os")), (5, chunk("lo")), (5, chunk(reason="stop")))
    answer = timed(monkeypatch, *sent, (5, counted(tokens=12)))
    assert (answer.arrivals, answer.output_tokens, answer.reasoning_tokens) == ([(4.0, 10), (5.0, 2)], 12, 8)
    apart = timed(monkeypatch, *sent, (5, counted(tokens=4, total_tokens=19)))  # 7 of the prompt, 4, and 8 besides
    assert apart == answer


def test_reasoning_may_be_parts_of_the_content() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Oslo"}]
    answer = ask(sends(events(delta(content=parts), chunk(reason="stop"), usage(2))))
    assert (answer.text, answer.reasoning) == ("Oslo", "hm")


# Settings of an arm, and the errors that name them.


def ask_with(setting: str, respond: Respond) -> Answer:
    with http_server(respond) as url:
        endpoint = connect(parse_arm(f"api={url}?model=m{setting}"))
        try:
            return endpoint.ask("Hi", SAMPLING, 7)
        finally:
            endpoint.close()


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("&max_completion_tokens=yes", {"max_tokens": None, "max_completion_tokens": 16}),
        ("&temperature=1", {"temperature": 1.0}),
        ("&temperature=default", {"temperature": None}),
        ("&stream_options=no", {"stream_options": None}),
        ("&seed=no", {"seed": None}),
    ],
)
def test_a_setting_of_an_arm_changes_what_it_is_sent(setting: str, changes: dict[str, Any]) -> None:
    bodies: list[dict[str, Any]] = []

    def respond(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        bodies.append(body)
        send(handler, whole_answer())

    ask_with("", respond)
    ask_with(setting, respond)
    plain, changed = bodies
    assert changed == {name: value for name, value in {**plain, **changes}.items() if value is not None}


REFUSALS = [
    ("max_completion_tokens=yes", "Unsupported parameter: 'max_tokens' is not supported with this model."),
    ("max_completion_tokens=yes", "Use 'max_completion_tokens' instead of max_tokens"),
    (
        "temperature=1",
        "Unsupported value: 'temperature' does not support 0.5. Only the default (1) value is supported.",
    ),
    ("temperature=default", "Unsupported parameter: 'temperature' is not supported with this model."),
    ("stream_options=no", [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]),
    ("seed=no", [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]),
    ("stream=no", "Your organization must be verified to stream this model"),
]


@pytest.mark.parametrize(("setting", "said"), REFUSALS)
def test_a_refusal_of_what_was_sent_names_the_setting(setting: str, said: Any) -> None:
    body = json.dumps({"error": {"message": said}} if isinstance(said, str) else {"detail": said}).encode()

    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        send(handler, body, status=400 if isinstance(said, str) else 422)

    with pytest.raises(EndpointError, match=f": add {setting} to the address of arm api$"):
        ask_with("", respond)
    with pytest.raises(EndpointError) as caught:  # it is there already
        ask_with(f"&{setting}", respond)
    assert f"add {setting}" not in str(caught.value)


PLAIN = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Oslo", "reasoning": "hm"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11},
}  # fmt: skip


def respond_with(
    body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None
) -> Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]:
    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def test_an_answer_of_plain_json_needs_a_setting_and_has_no_times_of_tokens() -> None:
    respond = respond_with(json.dumps(PLAIN).encode(), "application/json; charset=utf-8")
    with pytest.raises(
        EndpointError, match="plain JSON came instead of a stream: add stream=no to the address of arm api"
    ):
        ask_with("", respond)
    answer = ask_with("&stream=no", respond)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Oslo", "hm", "stop")
    assert (answer.output_tokens, answer.prompt_tokens, answer.arrivals, answer.ttfo_s) == (4, 7, [], None)


@pytest.mark.parametrize("setting", ["", "&stream=no"])
def test_a_page_or_other_json_is_no_answer_and_says_what_to_do(setting: str) -> None:
    page = b"<!doctype html><html><head><title>Sign in\n to Example</title></head>" + b"x" * 5000
    with pytest.raises(
        EndpointError, match="a web page came, 'Sign in to Example', as of a login or a proxy: give the address"
    ):
        ask_with(setting, respond_with(page, "text/html; charset=utf-8"))
    with pytest.raises(
        EndpointError, match=r"^PermissionDeniedError: 403: 'Sign in to Example': give its key in SSV_AB_KEY_API$"
    ):
        ask_with(setting, respond_with(page, "text/html", 403))
    with pytest.raises(EndpointError, match="quota exceeded"):
        ask_with(setting, respond_with(b'{"error": {"message": "quota exceeded"}}', "application/json"))
    with pytest.raises(EndpointError, match=r"NotFoundError: 404: .*: give the address of an OpenAI API, with its /v1"):
        ask_with(setting, respond_with(b'{"detail": "Not Found"}', "application/json", 404))


def test_a_key_follows_no_redirection_and_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSV_AB_KEY_API", "sk-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    asked: list[Any] = []

    def elsewhere(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        asked.append(handler.headers)
        send(handler, whole_answer())

    with http_server(elsewhere) as other:
        redirect = respond_with(b"", "text/plain", 307, {"location": f"{other}/chat/completions"})
        with pytest.raises(
            EndpointError, match=f"it redirects to {other}/chat/completions: give the address that answers"
        ):
            ask_with("", redirect)
    assert asked == []
    ask_with("", elsewhere)
    assert asked[0]["authorization"] == "Bearer sk-secret" and asked[0]["openai-organization"] is None
    with pytest.raises(EndpointError) as caught:
        ask_with("", respond_with(b'{"error": {"message": "bad key sk-secret"}}', "application/json", 401))
    assert str(caught.value) == "AuthenticationError: 401: bad key ***: give its key in SSV_AB_KEY_API"
    monkeypatch.setenv("SSV_AB_KEY_API", "sk-sec\nret")
    with pytest.raises(UserError, match="SSV_AB_KEY_API holds characters that no key has") as wrong:
        connect(parse_arm("api=http://127.0.0.1:1/v1?model=m"))
    assert "sk-sec" not in str(wrong.value)


# Triton.


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers as `ensemble` does: by what the prompt says."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.parameter: str | None = json.dumps({"bundle": "tiny", "tiers": {"turbo": {}}})

    def ModelConfig(self, request: Any, context: Any) -> Any:
        response = service_pb2.model__config__pb2.ModelConfig(name=request.name)
        if self.parameter is not None:
            response.parameters["ssv_disclosure"].string_value = self.parameter
        return service_pb2.ModelConfigResponse(config=response)

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            self.requests.append(request)
            what = request.raw_input_contents[0][4:].decode()
            if what == "refuse":
                message = f"in ensemble 'ensemble', [request id: {request.id}] INVALID_ARGUMENT: no such tier"
                yield service_pb2.ModelStreamInferResponse(error_message=message)
                return
            if what == "break off":
                return
            yield response_of("", "", num_output_tokens=0)
            yield response_of("Hel", "", ssv_target_passes=1)
            if what == "fail":
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if what == "lacking":
                yield response_of("lo", "stop", ssv_tier_used=None)
            if what == "not text":
                yield response_of(b"\xff\xfe", "stop")
            if what == "deadline":
                yield response_of("lo", "deadline")
            if what == "no tokens":
                yield response_of("lo", "stop", num_output_tokens=-2)
            yield response_of("lo", "stop")


def response_of(text: str | bytes, reason: str, **changes: Any) -> Any:
    outputs: dict[str, Any] = {"text_output": text, "finish_reason": reason, "num_input_tokens": 7}
    outputs |= {"num_output_tokens": 2, "total_draft_tokens": 4, "total_accepted_draft_tokens": 3}
    outputs |= {"ssv_unverified_tokens": 1, "ssv_typical_tokens": 2, "ssv_target_passes": 2}
    outputs |= {"ssv_cached_tokens": 5, "ssv_logprobs": "", "ssv_tier_withdrawn": "", "ssv_fates": ""}
    outputs |= {"ssv_arm": "", "ssv_draft_tokens": 9, "ssv_kept_per_pass": ""}
    outputs |= {"ssv_tier_used": "turbo", "ssv_lossless": False, **changes}
    response = service_pb2.ModelInferResponse(model_name="ensemble")
    for name, value in outputs.items():
        if value is None:
            continue
        if isinstance(value, str | bytes):
            raw = value if isinstance(value, bytes) else value.encode()
            datatype, content = "BYTES", len(raw).to_bytes(4, "little") + raw
        elif isinstance(value, bool):
            datatype, content = "BOOL", bytes([value])
        else:
            datatype, content = "INT32", value.to_bytes(4, "little", signed=True)
        response.outputs.add(name=name, datatype=datatype, shape=[1, 1])
        response.raw_output_contents.append(content)
    return service_pb2.ModelStreamInferResponse(infer_response=response)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Triton, int]]:
    triton = Triton()
    with ThreadPoolExecutor(4) as pool:
        made = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, made)
        port = made.add_insecure_port("127.0.0.1:0")
        made.start()
        yield triton, port
        made.stop(0).wait()


def ask_triton(server: tuple[Triton, int], prompt: str, query: str = "", timeout: float = 5.0) -> Answer:
    endpoint = connect(parse_arm(f"a=grpc://127.0.0.1:{server[1]}{query}"))
    try:
        return endpoint.ask(prompt, Sampling(16, 0.5, timeout), 7)
    finally:
        endpoint.close()


def test_replies_of_ssv_are_an_answer_with_its_counts(server: tuple[Triton, int]) -> None:
    answer = ask_triton(server, "Hi")
    assert (answer.text, answer.finish_reason, answer.output_tokens) == ("Hello", "stop", 4)
    assert [tokens for _, tokens in answer.arrivals] == [2, 2]  # a response without tokens is not the first
    assert 0 < answer.arrivals[0][0] <= answer.arrivals[1][0]
    assert (answer.prompt_tokens, answer.cached_tokens, answer.target_passes) == (7, 5, 2)
    assert (answer.judged, answer.accepted, answer.unverified) == (4, 3, 1)
    assert (answer.tier, answer.lossless) == ("turbo", False)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("?method=turbo", {"ssv_tier": b"\x05\x00\x00\x00turbo"}),
        ("?max_divergence=0.25", {"ssv_max_divergence": np.float32(0.25).tobytes()}),
    ],
)
def test_an_arms_settings_go_with_the_request(
    server: tuple[Triton, int], query: str, expected: dict[str, bytes]
) -> None:
    ask_triton(server, "Hi", query)
    request = server[0].requests[-1]
    sent = dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=True))
    assert {name: sent[name] for name in sent if name in ("ssv_tier", "ssv_max_divergence")} == expected
    assert sent["max_tokens"] == (16).to_bytes(4, "little")
    assert sent["seed"] == (7).to_bytes(8, "little")
    assert sent["temperature"] == np.float32(0.5).tobytes()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("refuse", "INVALID_ARGUMENT: no such tier"),
        ("fail", "UNAVAILABLE: Socket closed"),
        ("lacking", "what came is no response of ssv: "),
        ("not text", "what came is no response of ssv: UnicodeDecodeError"),
        ("no tokens", "0 tokens for 5 characters cannot be"),
        ("deadline", "the response ended by 'deadline', which is no end of an answer"),
    ],
)
def test_what_ssv_sends_instead_of_an_answer_is_an_error(server: tuple[Triton, int], prompt: str, message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        ask_triton(server, prompt)
    assert str(caught.value).startswith(message)


def test_a_stream_that_ends_without_an_answer_is_waited_for_no_longer_than_the_timeout(
    server: tuple[Triton, int],
) -> None:
    with pytest.raises(EndpointError, match=r"DEADLINE_EXCEEDED: no response came in 0\.1 s"):
        ask_triton(server, "break off", timeout=0.1)


def test_why_there_is_no_connection_is_said(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"^APIConnectionError: Connection error: \[Errno \d+\] Connection refused"):
        connect(parse_arm("a=http://127.0.0.1:1/v1?model=m")).ask("Hi", SAMPLING, 0)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self_signed(tmp_path, "server"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(EndpointError, match=r"CERTIFICATE_VERIFY_FAILED.* set SSL_CERT_FILE to the PEM"):
            connect(parse_arm(f"a=https://127.0.0.1:{server.server_port}/v1?model=m")).ask("Hi", SAMPLING, 0)
        server.shutdown()


def test_a_server_that_is_not_there_is_an_error() -> None:
    endpoint = connect(parse_arm("a=grpc://127.0.0.1:1"))
    # Which of the two tritonclient says first is chance.
    with pytest.raises(EndpointError, match=r"no server answers at grpc://127\.0\.0\.1:1"):
        endpoint.ask("Hi", SAMPLING, 0)
    assert endpoint.disclosure() is None
    with pytest.raises(UserError, match="is not the address of a server"):
        connect(parse_arm("a=grpc://127.0.0.1"))


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ('{"bundle": "tiny", "tiers": {}}', {"bundle": "tiny", "tiers": {}}),
        (None, None),
        ("", None),
        ("{", None),
        ("[]", None),
        ('"tiers"', None),
        ('{"tiers": 7}', None),
    ],
)
def test_a_server_discloses_its_tiers_or_nothing(
    server: tuple[Triton, int], parameter: str | None, expected: dict[str, Any] | None
) -> None:
    server[0].parameter = parameter
    endpoint = connect(parse_arm(f"a=grpc://127.0.0.1:{server[1]}"))
    assert endpoint.disclosure() == expected
    endpoint.close()
