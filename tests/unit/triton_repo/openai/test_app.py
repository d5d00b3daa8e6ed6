"""The OpenAI API: what is taken, what is refused and how, and what is answered; before a server that is made up."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest
from certificates import self_signed
from cryptography.x509 import DNSName, GeneralName, IPAddress
from lettered import lettered
from openai import APIError, AuthenticationError, BadRequestError, InternalServerError, NotFoundError, OpenAI
from starlette.testclient import TestClient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

from ssv.bundle.manifest import Manifest, TierEntry, write_manifest
from ssv.bundle.policy import Policy
from ssv.client.triton import Reply, ServerError, Settings, request_inputs
from ssv.client.triton_aio import AsyncClient
from ssv.runtime.request import RequestError
from ssv.runtime.serving.access_keys import AccessKeyError, access_keys
from ssv.runtime.serving.intake import Intake, Limits
from ssv.runtime.serving.metrics import Metrics, Reader
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.runtime.tools import call_grammar
from ssv.triton_repo.openai import access_log
from ssv.triton_repo.openai import process as openai_process
from ssv.triton_repo.openai.app import create_app
from ssv.triton_repo.openai.errors import ApiError
from ssv.triton_repo.openai.schema import ChatRequest, CompletionRequest
from ssv.triton_repo.openai.tokens import Tokens
from ssv.triton_repo.openai.translation import Models

MODELS = Models("tiny", ("premium", "turbo"), 1700000000, bounds={"turbo": 0.05}, max_length=512)
MESSAGES = [{"role": "user", "content": "Hi"}]


def reply(text: str, reason: str = "", *, num_tokens: int = 2, **fields: Any) -> Reply:
    known = {
        "num_input_tokens": 7,
        "judged": 4,
        "accepted": 3,
        "unverified": 1,
        "typical": 2,
        "target_passes": 2,
        "cached_tokens": 5,
        "tier": "turbo",
        "lossless": False,
    }
    return Reply(text=text, finish_reason=reason, num_output_tokens=num_tokens, **{**known, **fields})


class FakeBackend:
    """Plays what it was given: replies, errors to raise, and events to wait for."""

    def __init__(self, *script: Reply | Exception | asyncio.Event) -> None:
        self.script = script or (reply("Hel"), reply(""), reply("lo", "stop"))
        self.prompt: str | Sequence[Mapping[str, str]] = ""
        self.settings = Settings()
        self.request_id, self.is_streamed, self.num_calls = "", False, 0
        self.ready, self.closed = True, asyncio.Event()

    async def stream(
        self, prompt: str | Sequence[Mapping[str, str]], settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        self.prompt, self.settings, self.request_id, self.is_streamed = prompt, settings, request_id, stream
        self.num_calls += 1
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Reply):
                    yield step
                else:
                    await step.wait()
        finally:
            self.closed.set()

    async def is_ready(self) -> bool:
        return self.ready

    async def aclose(self) -> None:
        pass


def client_of(backend: FakeBackend, **options: Any) -> TestClient:
    return TestClient(create_app(backend, MODELS, **options), raise_server_exceptions=False)


def openai_of(backend: FakeBackend) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client_of(backend), max_retries=0)


def chat(backend: FakeBackend, **fields: Any) -> httpx2.Response:
    return client_of(backend).post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **fields})


def complete(backend: FakeBackend, **fields: Any) -> httpx2.Response:
    return client_of(backend).post("/v1/completions", json={"model": "tiny", "prompt": "Once", **fields})


def events_of(response: httpx2.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part[6:] == "[DONE]" else json.loads(part[6:]) for part in parts]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return body["error"]


# What is answered.


def test_a_chat_completion_is_openais_with_a_disclosure() -> None:
    backend = FakeBackend()
    body = chat(backend).json()
    assert body.pop("id") == backend.request_id
    assert backend.request_id.startswith("chatcmpl-")
    assert body.pop("created") > MODELS.created
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 6,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
        "metrics": None,
        "ssv": {
            "tier": "turbo",
            "lossless": False,
            "divergence_bound": 0.05,
            "withdrawn_tier": None,
            "arm": None,
            "unverified_tokens": 1,
            "typical_tokens": 2,
            "target_passes": 2,
            "acceptance_rate": 0.75,
        },
    }
    assert not backend.is_streamed


def test_an_arm_that_a_router_chose_is_disclosed() -> None:
    said = (reply("Hel", arm="fast"), reply("lo", "stop", arm="fast"))
    assert chat(FakeBackend(*said)).json()["ssv"]["arm"] == "fast"
    *_, last, _ = events_of(chat(FakeBackend(*said), stream=True))
    assert last["ssv"]["arm"] == "fast"


def test_a_completion_is_openais() -> None:
    backend = FakeBackend()
    body = complete(backend).json()
    assert body["id"] == backend.request_id
    assert backend.request_id.startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 13
    assert body["ssv"]["tier"] == "turbo"


def test_a_chat_stream_is_openais() -> None:
    backend = FakeBackend()
    events = events_of(chat(backend, stream=True))
    assert events.pop() == "[DONE]"
    assert {(e["id"], e["object"], e["model"]) for e in events} == {
        (backend.request_id, "chat.completion.chunk", "tiny")
    }
    assert len({e["created"] for e in events}) == 1
    assert [e["choices"][0]["delta"] for e in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, None, "stop"]
    assert [e.get("ssv", {}).get("acceptance_rate") for e in events] == [None, None, None, 0.75]
    assert not any("usage" in e for e in events)
    assert backend.is_streamed


def test_a_completion_stream_is_openais() -> None:
    events = events_of(complete(FakeBackend(), stream=True))
    assert events.pop() == "[DONE]"
    assert [e["choices"][0]["text"] for e in events] == ["Hel", "lo", ""]
    assert {e["object"] for e in events} == {"text_completion"}
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["ssv"]["lossless"] is False


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_ends_with_usage_when_it_is_asked_for(ask: Any) -> None:
    events = events_of(ask(FakeBackend(), stream=True, stream_options={"include_usage": True}))
    assert events.pop() == "[DONE]"
    *chunks, last = events
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["id"] == chunks[0]["id"]


def test_how_a_conversation_goes_through_the_chat_template_is_the_requests() -> None:
    backend = FakeBackend()
    assert chat(backend).status_code == 200
    assert backend.settings.template is None
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    assert chat(backend, **fields, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    assert backend.settings.template == {**fields, "variables": {"enable_thinking": False}}


def test_a_message_that_is_continued_and_an_answer_that_is_begun_contradict_each_other() -> None:
    backend = FakeBackend()
    error = error_of(chat(backend, add_generation_prompt=True, continue_final_message=True), 400)
    assert (error["param"], error["code"]) == ("continue_final_message", "invalid_value")
    assert "add_generation_prompt" in error["message"]
    assert backend.num_calls == 0
    error = error_of(complete(backend, add_generation_prompt=False), 400)
    assert error["code"] == "unknown_parameter"


SPECULATED = reply("lo", "stop", drafted=9, kept_per_pass="[1, 0, 2]")
SPECULATION = {
    "mean_acceptance_length": 1 + 4 / 3,
    "draft_acceptance_rate": 4 / 9,
    "acceptance_histogram": [1, 0, 2],
    "num_spec_steps": 3,
    "num_accepted_draft_tokens": 4,
    "num_draft_tokens": 9,
    "num_spec_tokens": 2,
}


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_response_has_the_metrics_of_its_speculation_as_vllm_has_them(ask: Any) -> None:
    backend = FakeBackend(reply("Hel"), SPECULATED)
    assert ask(backend).json()["metrics"] == {"speculative_decoding": SPECULATION}
    assert ask(FakeBackend(reply("lo", "stop", drafted=0, kept_per_pass="[3]"))).json()["metrics"] is None
    assert ask(backend, n=2).json()["metrics"] is None


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("ask", [chat, complete])
def test_a_streams_last_chunk_has_the_metrics_of_its_speculation(ask: Any, include_usage: bool) -> None:
    backend = FakeBackend(reply("Hel"), SPECULATED)
    *chunks, last, _ = events_of(ask(backend, stream=True, stream_options={"include_usage": include_usage}))
    assert last["metrics"] == {"speculative_decoding": SPECULATION}
    assert (last["choices"] == []) == include_usage
    assert not any("metrics" in chunk for chunk in chunks)


@pytest.mark.parametrize("include_usage", [True, False, None])
@pytest.mark.parametrize("ask", [chat, complete])
def test_every_chunk_has_the_usage_so_far_when_it_is_asked_for(ask: Any, include_usage: bool | None) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    events = events_of(ask(FakeBackend(), stream=True, stream_options=options))
    assert events.pop() == "[DONE]"
    if include_usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    so_far = [e["usage"]["completion_tokens"] for e in events]
    assert so_far == ([0, 2, 6, 6] if ask is chat else [2, 6, 6])
    assert {e["usage"]["prompt_tokens"] for e in events} == {7}
    assert all(e["usage"]["total_tokens"] == 7 + e["usage"]["completion_tokens"] for e in events)


@pytest.mark.parametrize(("ours", "theirs"), [("stop", "stop"), ("length", "length"), ("deadline", "length")])
def test_finish_reasons_are_openais(ours: str, theirs: str) -> None:
    assert chat(FakeBackend(reply("a", ours))).json()["choices"][0]["finish_reason"] == theirs
    events = events_of(chat(FakeBackend(reply("a", ours)), stream=True))
    assert events[-2]["choices"][0]["finish_reason"] == theirs


def test_nothing_judged_is_an_acceptance_rate_of_0() -> None:
    assert chat(FakeBackend(reply("a", "stop", judged=0, accepted=0))).json()["ssv"]["acceptance_rate"] == 0.0


# Tools.

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}
CALL = '<tool_call>[{"name": "weather", "arguments": {"town": "Oslo"}}]</tool_call>'


def calling_backend() -> FakeBackend:
    return FakeBackend(reply("I look. "), reply(CALL[:20]), reply(CALL[20:]), reply("", "stop"))


def test_calls_of_functions_are_openais() -> None:
    backend = calling_backend()
    body = chat(backend, tools=[WEATHER]).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look. "
    (call,) = choice["message"]["tool_calls"]
    assert re.fullmatch("[A-Za-z0-9]{9}", call.pop("id"))
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    assert backend.settings.tools == [WEATHER] and backend.settings.guide is None
    assert chat(FakeBackend(reply(CALL, "stop")), tools=[WEATHER]).json()["choices"][0]["message"]["content"] is None


def test_calls_in_a_stream_have_their_index() -> None:
    two = CALL[:-13] + ', {"name": "weather", "arguments": {}}]</tool_call>'
    events = events_of(chat(FakeBackend(reply(two[:30]), reply(two[30:], "stop")), tools=[WEATHER], stream=True))[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["arguments"] for call in calls] == ['{"town": "Oslo"}', "{}"]
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_openai_package_reads_calls() -> None:
    client = openai_of(calling_backend())
    tools: Any = [WEATHER]
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)  # type: ignore[arg-type]
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_nothing_is_a_call(fields: dict[str, Any]) -> None:
    backend = calling_backend()
    message = chat(backend, **fields).json()["choices"][0]["message"]
    assert message["content"] == "I look. " + CALL and "tool_calls" not in message
    assert not backend.settings.tools


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"tool_choice": "required"}, 8),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, 1),
    ],
)
def test_a_call_that_has_to_be_is_a_form_of_the_output(fields: dict[str, Any], most: int) -> None:
    backend = calling_backend()
    other = {"type": "function", "function": {"name": "other"}}
    assert chat(backend, tools=[other, WEATHER], **fields).status_code == 200
    tools = [WEATHER] if isinstance(fields["tool_choice"], dict) else [other, WEATHER]
    assert backend.settings.guide == ("ebnf_grammar", call_grammar("smollm2", tools, most=most))
    assert backend.settings.tools == [other, WEATHER]
    error = error_of(chat(backend, tools=[WEATHER], tool_choice="required", guided_regex="a"), 400)
    assert error["param"] == "tool_choice"


def test_conversations_with_calls_reach_the_server() -> None:
    backend = FakeBackend()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    odd = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "town"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call, odd]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "cold"}]},
    ]
    assert chat(backend, messages=messages, tools=[WEATHER]).status_code == 200
    read = {**call, "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
    assert backend.prompt == [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [read, odd]},
        {"role": "tool", "content": "cold", "tool_call_id": "c1"},
    ]


# Several choices.


class ManyBackend(FakeBackend):
    """Says which call it answers, the later ones first."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, Settings, str]] = []

    async def stream(self, prompt: Any, settings: Settings, *, request_id: str, stream: bool) -> AsyncGenerator[Reply]:
        number = len(self.asked)
        self.asked.append((prompt, settings, request_id))
        await asyncio.sleep(0.02 * (5 - number))
        yield reply(f"<{number}", num_tokens=number)
        yield reply(">", "length" if number % 2 else "stop", num_tokens=1)


def test_choices_are_those_of_each_prompt_with_seeds_of_their_own() -> None:
    backend = ManyBackend()
    body = complete(backend, prompt=["a", "b"], n=2, seed=2**64 - 1, max_tokens=9).json()
    assert [(prompt, settings.seed) for prompt, settings, _ in backend.asked] == [
        ("a", 2**64 - 1),
        ("a", 0),
        ("b", 2**64 - 1),
        ("b", 0),
    ]
    ids = [request_id for _, _, request_id in backend.asked]
    assert ids == [ids[0], *(f"{ids[0]}-{index}" for index in (1, 2, 3))]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        (0, "<0>", "stop"),
        (1, "<1>", "length"),
        (2, "<2>", "stop"),
        (3, "<3>", "length"),
    ]
    # Each prompt counts once, and each choice's tokens: 0, 1, 2, 3 and one more each.
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (14, 10, 24)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 10
    assert (body["ssv"]["unverified_tokens"], body["ssv"]["target_passes"]) == (4, 8)


def test_without_a_seed_choices_have_none() -> None:
    backend = ManyBackend()
    assert len(chat(backend, n=3).json()["choices"]) == 3
    assert [settings.seed for _, settings, _ in backend.asked] == [None] * 3


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_has_its_choices_as_they_come(ask: Any) -> None:
    found = events_of(ask(ManyBackend(), n=3, stream=True, stream_options={"include_usage": True}))
    assert found.pop() == "[DONE]"
    assert found.pop()["usage"]["completion_tokens"] == 6
    texts, reasons = ["", "", ""], ["", "", ""]
    for event in found:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"] if ask is complete else choice["delta"].get("content", "")
        reasons[choice["index"]] += choice["finish_reason"] or ""
        assert ("ssv" in event) == bool(choice["finish_reason"])
    assert texts == ["<0>", "<1>", "<2>"] and reasons == ["stop", "length", "stop"]
    assert found[0]["choices"][0]["index"] == 2  # the last one answers first


class LateBackend(FakeBackend):
    """Answers each prompt at once, but for the last, which it refuses later or answers last."""

    def __init__(self, last: Reply | Exception) -> None:
        super().__init__()
        self._last = last

    async def stream(self, prompt: Any, settings: Settings, *, request_id: str, stream: bool) -> AsyncGenerator[Reply]:
        if prompt == "last":
            await asyncio.sleep(0.1)
            if isinstance(self._last, Exception):
                raise self._last
            yield self._last
        else:
            yield reply("a")
            yield reply("b", "stop")


def test_a_prompt_that_is_refused_late_refuses_the_request_though_others_are_answered() -> None:
    backend = LateBackend(ServerError("the prompt is empty", "INVALID_ARGUMENT"))
    for stream in (True, False):
        error = error_of(complete(backend, prompt=["x", "y", "last"], stream=stream), 400)
        assert (error["message"], error["param"]) == ("the prompt is empty", "prompt")
    error_of(complete(LateBackend(ServerError("full", "UNAVAILABLE")), prompt=["x", "last"], stream=True), 503)


def test_what_came_before_the_last_choice_began_is_sent_then() -> None:
    found = events_of(complete(LateBackend(reply("c", "stop")), prompt=["x", "last"], stream=True))
    assert found.pop() == "[DONE]"
    said = [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in found]
    assert [each for each in said if each[1]] == [(0, "a"), (0, "b"), (1, "c")]


def test_choices_that_are_too_many_are_refused() -> None:
    backend = FakeBackend()
    error = error_of(complete(backend, prompt=["a"] * 3, n=50), 400)
    assert error["param"] == "n" and "3 prompts with n 50" in error["message"]
    assert backend.num_calls == 0


def test_a_choice_that_is_refused_ends_all() -> None:
    class Refusing(ManyBackend):
        async def stream(self, *given: Any, **more: Any) -> AsyncGenerator[Reply]:
            if len(self.asked) == 1:
                raise ServerError("full", "UNAVAILABLE")
            async for each in super().stream(*given, **more):
                yield each

    for stream in (False, True):
        assert error_of(complete(Refusing(), n=3, stream=stream), 503)["message"] == "full"


# Log-probabilities.


def logged(*tokens: tuple[int, str | bytes, float | None]) -> list[dict[str, Any]]:
    made = [(i, list(text if isinstance(text, bytes) else text.encode()), logprob) for i, text, logprob in tokens]
    top = [{"id": 99, "bytes": list(b"!"), "logprob": -0.5}]
    return [
        {"id": i, "bytes": data, "logprob": logprob, "top": [] if logprob is None else top} for i, data, logprob in made
    ]


def logging_backend() -> FakeBackend:
    prompt = logged((1, "On", None), (2, "ce", -3.0))
    return FakeBackend(
        reply("é", logprobs=json.dumps({"prompt": prompt, "output": logged((3, b"\xc3", -1.0), (4, b"\xa9", -2.0))})),
        reply("", logprobs=json.dumps({"output": logged((5, "!", -0.5))})),
        reply("", "stop"),
    )


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(stream: bool) -> None:
    backend = logging_backend()
    response = chat(backend, logprobs=True, top_logprobs=1, stream=stream)
    assert backend.settings.logprobs == 1 and backend.settings.prompt_logprobs is None
    events = events_of(response)[:-1] if stream else [response.json()]
    found = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in found] == [
        ("bytes:\\xc3", [0xC3], -1.0),
        ("bytes:\\xa9", [0xA9], -2.0),
        ("!", [33], -0.5),
    ]
    assert all(entry["top_logprobs"] == [{"token": "!", "logprob": -0.5, "bytes": [33]}] for entry in found)


def test_logprobs_of_a_chat_without_others() -> None:
    backend = logging_backend()
    chat(backend, logprobs=True)
    assert backend.settings.logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_a_completion(echo: bool, stream: bool) -> None:
    backend = logging_backend()
    response = complete(backend, logprobs=1, echo=echo, stream=stream)
    assert (backend.settings.logprobs, backend.settings.prompt_logprobs) == (1, 1 if echo else None)
    events = events_of(response)[:-1] if stream else [response.json()]
    assert "".join(event["choices"][0]["text"] for event in events) == ("Onceé" if echo else "é")
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for event in events:
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            found[name] += values
    assert found["tokens"] == [*(["On", "ce"] if echo else []), "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert found["token_logprobs"] == [*([None, -3.0] if echo else []), -1.0, -2.0, -0.5]
    assert found["top_logprobs"][-2:] == [{"bytes:\\xa9": -2.0, "!": -0.5}, {"!": -0.5}]
    assert found["text_offset"] == [*([0, 2] if echo else []), *(len("Once") * echo + each for each in (0, 10, 20))]


# How tokens came about.


def told(text: str, fate: str) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "fate": fate, "pass": 1, "risk": None, "dropped": [["x"]]}


def telling_backend() -> FakeBackend:
    """Of the last token, which ends the answer, there is no text."""
    return FakeBackend(
        reply("Hel", fates=json.dumps([told("H", "target"), told("el", "trusted")])),
        reply("lo", fates=json.dumps([told("lo", "accepted")])),
        reply("", "stop", fates=json.dumps([told("<end>", "corrected")])),
    )


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("stream", [False, True])
def test_fates_stand_beside_their_text(ask: Any, stream: bool) -> None:
    backend = telling_backend()
    response = ask(backend, ssv_fates=True, stream=stream)
    assert backend.settings.fates
    choices = [event["choices"][0] for event in (events_of(response)[:-1] if stream else [response.json()])]
    found = [entry for choice in choices for entry in choice.get("ssv_fates", [])]
    assert found == [told("H", "target"), told("el", "trusted"), told("lo", "accepted"), told("<end>", "corrected")]
    if stream:
        texts = [choice["delta"].get("content") if ask is chat else choice["text"] for choice in choices]
        of_text = {text: len(choice["ssv_fates"]) for text, choice in zip(texts, choices, strict=True) if text}
        assert of_text == {"Hel": 2, "lo": 1}


@pytest.mark.parametrize("fields", [{}, {"ssv_fates": False}, {"ssv_fates": None}])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_told_that_was_not_asked_for(fields: dict[str, Any], stream: bool) -> None:
    backend = FakeBackend()
    assert "ssv_fates" not in chat(backend, **fields, stream=stream).text
    assert not backend.settings.fates


def test_fates_are_a_flag() -> None:
    assert error_of(chat(FakeBackend(), ssv_fates="all"), 400)["param"] == "ssv_fates"


def test_each_choice_tells_its_own() -> None:
    body = complete(telling_backend(), ssv_fates=True, n=2).json()
    assert [len(choice["ssv_fates"]) for choice in body["choices"]] == [4, 4]


def test_echo_of_a_text_and_of_token_ids() -> None:
    backend = FakeBackend()
    assert complete(backend, echo=True).json()["choices"][0]["text"] == "OnceHello"
    assert backend.settings.prompt_logprobs is None
    backend = logging_backend()
    body = complete(backend, prompt=[1, 2], echo=True).json()
    assert body["choices"][0]["text"] == "Onceé" and body["choices"][0]["logprobs"] is None
    assert backend.settings.prompt_logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone_is_echoed(stream: bool) -> None:
    """With no tokens to write: its log-probabilities are what is wanted."""
    backend = logging_backend()
    fields = {"stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    response = complete(backend, echo=True, max_tokens=0, logprobs=1, ssv_fates=True, **fields)
    assert (backend.settings.max_tokens, backend.settings.prompt_logprobs) == (1, 1)
    events = events_of(response)[:-1] if stream else [response.json()]
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Once"
    assert [name for each in choices for name in (each["logprobs"] or {"tokens": []})["tokens"]] == ["On", "ce"]
    assert choices[-1]["finish_reason"] == "length"
    assert not any(choice.get("ssv_fates") for choice in choices)
    assert events[-1]["usage"]["completion_tokens"] == 0
    body = complete(FakeBackend(), echo=True, max_tokens=0).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("Once", "length")


def test_events_hold_nothing_that_is_taken_for_the_end_of_a_line() -> None:
    text = "a\nb\r\u2028\u2029\x85\x0b\x00é😀"
    response = complete(FakeBackend(reply(text, "stop")), stream=True)
    assert len(response.text.splitlines()) == 2 * len(events_of(response))
    assert events_of(response)[0]["choices"][0]["text"] == text


def test_the_openai_package_reads_it() -> None:
    client = openai_of(FakeBackend())
    whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
    assert whole.choices[0].message.content == "Hello"
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 5
    answer = whole.choices[0].message
    messages: Any = [answer, {"role": "user", "content": "And?"}]
    again = client.chat.completions.create(model="tiny", messages=messages)
    assert again.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 13
    text = client.completions.create(model="tiny:turbo", prompt="Once", extra_body={"top_k": 5, "ignore_eos": True})
    assert text.choices[0].text == "Hello"


# Models and tiers.


def test_models_are_the_name_and_its_tiers() -> None:
    client = client_of(FakeBackend())
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "tiny:premium", "tiny:turbo"]
    about = {"object": "model", "created": 1700000000, "owned_by": "ssv", "max_model_len": 512}
    lossless = {"tier": "premium", "lossless": True, "divergence_bound": 0.0}
    assert listed["data"][0] == {"id": "tiny", **about, "ssv": lossless}
    lossy = {"tier": "turbo", "lossless": False, "divergence_bound": 0.05}
    assert listed["data"][2] == {"id": "tiny:turbo", **about, "ssv": lossy}
    for name, how in (("tiny", lossless), ("tiny:turbo", lossy), ("tiny:eagle", {**lossless, "tier": "eagle"})):
        assert client.get(f"/v1/models/{name}").json() == {"id": name, **about, "ssv": how}
    assert error_of(client.get("/v1/models/huge"), 404)["code"] == "model_not_found"
    assert openai_of(FakeBackend()).models.retrieve("tiny:turbo").id == "tiny:turbo"
    assert [model.id for model in openai_of(FakeBackend()).models.list()] == ["tiny", "tiny:premium", "tiny:turbo"]


def test_a_name_with_slash_and_colon_is_a_name() -> None:
    client = TestClient(create_app(FakeBackend(), Models("org/tiny:1b", ("premium",), 1)))
    assert client.get("/v1/models/org/tiny:1b").json()["id"] == "org/tiny:1b"
    assert client.get("/v1/models/org/tiny:1b:premium").status_code == 200
    assert client.get("/v1/models/org/tiny").status_code == 404


@pytest.mark.parametrize(
    ("model", "tier", "expected"),
    [
        ("tiny", None, None),
        ("tiny:premium", None, "premium"),
        ("tiny:turbo", None, "turbo"),
        ("tiny:autoregressive", None, "autoregressive"),
        ("tiny:speculative", None, "speculative"),
        ("tiny", "turbo", "turbo"),
        ("tiny:turbo", "turbo", "turbo"),
    ],
)
def test_the_tier_comes_from_the_models_suffix_or_a_field(model: str, tier: str | None, expected: str | None) -> None:
    backend = FakeBackend()
    body = chat(backend, model=model, ssv_tier=tier).json()
    assert backend.settings.tier == expected
    assert body["model"] == model


def test_the_bound_of_divergence_goes_to_the_server() -> None:
    backend = FakeBackend()
    chat(backend, ssv_max_divergence=0.02)
    assert (backend.settings.tier, backend.settings.max_divergence) == (None, 0.02)
    chat(backend, model="tiny:turbo", ssv_max_divergence=0.5)
    assert (backend.settings.tier, backend.settings.max_divergence) == ("turbo", 0.5)


def test_options_of_a_tier_go_to_the_server() -> None:
    backend = FakeBackend()
    chat(backend, model="tiny:eagle", ssv_policy={"max_depth": 3, "children": [4], "beam": None})
    assert (backend.settings.tier, backend.settings.policy) == ("eagle", {"max_depth": 3, "children": [4]})
    chat(backend, ssv_policy=None)
    assert backend.settings.policy is None


def test_tiers_that_contradict_or_do_not_exist_are_refused() -> None:
    error = error_of(chat(FakeBackend(), model="tiny:premium", ssv_tier="turbo"), 400)
    assert error["param"] == "ssv_tier"
    assert "premium" in error["message"] and "turbo" in error["message"]
    error = error_of(chat(FakeBackend(), ssv_tier="balanced"), 400)
    assert error["param"] == "ssv_tier"
    assert (
        "premium, turbo, autoregressive, lookahead, prompt-lookup, suffix, specinfer, eagle, speculative"
        in error["message"]
    )


def test_medusa_is_a_method_of_a_bundle_with_heads() -> None:
    assert "medusa" not in MODELS.methods
    with_heads = Models("tiny", ("premium",), 1, has_heads=True)
    without = Models("tiny", ("premium",), 1).methods
    assert "medusa" in with_heads.methods
    assert tuple(method for method in with_heads.methods if not method.startswith("medusa")) == without
    assert with_heads.method_of("tiny:medusa") == "medusa"


@pytest.mark.parametrize(
    "model", ["huge", "tiny:medusa", "tiny:", "tiny:balanced", "tiny:nonsense", "tiny2", "", "turbo"]
)
def test_a_model_that_is_not_there_is_404(model: str) -> None:
    backend = FakeBackend()
    error = error_of(chat(backend, model=model), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "tiny:turbo" in error["message"]
    assert backend.num_calls == 0
    with pytest.raises(NotFoundError):
        openai_of(FakeBackend()).completions.create(model="huge", prompt="Once")


def test_models_are_read_from_the_manifest_alone(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    models = Models.of_bundle(tmp_path)
    assert (models.name, models.tiers) == ("tiny", ("premium", "turbo"))
    assert models.created == int((tmp_path / "manifest.json").stat().st_mtime)


def test_an_engine_that_refuses_all_other_tiers_lists_and_takes_premium_alone(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    models = Models.of_bundle(tmp_path, is_premium_only=True)
    assert [entry["id"] for entry in models.listed()] == ["tiny", "tiny:premium"]
    assert models.method_of("tiny:premium") == "premium"
    for name in ("tiny:turbo", "tiny:autoregressive"):
        with pytest.raises(ApiError, match="there is no model"):
            models.method_of(name)


def write_bundle(folder: Path) -> None:
    def entry(accept_below: float) -> TierEntry:
        policy = Policy(accept_below=accept_below, verify_above=0.5, risk_budget=0.9, max_pending=8)
        return TierEntry(policy=policy, lossless=not accept_below, divergence=accept_below or None)

    write_manifest(
        folder,
        Manifest(
            name="tiny",
            target={},
            draft={},
            eos_token_ids=[2],
            default_precision="int8",
            tiers={"premium": entry(0.0), "turbo": entry(0.1)},
            files={},
            sources={},
            versions={},
        ),
    )


# What is taken.


def test_defaults_are_openais() -> None:
    backend = FakeBackend()
    chat(backend)
    assert backend.settings == Settings(chat=False, temperature=1.0)
    complete(backend)
    assert backend.settings == Settings(chat=False, temperature=1.0, max_tokens=16)
    assert backend.prompt == "Once"


def test_null_is_what_is_left_out() -> None:
    backend = FakeBackend()
    names = set(ChatRequest.model_fields) - {"model", "messages"}
    assert chat(backend, **dict.fromkeys(names)).status_code == 200
    assert backend.settings == Settings(chat=False, temperature=1.0)
    names = set(CompletionRequest.model_fields) - {"model", "prompt"}
    assert complete(backend, **dict.fromkeys(names)).status_code == 200


def test_null_is_what_is_left_out_wherever_it_stands() -> None:
    """Also of what nobody knows: clients write out all their fields."""
    backend = FakeBackend()
    parts = [{"type": "text", "text": "a", "cache_control": None}]
    messages = [{"role": "user", "content": parts, "name": None, "tool_call_id": None, "reasoning_content": None}]
    fields = {"parallel_tool_calls": None, "reasoning_effort": None, "guided_decoding_backend": None, "unknown": None}
    fields |= {"stream_options": {"include_usage": None, "unknown": None}, "logit_bias": {"5": None}}
    response = chat(backend, messages=messages, metadata={"a": None}, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert backend.prompt == [{"role": "user", "content": "a"}]
    assert backend.settings == Settings(chat=False, temperature=1.0)
    assert not any("usage" in event for event in events_of(response)[:-1])


SCHEMA_WITH_NULLS: dict[str, Any] = {"type": "object", "properties": {"a": {"const": None}, "b": {"enum": [None, 1]}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": None, "schema": SCHEMA_WITH_NULLS}}},
        {"structured_outputs": {"json": SCHEMA_WITH_NULLS, "regex": None}},
        {"guided_json": SCHEMA_WITH_NULLS},
    ],
    ids=["response_format", "structured_outputs", "guided_json"],
)
def test_null_is_a_value_in_a_schema(fields: dict[str, Any]) -> None:
    backend = FakeBackend()
    assert chat(backend, **fields).status_code == 200
    assert backend.settings.guide is not None
    assert json.loads(backend.settings.guide[1]) == SCHEMA_WITH_NULLS


def test_null_is_a_value_in_a_functions_schema() -> None:
    backend = FakeBackend()
    function = {"name": "f", "description": None, "parameters": SCHEMA_WITH_NULLS}
    assert chat(backend, tools=[{"type": "function", "function": function}]).status_code == 200
    (tool,) = backend.settings.tools
    assert tool["function"] == {"name": "f", "parameters": SCHEMA_WITH_NULLS}


def test_a_messages_name_changes_nothing() -> None:
    backend = FakeBackend()
    assert chat(backend, messages=[{"role": "user", "content": "Hi", "name": "Ann"}]).status_code == 200
    assert backend.prompt == MESSAGES


def test_settings_reach_the_server() -> None:
    backend = FakeBackend()
    given = {"max_tokens": 9, "min_tokens": 2, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 2**64 - 1}
    chat(backend, **given, stop=["a", "b"], ignore_eos=True, ssv_timeout=1.5, latency_bound_ms=40.0)
    expected = Settings(chat=False, **given, stop=["a", "b"], ignore_eos=True, timeout=1.5, latency_bound_ms=40.0)
    assert backend.settings == expected
    complete(backend, **given, stop=["a", "b"], ignore_eos=True, ssv_timeout=1.5, latency_bound_ms=40.0)
    assert backend.settings == expected


def test_what_changes_the_choice_reaches_the_server() -> None:
    given = {"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.2}
    given |= {"bad_words": ["a", "b"], "stop_token_ids": [3, 4]}
    expected = Settings(chat=False, temperature=1.0, **given, logit_bias={5: -100, 7: 1.5})
    backend = FakeBackend()
    assert chat(backend, **given, logit_bias={"5": -100, "7": 1.5}).status_code == 200
    assert backend.settings == expected
    assert complete(backend, **given, logit_bias={"5": -100, "7": 1.5}, max_tokens=16).status_code == 200
    assert backend.settings == replace(expected, max_tokens=16)


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "json_object"}}, ("json", "")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "description": "d", "strict": True, "schema": {"type": "array"}},
                }
            },
            ("json_schema", '{"type": "array"}'),
        ),
        ({"structured_outputs": {"json": {"type": "array"}}}, ("json_schema", '{"type": "array"}')),
        ({"structured_outputs": {"json_object": True, "regex": None}}, ("json", "")),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, ("ebnf_grammar", "root ::= 'a'")),
        ({"guided_json": '{"type": "array"}'}, ("json_schema", '{"type": "array"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, ("choice", '["a", "b"]')),
        ({"guided_grammar": "start: x"}, ("ebnf_grammar", "start: x")),
        ({"response_format": {"type": "text"}}, None),
    ],
)
@pytest.mark.parametrize("ask", [chat, complete])
def test_forms_of_outputs_reach_the_server(ask: Any, fields: dict[str, Any], guide: tuple[str, str] | None) -> None:
    backend = FakeBackend()
    assert ask(backend, **fields).status_code == 200
    assert backend.settings.guide == guide


def test_a_form_that_is_given_twice_is_refused() -> None:
    error = error_of(chat(FakeBackend(), guided_regex="a", response_format={"type": "json_object"}), 400)
    assert "guided_regex and response_format are both given" in error["message"]


FORCED = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
    "tool_choice": "required",
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {}}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        (FORCED, "tools"),
    ],
    ids=["guided_json", "response_format", "structured_outputs", "tools"],
)
def test_a_form_that_the_server_refuses_is_named_as_it_was_given(fields: dict[str, Any], param: str) -> None:
    what = 'the ebnf_grammar of the output is not supported: Unimplemented keys: ["not"]'
    error = error_of(chat(FakeBackend(ServerError(what, "INVALID_ARGUMENT")), **fields), 400)
    assert error["param"] == param
    assert error["message"] == f'{param}: the grammar of the output is not supported: Unimplemented keys: ["not"]'
    what = "guided_decoding_guide has 70000 bytes, at most 65536 are taken: shorten it"
    error = error_of(chat(FakeBackend(ServerError(what, "INVALID_ARGUMENT")), **fields), 400)
    assert error["param"] == param
    assert error["message"] == f"{param} has 70000 bytes, at most 65536 are taken: shorten it"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_json": 5}, "guided_json: must be an object"),
        ({"tool_choice": "any"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name is missing: give it"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]: Input should be less than or equal to 100"),
        ({"stop": [""]}, "stop[0]: String should have at least 1 character"),
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"prompt": "x"}, "prompt is unknown or not supported: leave it out"),
        ({"temprature": 1}, "temprature is unknown or not supported: use temperature, or leave it out"),
        ({"stream_option": {}}, "stream_option is unknown or not supported: use stream_options, or leave it out"),
        ({"moderation_options": {}}, "moderation_options is unknown or not supported: leave it out"),
        ({"stream_options": {"messages": 1}}, "stream_options.messages is unknown or not supported: leave it out"),
        ({"": 1}, "a field without a name is unknown or not supported: leave it out"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_named_as_the_body_has_it(fields: dict[str, Any], message: str) -> None:
    """And not by the kinds of values that it was taken for."""
    assert error_of(chat(FakeBackend(), **fields), 400)["message"] == message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, "a"], "prompt[1]: Input should be a valid integer"),
        (["a", 1], "prompt[1]: Input should be a valid string"),
        ([[1], [-1]], "prompt[1][0]: Input should be greater than or equal to 0"),
    ],
    ids=repr,
)
def test_of_several_kinds_of_prompts_the_one_that_was_meant_is_wrong(prompt: Any, message: str) -> None:
    assert error_of(complete(FakeBackend(), prompt=prompt), 400)["message"] == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": "\xff"}', "the body is not valid UTF-8: byte 11 is 0xff, send JSON as UTF-8"),
        (b"[" * 100_000, "the body is nested too deeply: send it flat"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body cannot be read as JSON"),
    ],
    ids=["no UTF-8", "deep", "a number too long"],
)
def test_a_body_that_cannot_be_parsed_says_why(body: bytes, message: str) -> None:
    assert error_of(post_raw(FakeBackend(), "/v1/chat/completions", body), 400)["message"].startswith(message)


def test_prompts_of_token_ids() -> None:
    backend = FakeBackend()
    complete(backend, prompt=[5, 6])
    assert (backend.prompt, backend.num_calls) == ([5, 6], 1)
    complete(backend, prompt=[[7]])
    assert (backend.prompt, backend.num_calls) == ([7], 2)


def test_a_seed_below_0_counts_modulo_2_to_the_64() -> None:
    backend = FakeBackend()
    chat(backend, seed=-1)
    assert backend.settings.seed == 2**64 - 1


def test_one_stop_text_is_a_list_of_one_and_more_than_openais_four_are_taken() -> None:
    backend = FakeBackend()
    chat(backend, stop="END")
    assert backend.settings.stop == ["END"]
    chat(backend, stop=[str(i) for i in range(64)])
    assert len(backend.settings.stop) == 64


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}])
def test_both_names_of_max_tokens_are_one_setting(fields: dict[str, int]) -> None:
    backend = FakeBackend()
    chat(backend, **fields)
    assert backend.settings.max_tokens == 5


def test_messages_are_texts_or_parts_of_text() -> None:
    backend = FakeBackend()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": [], "audio": None},
        {"role": "system", "content": ""},
        {"role": "user", "content": "é\u0000"},
    ]
    assert chat(backend, messages=messages).status_code == 200
    assert backend.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": ""},
        {"role": "user", "content": "é\u0000"},
    ]


def test_a_list_of_one_prompt_is_a_prompt() -> None:
    backend = FakeBackend()
    complete(backend, prompt=["Twice"])
    assert backend.prompt == "Twice"


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "priority": 0,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
}
NEUTRAL_CHAT = {
    "metadata": {"a": "b"},
    "store": False,
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "none",
    "verbosity": "medium",
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "auto",
    "echo": False,
    "add_special_tokens": False,
    "include_reasoning": True,
}


def test_values_that_change_nothing_are_taken() -> None:
    for tier in ("auto", "default"):
        backend = FakeBackend()
        assert chat(backend, **NEUTRAL, **NEUTRAL_CHAT, service_tier=tier).status_code == 200
        penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        assert replace(backend.settings, user=None) == Settings(chat=False, temperature=1.0, **penalties)
    assert chat(backend, tool_choice="none", function_call="none", parallel_tool_calls=False).status_code == 200
    assert (
        complete(backend, **NEUTRAL, echo=False, add_special_tokens=True, best_of=1, logprobs=None).status_code == 200
    )


# What is refused.

WRONG = [
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("best_of", 2),
    ("prompt_cache_retention", "forever"),
    ("skip_special_tokens", False),
    ("spaces_between_special_tokens", False),
    ("include_stop_str_in_output", True),
    ("use_beam_search", True),
    ("use_beam_search", 0),
    ("length_penalty", 0.9),
    ("priority", 1),
    ("return_token_ids", True),
    ("return_tokens_as_token_ids", True),
    ("presence_penalty", 2.5),
    ("frequency_penalty", "1"),
    ("repetition_penalty", 0),
    ("min_p", 1.5),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"-5": 1}),
    ("logit_bias", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", 5),
    ("bad_words", [5]),
    ("temperature", 2.5),
    ("temperature", -1),
    ("temperature", "0.5"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 2**31),
    ("max_tokens", 0),
    ("max_tokens", 2**31),
    ("max_tokens", 2.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("seed", "x"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 65),
    ("stop", 5),
    ("stop", "\ud800"),
    ("ignore_eos", 1),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("user", 5),
    ("ssv_max_divergence", 1.5),
    ("ssv_policy", '{"max_depth": 3}'),
    ("ssv_policy", [3]),
    ("ssv_timeout", 0),
    ("latency_bound_ms", 0),
    ("model", 5),
    ("model", None),
    ("unknown", 1),
]
WRONG_CHAT = [
    ("max_completion_tokens", 0),
    ("logprobs", 1),
    ("top_logprobs", 1),
    ("top_logprobs", 21),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "a", "format": "wav"}),
    ("prediction", "x"),
    ("reasoning_effort", "low"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "more": 1}}),
    ("structured_outputs", {}),
    ("structured_outputs", {"json": {}, "regex": "a"}),
    ("structured_outputs", {"lark": "a"}),
    ("structured_outputs", {"regex": 5}),
    ("structured_outputs", {"json_object": "yes"}),
    ("guided_regex", 5),
    ("guided_choice", "a"),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "function", "function": {"name": "f g"}}]),
    ("tools", [{"type": "web_search"}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    ("tool_choice", "required"),
    ("tool_choice", "always"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{}]),
    ("function_call", {"name": "f"}),
    ("store", True),
    ("service_tier", "flex"),
    ("metadata", {"a": 1}),
    ("messages", []),
    ("messages", "Hi"),
    ("reasoning_effort", "low"),
    ("parallel_tool_calls", "yes"),
    ("safety_identifier", 5),
    ("prompt", "Hi"),
]
WRONG_COMPLETION = [
    ("echo", 1),
    ("suffix", "x"),
    ("suffix", ""),
    ("logprobs", 21),
    ("logprobs", False),
    ("prompt", None),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [1, "a"]),
    ("prompt", ["a", [1]]),
    ("prompt", [-1]),
    ("prompt", [[1, 2**31]]),
    ("prompt", [None]),
    ("max_completion_tokens", 5),
    ("messages", MESSAGES),
]


def post_raw(backend: FakeBackend, path: str, body: object, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    return client_of(backend).post(path, content=content, headers=headers)


@pytest.mark.parametrize(("name", "value"), WRONG + WRONG_CHAT, ids=repr)
def test_a_chat_field_that_is_wrong_is_refused_by_name(name: str, value: Any) -> None:
    backend = FakeBackend()
    body = {"model": "tiny", "messages": MESSAGES, name: value}
    error = error_of(post_raw(backend, "/v1/chat/completions", body), 400)
    assert re.split(r"[[.]", error["param"])[0] == name
    assert name in error["message"]
    assert backend.num_calls == 0


@pytest.mark.parametrize(("name", "value"), WRONG + WRONG_COMPLETION, ids=repr)
def test_a_completion_field_that_is_wrong_is_refused_by_name(name: str, value: Any) -> None:
    backend = FakeBackend()
    body = {"model": "tiny", "prompt": "Once", name: value}
    error = error_of(post_raw(backend, "/v1/completions", body), 400)
    assert re.split(r"[[.]", error["param"])[0] == name
    assert name in error["message"] or "prompt" in error["message"] or "token ids" in error["message"]
    assert backend.num_calls == 0


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role", "'user'"),
        ({"role": "user"}, "messages[0].content", "missing"),
        ({"role": "user", "content": None}, "messages[0].content", "missing"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name", "string"),
        ({"role": "user", "content": "x", "id": "m1"}, "messages[0].id", "not supported"),
        ({"role": "assistant", "tool_calls": []}, "messages[0].content", "missing"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[0].tool_calls[0].id", "missing"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "messages[0].tool_calls", "list"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content", "'image_url' is not supported"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content", "must be"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}, "messages[0].content", "must be"),
        ({"role": "user", "content": ["x"]}, "messages[0].content", "not supported"),
    ],
)
def test_a_message_that_is_wrong_is_refused_with_its_place(message: dict[str, Any], param: str, words: str) -> None:
    error = error_of(chat(FakeBackend(), messages=[message]), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_two_different_max_tokens_are_refused() -> None:
    error = error_of(chat(FakeBackend(), max_tokens=4, max_completion_tokens=5), 400)
    assert error["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("unknown", 1, "unknown_parameter"),
        ("best_of", 2, "unsupported_value"),
        ("store", True, "unsupported_value"),
        ("temperature", 3, "invalid_value"),
        ("temperature", "hot", "invalid_type"),
        ("messages", None, "missing_required_parameter"),
        ("ssv_tier", "gold", "invalid_value"),
        ("model", "huge", "model_not_found"),
    ],
)
def test_errors_have_openais_codes(name: str, value: Any, code: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, name: value}
    response = post_raw(FakeBackend(), "/v1/chat/completions", body)
    error = error_of(response, 404 if name == "model" else 400)
    assert (error["param"], error["code"]) == (name, code)


@pytest.mark.parametrize(("name", "near"), [("max_token", "max_tokens"), ("temprature", "temperature"), ("zzz", None)])
def test_the_nearest_known_name_is_said(name: str, near: str | None) -> None:
    cure = f"use {near}, or leave it out" if near else "leave it out"
    message = error_of(chat(FakeBackend(), **{name: 1}), 400)["message"]
    assert message == f"{name} is unknown or not supported: {cure}"


HALF = "half \ud83d"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": HALF, "content": "x"}]}, "messages[0].role"),
        ({"model": HALF}, "model"),
        ({"stop": ["a", HALF]}, "stop[1]"),
        ({"user": HALF}, "user"),
        ({"ssv_tier": HALF}, "ssv_tier"),
        ({"metadata": {"a": HALF}}, "metadata.a"),
        ({"metadata": {HALF: "a"}}, "metadata"),
        ({HALF: 1}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(fields: Any, param: str | None, stream: bool) -> None:
    """JavaScript's slice() makes such halves."""
    backend = FakeBackend()
    body = {"model": "tiny", "messages": MESSAGES, "stream": stream, **fields}
    error = error_of(post_raw(backend, "/v1/chat/completions", body), 400)
    assert error["param"] == param
    assert "is not valid Unicode" in error["message"]
    assert backend.num_calls == 0


def test_a_body_nested_without_end_is_refused() -> None:
    for depth in (300, 900, 100_000):
        body = b'{"model": "tiny", "prompt": "x", "logit_bias": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        error_of(post_raw(FakeBackend(), "/v1/completions", body), 400)


def test_an_unknown_stream_option_is_refused() -> None:
    error = error_of(chat(FakeBackend(), stream=True, stream_options={"include_obfuscation": True}), 400)
    assert error["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_what_is_missing_is_named(missing: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES}
    del body[missing]
    assert error_of(post_raw(FakeBackend(), "/v1/chat/completions", body), 400)["param"] == missing


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100000, b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    assert error_of(post_raw(FakeBackend(), "/v1/chat/completions", body), 400)["message"]


def test_another_content_type_is_refused() -> None:
    """A browser sends it to any site without asking."""
    body = {"model": "tiny", "messages": MESSAGES}
    response = post_raw(FakeBackend(), "/v1/chat/completions", body, **{"Content-Type": "text/plain"})
    assert "application/json" in error_of(response, 400)["message"]


def test_a_field_whose_name_is_no_text_is_refused() -> None:
    body = {"model": "tiny", "prompt": "x", "un\ud800known": 1}
    assert "not valid Unicode" in error_of(post_raw(FakeBackend(), "/v1/completions", body), 400)["message"]


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"1e999"])
def test_a_temperature_that_is_no_number_is_refused(value: bytes) -> None:
    body = b'{"model": "tiny", "prompt": "x", "temperature": ' + value + b"}"
    assert error_of(post_raw(FakeBackend(), "/v1/completions", body), 400)["param"] == "temperature"


def test_unknown_addresses_and_methods_are_errors_of_the_same_form() -> None:
    client = client_of(FakeBackend())
    message = error_of(client.get("/v1/nothing"), 404)["message"]
    assert message.startswith("there is nothing at /v1/nothing: use ") and "/v1/chat/completions" in message
    response = client.get("/v1/completions")
    assert error_of(response, 405)["message"] == "/v1/completions does not take GET: use POST"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/health", "/health"),
    ],
)
def test_of_an_address_that_is_nearly_right_the_right_one_is_said(path: str, near: str) -> None:
    message = error_of(client_of(FakeBackend()).post(path, json={}), 404)["message"]
    assert message == f"there is nothing at {path}: use {near}"


def test_a_long_address_that_is_none_is_cut() -> None:
    message = error_of(client_of(FakeBackend()).get("/" + "x" * 5000), 404)["message"]
    assert len(message) < 400


def test_a_body_may_have_its_largest_size_and_not_a_byte_more() -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES}).encode()
    headers = {"Content-Type": "application/json"}
    for room, status in ((0, 200), (-1, 413)):
        client = client_of(FakeBackend(), max_body_bytes=len(body) + room)
        response = client.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == status
    assert str(len(body) - 1) in error_of(response, 413)["message"]


# Errors of the server.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "expected"), [("INVALID_ARGUMENT", 400), ("UNAVAILABLE", 503), ("INTERNAL", 500), ("UNKNOWN", 500)]
)
def test_errors_before_the_first_token_have_a_status(status: str, expected: int, stream: bool) -> None:
    backend = FakeBackend(ServerError("top_p 5 is wrong", status))
    for ask in (chat, complete):
        response = ask(backend, stream=stream)
        assert error_of(response, expected)["message"] == "top_p 5 is wrong"
        assert response.headers.get("retry-after") == ("1" if expected == 503 else None)


class Words:
    """A token for each byte; a chat is its contents."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: bool) -> str:
        if any(message["content"] == "refuse me" for message in messages):
            raise ValueError("roles must alternate")
        return "".join(message["content"] for message in messages)


class IntakeBackend(FakeBackend):
    """Says what the server's own check of requests says."""

    async def stream(
        self, prompt: str | Sequence[Mapping[str, str]], settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        policy = Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.9, max_pending=8)
        tiers = {"premium": TierEntry(policy=policy, lossless=True)}
        manifest = Manifest(
            name="tiny",
            target={"vocab_size": 300},
            draft={},
            eos_token_ids=[2],
            default_precision="int8",
            tiers=tiers,
            files={},
            sources={},
            versions={},
        )
        limits = Limits(max_length=100, max_tokens=50, max_prompt_bytes=300)
        inputs = {i.name(): _tensor(i) for i in request_inputs(prompt, settings, stream=stream)}
        try:
            Intake(manifest, BundleTokenizer(Words()), limits).prepare(inputs)
        except RequestError as error:
            raise ServerError(str(error), "INVALID_ARGUMENT") from error
        yield reply("fine", "stop")


def _tensor(given: Any) -> np.ndarray:
    kinds = {"BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
    raw = given._get_content()
    if given.datatype() == "BYTES":
        return deserialize_bytes_tensor(raw).reshape(given.shape())
    return np.frombuffer(raw, kinds[given.datatype()]).reshape(given.shape())


CONTEXT = "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"prompt": "x" * 100}, "prompt", CONTEXT, "maximum context length is 100 tokens, and the prompt has 100"),
        ({"prompt": "x" * 301}, "prompt", CONTEXT, "the prompt has 301 bytes, at most 300"),
        ({"prompt": "x" * 80, "max_tokens": 30}, "max_tokens", CONTEXT, "of which the prompt leaves 20"),
        (
            {"prompt": "x", "max_tokens": 51},
            "max_tokens",
            "invalid_value",
            "max_tokens 51 is too large: give at most 50",
        ),
        ({"prompt": ""}, "prompt", "invalid_value", "the prompt is empty"),
        ({"prompt": "x", "max_tokens": 5, "min_tokens": 6}, "min_tokens", "invalid_value", "min_tokens 6"),
        ({"prompt": "x", "stop": "z" * 2000}, "stop", "invalid_value", "stop texts"),
        ({"prompt": "x", "ssv_tier": "turbo", "ssv_max_divergence": 0.1}, "ssv_tier", "invalid_value", "exceeds"),
        ({"prompt": "x", "ssv_policy": {"beam": 0}}, "ssv_policy", "invalid_value", "ssv_policy: beam: Input should"),
        (
            {"prompt": "x", "ssv_tier": "eagle", "ssv_policy": {"accept_below": 0.1}},
            "ssv_policy",
            "invalid_value",
            "trusted tokens are lossy",
        ),
        (
            {"messages": "x" * 100},
            "messages",
            CONTEXT,
            "maximum context length is 100 tokens, and the messages have 100",
        ),
        ({"messages": "x" * 301}, "messages", CONTEXT, "the messages have"),
        ({"messages": "x" * 80, "max_tokens": 30}, "max_tokens", CONTEXT, "of which the messages leave 20"),
        (
            {"messages": "x" * 80, "max_completion_tokens": 30},
            "max_completion_tokens",
            CONTEXT,
            "give max_completion_tokens 20 at most instead of 30",
        ),
        (
            {"messages": "x", "max_completion_tokens": 51},
            "max_completion_tokens",
            "invalid_value",
            "max_completion_tokens 51 is too large",
        ),
        ({"messages": ""}, "messages", "invalid_value", "the last message is empty"),
        ({"messages": "refuse me"}, "messages", "invalid_value", "roles must alternate"),
        ({"messages": "x", "stop": ["z" * 2000]}, "stop", "invalid_value", "stop texts"),
    ],
)
def test_what_the_server_refuses_is_said_in_the_callers_words(
    fields: dict[str, Any], param: str, code: str, says: str, stream: bool
) -> None:
    backend = IntakeBackend()
    if "messages" in fields:
        messages = [{"role": "user", "content": fields["messages"]}]
        response = chat(backend, **{**fields, "messages": messages, "stream": stream})
    else:
        response = complete(backend, **fields, stream=stream)
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == (param, code)
    assert says in error["message"]
    assert ("prompt is too long" in error["message"]) == (code == CONTEXT and not param.startswith("max_"))
    assert not re.search("ssv_messages|text_input|stop_words", error["message"])


def test_what_the_server_takes_is_answered() -> None:
    assert (
        complete(IntakeBackend(), stop=["a"], max_tokens=5, ssv_tier="premium").json()["choices"][0]["text"] == "fine"
    )


def test_an_error_in_mid_stream_is_an_event_and_the_end() -> None:
    backend = FakeBackend(reply("Hel"), ServerError("the queue burns", "UNAVAILABLE"))
    events = events_of(chat(backend, stream=True))
    assert events[-1] == {"error": {"message": "the queue burns", "type": "server_error", "param": None, "code": None}}
    assert len(events) == 3
    stream = openai_of(backend).completions.create(model="tiny", prompt="x", stream=True)
    assert next(iter(stream)).choices[0].text == "Hel"
    with pytest.raises(APIError, match="the queue burns"):
        next(iter(stream))


def test_the_openai_package_raises_its_errors() -> None:
    with pytest.raises(BadRequestError, match="best_of is not supported but for 1"):
        openai_of(FakeBackend()).completions.create(model="tiny", prompt="x", best_of=2)
    with pytest.raises(InternalServerError) as raised:
        openai_of(FakeBackend(ServerError("full", "UNAVAILABLE"))).completions.create(model="tiny", prompt="x")
    assert raised.value.status_code == 503


def test_what_nobody_foresaw_is_500_and_says_nothing() -> None:
    assert "secret" not in error_of(chat(FakeBackend(KeyError("secret"))), 500)["message"]


def test_health_is_the_servers() -> None:
    backend = FakeBackend()
    assert client_of(backend).get("/health").status_code == 200
    backend.ready = False
    response = client_of(backend).get("/health")
    error_of(response, 503)
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny"])
def test_where_there_is_get_there_is_head(path: str) -> None:
    assert client_of(FakeBackend()).head(path).status_code == 200
    assert client_of(FakeBackend()).head("/v1/models/huge").status_code == 404
    backend = FakeBackend()
    backend.ready = False
    assert client_of(backend).head("/health").status_code == 503


# Ids, and a line in the log for each request.


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the log has of requests."""
    found: list[dict[str, Any]] = []

    def record(_: logging.Logger, event: str, /, *, level: int = logging.INFO, **fields: Any) -> None:
        found.append({"event": event, "level": level, **fields})

    monkeypatch.setattr(access_log, "log_event", record)
    return found


SECRET = "xyzzy"


def asking(backend: FakeBackend, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"model": "tiny", "prompt": SECRET, **fields}
    return client_of(backend).post("/v1/completions", json=body, headers=headers or {})


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_line(lines: list[dict[str, Any]], stream: bool) -> None:
    response = asking(FakeBackend(), model="tiny:turbo", stream=stream)
    (line,) = lines
    assert response.headers["x-request-id"] == line.pop("id") != ""
    assert 0 <= line.pop("first_token_s") <= line.pop("total_s")
    assert line == {
        "event": "access",
        "level": logging.INFO,
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "tier": "turbo",
        "stream": stream,
        "prompt_tokens": 7,
        "output_tokens": 6,
        "reason": "stop",
    }


def test_a_request_id_is_made_known_to_all(lines: list[dict[str, Any]]) -> None:
    backend = FakeBackend()
    response = asking(backend)
    assert response.headers["x-request-id"] == response.json()["id"] == backend.request_id == lines[0]["id"]
    assert "answer" not in lines[0]
    response = asking(backend, headers={"X-Request-Id": "trace-1/a:b=c@d.e~f+g_h"})
    assert response.headers["x-request-id"] == backend.request_id == lines[1]["id"] == "trace-1/a:b=c@d.e~f+g_h"
    assert lines[1]["answer"] == response.json()["id"] != backend.request_id
    assert asking(backend, headers={"x-request-id": "a" * 128}).headers["x-request-id"] == "a" * 128


@pytest.mark.parametrize("given", ["", " ", "a b", "a" * 129, "é", 'a"b', "a;b", "[a]", "a\tb", "a{b}"])
@pytest.mark.parametrize("path", ["/v1/completions", "/health"])
def test_a_request_id_that_is_none_is_refused(lines: list[dict[str, Any]], given: str, path: str) -> None:
    backend = FakeBackend()
    headers = [(b"x-request-id", given.encode()), (b"content-type", b"application/json")]
    response = client_of(backend).request("GET" if path == "/health" else "POST", path, headers=headers, content=b"{}")
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == ("X-Request-Id", "invalid_value")
    assert response.headers["x-request-id"] == lines[0]["id"]
    assert re.fullmatch("req-[0-9a-f]{32}", lines[0]["id"])
    assert lines[0]["status"] == 400
    assert backend.num_calls == 0


@pytest.mark.parametrize(
    ("fields", "status", "expected"),
    [
        ({"model": "huge"}, 404, {"code": "model_not_found", "param": "model"}),
        ({"best_of": 2}, 400, {"code": "unsupported_value", "param": "best_of"}),
        ({"ssv_tier": SECRET}, 400, {"code": "invalid_value", "param": "ssv_tier"}),
        ({"user": "half \ud800"}, 400, {"code": "invalid_value", "param": "user"}),
        ({"max_tokens": SECRET}, 400, {"code": "invalid_type", "param": "max_tokens"}),
    ],
)
def test_a_refused_request_has_a_line_without_texts(
    lines: list[dict[str, Any]], fields: dict[str, Any], status: int, expected: dict[str, str]
) -> None:
    body = json.dumps({"model": "tiny", "prompt": SECRET, "stop": SECRET, **fields}).encode()
    response = post_raw(FakeBackend(), "/v1/completions", body, **{"X-Request-Id": "mine"})
    error_of(response, status)
    assert response.headers["x-request-id"] == "mine"
    (line,) = lines
    assert (
        line.items()
        >= {"id": "mine", "status": status, "reason": "error", "level": logging.WARNING, **expected}.items()
    )
    assert SECRET not in repr(line)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "expected"), [("UNAVAILABLE", 503), ("INTERNAL", 500), ("INVALID_ARGUMENT", 400)])
def test_what_the_server_refuses_has_a_line(
    lines: list[dict[str, Any]], status: str, expected: int, stream: bool
) -> None:
    response = asking(FakeBackend(ServerError(SECRET, status)), stream=stream, model="tiny:turbo")
    (line,) = lines
    assert line["status"] == response.status_code == expected
    assert line["tier"] == "turbo" and line["reason"] == "error"
    assert line["id"] == response.headers["x-request-id"]
    assert SECRET not in repr(line)


def test_every_other_request_has_a_line(lines: list[dict[str, Any]]) -> None:
    client = client_of(FakeBackend(), max_body_bytes=100)
    client.get("/health")
    client.head("/health")
    client.get("/nothing?a=" + SECRET)
    client.put("/v1/models")
    client.post("/v1/completions", content=b"x" * 101, headers={"Content-Type": "application/json"})
    client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert [line["status"] for line in lines] == [200, 200, 404, 405, 413, 400]
    assert len({line["id"] for line in lines}) == 6
    assert SECRET not in repr(lines)


def test_an_error_in_mid_stream_is_in_the_line(lines: list[dict[str, Any]]) -> None:
    asking(FakeBackend(reply("Hel"), ServerError("the queue burns", "UNAVAILABLE")), stream=True)
    assert lines[0].items() >= {"status": 200, "reason": "error", "output_tokens": 2}.items()


def test_what_nobody_foresaw_has_a_line_and_an_id(lines: list[dict[str, Any]]) -> None:
    response = asking(FakeBackend(KeyError("secret")), headers={"X-Request-Id": "mine"})
    assert error_of(response, 500)["type"] == "server_error"
    assert response.headers["x-request-id"] == "mine"
    assert lines[0].items() >= {"id": "mine", "status": 500, "level": logging.ERROR}.items()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_in_the_line(lines: list[dict[str, Any]], stream: bool) -> None:
    async def test() -> None:
        backend = FakeBackend(reply("Hel"), asyncio.Event())
        connection = Connection(backend, stream=stream)
        while not backend.num_calls or (stream and connection.sent.qsize() < 3):
            await asyncio.sleep(0)
        connection.left.set()
        await connection.task

    run(test())
    assert lines[0].items() >= {"status": 200 if stream else 499, "reason": "cancelled"}.items()


def test_connections_too_many_are_refused_as_everything_else_is(lines: list[dict[str, Any]]) -> None:
    num = 3
    client = client_of(FakeBackend(), num_connections=lambda: num, max_connections=3)
    assert client.get("/health").status_code == 200
    num = 4
    response = client.get("/health", headers={"X-Request-Id": "mine"})
    assert error_of(response, 503)["code"] == "too_many_connections"
    assert (response.headers["retry-after"], response.headers["x-request-id"]) == ("1", "mine")
    assert lines[1].items() >= {"id": "mine", "status": 503}.items()


# Time: when chunks leave, and what a client that leaves ends.


class Connection:
    """A request, played by hand: what has been sent so far, and leaving."""

    def __init__(self, backend: FakeBackend, **fields: Any) -> None:
        body = json.dumps({"model": "tiny", "messages": MESSAGES, **fields}).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        scope |= {"query_string": b"", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.left = asyncio.Event()
        bodies = [body]

        async def receive() -> dict[str, Any]:
            if bodies:
                return {"type": "http.request", "body": bodies.pop()}
            await self.left.wait()
            return {"type": "http.disconnect"}

        app: Any = create_app(backend, MODELS)
        self.task = asyncio.create_task(app(scope, receive, self.sent.put))

    async def next_event(self) -> Any:
        message = await self.sent.get()
        return json.loads(message["body"].removeprefix(b"data: "))


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20.0))


def test_chunks_leave_when_they_come() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        connection = Connection(FakeBackend(reply("Hel"), gate, reply("lo", "stop")), stream=True)
        assert (await connection.sent.get())["status"] == 200
        assert (await connection.next_event())["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert (await connection.next_event())["choices"][0]["delta"] == {"content": "Hel"}
        assert connection.sent.empty()
        gate.set()
        assert (await connection.next_event())["choices"][0]["delta"] == {"content": "lo"}
        await connection.task

    run(test())


@pytest.mark.parametrize("first", [(), (reply("Hel"),)], ids=["before the first token", "in mid-answer"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_once(stream: bool, first: tuple[Reply, ...]) -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        backend = FakeBackend(*first, asyncio.Event())
        connection = Connection(backend, stream=stream)
        while not backend.num_calls or (stream and first and connection.sent.qsize() < 3):
            await asyncio.sleep(0)
        assert not backend.closed.is_set()
        connection.left.set()
        await backend.closed.wait()
        await connection.task
        assert asyncio.all_tasks() == before

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_cancelled_here_ends_at_the_server(stream: bool) -> None:
    async def test() -> None:
        backend = FakeBackend(reply("Hel"), asyncio.Event())
        connection = Connection(backend, stream=stream)
        while not backend.num_calls or (stream and connection.sent.qsize() < 3):
            await asyncio.sleep(0)
        connection.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connection.task
        assert backend.closed.is_set()

    run(test())


def test_a_finished_answer_leaves_nothing_running() -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        connection = Connection(FakeBackend(), stream=True)
        await connection.task
        assert asyncio.all_tasks() == before

    run(test())


# Before a gRPC server.


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers as `ensemble` does: by what the prompt says."""

    def __init__(self) -> None:
        self.cancelled: queue.Queue[bool] = queue.Queue()
        self.ended: queue.Queue[str] = queue.Queue()
        self.requests: list[Any] = []
        self.is_ready = True

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.is_ready and request.name == "ensemble")

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            self.requests.append(request)
            what = request.raw_input_contents[0][4:].decode()
            if what == "refuse":
                message = f"in ensemble 'ensemble', [request id: {request.id}] INVALID_ARGUMENT: top_p 5 is wrong"
                yield service_pb2.ModelStreamInferResponse(error_message=message)
                return
            if what == "break off":
                return
            yield response_of("Hel", "")
            if what == "fail":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if what == "hang":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.put(True)
            yield response_of("lo", "stop")
            await asyncio.sleep(0.05)  # Triton ends a stream a moment later
            self.ended.put(what)


def response_of(text: str, reason: str) -> Any:
    outputs: dict[str, str | int | bool] = {"text_output": text, "finish_reason": reason, "num_input_tokens": 7}
    outputs |= {"num_output_tokens": 2, "total_draft_tokens": 4, "total_accepted_draft_tokens": 3}
    outputs |= {"ssv_unverified_tokens": 1, "ssv_typical_tokens": 2, "ssv_target_passes": 2}
    outputs |= {"ssv_cached_tokens": 5, "ssv_tier_used": "premium", "ssv_lossless": True, "ssv_logprobs": ""}
    outputs |= {"ssv_tier_withdrawn": "", "ssv_arm": ""}
    outputs |= {"ssv_fates": "", "ssv_draft_tokens": 9, "ssv_kept_per_pass": "[1, 0, 2]"}
    response = service_pb2.ModelInferResponse(model_name="ensemble")
    for name, value in outputs.items():
        if isinstance(value, str):
            datatype, content = "BYTES", len(value.encode()).to_bytes(4, "little") + value.encode()
        elif isinstance(value, bool):
            datatype, content = "BOOL", bytes([value])
        else:
            datatype, content = "INT32", value.to_bytes(4, "little")
        response.outputs.add(name=name, datatype=datatype, shape=[1, 1])
        response.raw_output_contents.append(content)
    return service_pb2.ModelStreamInferResponse(infer_response=response)


async def serve(triton: Triton, credentials: grpc.ServerCredentials | None = None) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    return server, port


def with_triton(test: Any) -> None:
    async def body() -> None:
        triton = Triton()
        server, port = await serve(triton)
        backend = AsyncClient(f"grpc://127.0.0.1:{port}")
        try:
            await test(triton, backend)
        finally:
            await backend.aclose()
            await server.stop(0)

    run(body())


def test_the_backend_asks_and_reads() -> None:
    async def test(triton: Triton, backend: AsyncClient) -> None:
        settings = Settings(tier="turbo", chat=False, seed=2**64 - 1)
        replies = [r async for r in backend.stream("go", settings, request_id="cmpl-1", stream=True)]
        assert [(r.text, r.finish_reason) for r in replies] == [("Hel", ""), ("lo", "stop")]
        assert replies[-1].tier == "premium" and replies[-1].lossless
        (request,) = triton.requests
        assert (request.id, request.model_name) == ("cmpl-1", "ensemble")
        assert triton.ended.qsize() == 1  # not cancelled when it was over
        assert [i.name for i in request.inputs] == ["text_input", "ssv_chat", "stream", "ssv_tier", "seed"]

    with_triton(test)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (Settings(user="Ada"), "ab_router"),
        (Settings(), "ab_router"),
        (Settings(user="Ada", tier="turbo"), "ensemble"),
        (Settings(user="Ada", max_divergence=0.1), "ensemble"),
        (Settings(user="Ada", policy={"beam": 2}), "ensemble"),
    ],
)
def test_a_routed_backend_leaves_to_the_router_what_names_no_tier(settings: Settings, model: str) -> None:
    async def test(triton: Triton, backend: AsyncClient) -> None:
        routed = AsyncClient(backend._url, is_routed=True)
        for each in (routed, backend):
            assert [reply.text async for reply in each.stream("go", settings, request_id="", stream=True)] == [
                "Hel",
                "lo",
            ]
        await routed.aclose()
        through, plain = triton.requests
        assert (through.model_name, plain.model_name) == (model, "ensemble")
        users = [
            raw[4:]
            for one, raw in zip(through.inputs, through.raw_input_contents, strict=True)
            if one.name == "ssv_user"
        ]
        assert users == ([b"Ada"] if settings.user and model == "ab_router" else [])
        assert "ssv_user" not in [one.name for one in plain.inputs]

    with_triton(test)


def test_all_choices_are_one_users() -> None:
    backend = FakeBackend()
    assert chat(backend, user="Ada", n=2).status_code == 200
    assert backend.settings.user == "Ada"
    assert chat(backend, safety_identifier="Bo").status_code == 200
    assert backend.settings.user == "Bo"
    body = chat(backend, n=2).json()
    assert backend.settings.user == body["id"]


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [
        ("refuse", "INVALID_ARGUMENT", "top_p 5 is wrong"),
        ("fail", "UNAVAILABLE", "Socket closed"),
        ("break off", "UNAVAILABLE", "the server ended the stream before the answer was complete"),
    ],
)
def test_the_backend_raises_what_the_server_says(prompt: str, status: str, message: str) -> None:
    async def test(_: Triton, backend: AsyncClient) -> None:
        with pytest.raises(ServerError) as raised:
            async for _reply in backend.stream(prompt, Settings(), request_id="", stream=True):
                pass
        assert (raised.value.status, str(raised.value)) == (status, message)

    with_triton(test)


def test_closing_the_backends_stream_cancels_the_request() -> None:
    async def test(triton: Triton, backend: AsyncClient) -> None:
        replies = backend.stream("hang", Settings(), request_id="", stream=True)
        assert (await anext(replies)).text == "Hel"
        await replies.aclose()
        assert await asyncio.to_thread(triton.cancelled.get, timeout=60.0)

    with_triton(test)


def test_the_backend_says_whether_the_server_is_ready() -> None:
    async def test(triton: Triton, backend: AsyncClient) -> None:
        assert await backend.is_ready()
        triton.is_ready = False
        assert not await backend.is_ready()

    with_triton(test)


def test_a_server_that_is_not_there_is_unavailable_and_not_ready() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        backend = AsyncClient(f"grpc://127.0.0.1:{port}")
        assert not await backend.is_ready()
        with pytest.raises(ServerError, match="no server answers") as raised:
            await anext(backend.stream("go", Settings(), request_id="", stream=True))
        assert raised.value.status == "UNAVAILABLE"
        await backend.aclose()

    run(test())


# As ssv-serve starts it.


class TritonThread:
    """The made-up server, beside the test."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.triton = Triton()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server, self.port = self._run(serve(self.triton, credentials))

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10.0)

    def stop(self) -> None:
        self._run(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ssv.triton_repo.openai.process", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert '"event": "serving"' in line, line + process.stderr.read()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def api(bundle: Path) -> Iterator[tuple[str, Triton]]:
    """The API's address, and the server behind it."""
    server, port = TritonThread(), free_port()
    url = f"grpc://127.0.0.1:{server.port}"
    limits = ["--max-body-bytes", "20000", "--max-connections", "3"]
    process = start("--url", url, "--bundle", str(bundle), "--port", str(port), *limits)
    try:
        wait_until_serving(process)
        yield f"http://127.0.0.1:{port}", server.triton
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        # A line for each request, and none of a failure.
        lines = [json.loads(line) for line in process.stderr]
        assert {line["event"] for line in lines} == {"access"}
        assert len({line["id"] for line in lines}) == len(lines) > 5
        assert {line["status"] for line in lines} >= {200, 400, 413, 503}
    finally:
        process.kill()
        process.wait()
        server.stop()


def test_the_process_answers(api: tuple[str, Triton]) -> None:
    url, _ = api
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "tiny:premium", "tiny:turbo"]
        stream = client.completions.create(model="tiny:turbo", prompt="go", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"
        with pytest.raises(BadRequestError, match="top_p 5 is wrong"):
            client.completions.create(model="tiny", prompt="refuse", stream=True)
    assert httpx2.get(f"{url}/health").status_code == 200
    head = httpx2.head(f"{url}/v1/models")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("stream", [False, True])
def test_the_process_cancels_for_a_client_that_leaves(api: tuple[str, Triton], stream: bool) -> None:
    url, triton = api
    before = len(triton.requests)
    body = json.dumps({"model": "tiny", "prompt": "hang", "stream": stream})
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        client.sendall((head + body).encode())
        if stream:
            assert b"200 OK" in client.recv(1 << 16)
        else:
            while len(triton.requests) == before:
                pass
        assert triton.cancelled.empty()
    assert triton.cancelled.get(timeout=60.0)


def test_the_process_refuses_a_body_while_it_is_read(api: tuple[str, Triton]) -> None:
    """With a length and without one; a client that sends all of it before it reads still learns why."""
    for body in (b" " * 2_000_000, iter([b" " * 10_000] * 200)):
        response = httpx2.post(f"{api[0]}/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert "more than 20000 bytes" in error_of(response, 413)["message"]


def test_a_body_that_never_ends_is_refused(api: tuple[str, Triton]) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(api[0].rpartition(":")[2])), timeout=60.0) as client:
        client.sendall(head + 3 * (b"2710\r\n" + b" " * 10_000 + b"\r\n"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_the_process_bounds_its_connections(api: tuple[str, Triton]) -> None:
    address = ("127.0.0.1", int(api[0].rpartition(":")[2]))
    idle = [socket.create_connection(address) for _ in range(2)]
    try:
        assert httpx2.get(f"{api[0]}/health").status_code == 200
        idle.append(socket.create_connection(address))
        response = httpx2.get(f"{api[0]}/health")
        assert error_of(response, 503)["code"] == "too_many_connections"
        assert response.headers["retry-after"] == "1"
    finally:
        for client in idle:
            client.close()


def ends_with_error(*arguments: str) -> str:
    process = start(*arguments)
    _, error = process.communicate(timeout=60.0)
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_a_port_that_is_taken_is_said(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = ends_with_error("--url", "grpc://127.0.0.1:1", "--bundle", str(bundle), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "in use" in error
    assert "hint: choose another" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--url": "http://x:1"}, "grpc://host:port"),
        ({"--bundle": "/nowhere"}, "is not a bundle"),
        ({"--port": "70000"}, "cannot listen"),
        ({"--max-body-bytes": "0"}, "--max-body-bytes 0 must be at least 1"),
        ({"--max-connections": "0"}, "--max-connections 0 must be at least 1"),
        ({"--tls-cert": "x.pem"}, "give both"),
        ({"--tls-cert": "x.pem", "--tls-key": "y.pem"}, "grpcs://"),
        ({"--tls-cert": "x.pem", "--tls-key": "y.pem", "--url": "grpcs://x:1"}, "cannot be used"),
    ],
)
def test_arguments_that_cannot_be_are_said(
    bundle: Path,
    change: dict[str, str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openai_process, "log_to_stderr", lambda: None)
    monkeypatch.setattr(openai_process, "_log_warnings_of_uvicorn", lambda: None)
    arguments = {"--url": "grpc://127.0.0.1:1", "--bundle": str(bundle), "--port": "1", **change}
    assert openai_process.main([part for pair in arguments.items() for part in pair]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", [DNSName("*.example.com"), IPAddress(IPv4Address("127.0.0.1"))], ids=repr)
def test_the_process_speaks_tls_on_both_sides(bundle: Path, tmp_path: Path, name: GeneralName) -> None:
    """Also with a certificate for another name than the one it is reached by here, and one that is no authority's."""
    certificate, key = self_signed(tmp_path, "one", of="x", san=[name], ca=False)
    pair = (key.read_bytes(), certificate.read_bytes())
    server, port = TritonThread(grpc.ssl_server_credentials([pair])), free_port()
    url = f"grpcs://127.0.0.1:{server.port}"
    process = start(
        "--url",
        url,
        "--bundle",
        str(bundle),
        "--port",
        str(port),
        "--tls-cert",
        str(certificate),
        "--tls-key",
        str(key),
    )
    try:
        wait_until_serving(process)
        assert httpx2.get(f"https://127.0.0.1:{port}/health", verify=False).status_code == 200
    finally:
        process.kill()
        process.communicate()
        server.stop()


# Keys, browsers, token ids.


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/metrics", "/version", "/other"])
def test_a_key_is_asked_for(path: str, lines: list[dict[str, Any]]) -> None:
    client = client_of(FakeBackend(), keys=["first", "second"])
    for given in ("", "first", "Bearer", "Bearer firs", "Bearer first2", "Basic first", "Bearer \u00e9"):
        headers = {"Authorization": given.encode("latin-1")} if given else {}
        response = client.get(path, headers=headers)
        error = error_of(response, 401)
        assert (error["code"], response.headers["WWW-Authenticate"]) == ("invalid_api_key", "Bearer")
        assert lines[-1]["status"] == 401 and lines[-1]["code"] == "invalid_api_key"
    for key in ("first", "second"):
        assert client.get(path, headers={"Authorization": f"bearer {key}"}).status_code != 401


def test_who_watches_needs_no_key_and_the_openai_package_sends_its_own() -> None:
    backend = FakeBackend()
    http = client_of(backend, keys=["first"])
    assert http.get("/health").status_code == http.get("/live").status_code == 200
    asked: Any = {"model": "tiny", "messages": MESSAGES}
    OpenAI(base_url="http://testserver/v1", api_key="first", http_client=http).chat.completions.create(**asked)
    with pytest.raises(AuthenticationError):
        OpenAI(base_url="http://testserver/v1", api_key="no", http_client=http).chat.completions.create(**asked)
    assert backend.num_calls == 1


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert access_keys(file, {"SSV_API_KEY": "three"}) == ("one", "two")
    assert access_keys(None, {"SSV_API_KEY": "three"}) == ("three",)
    assert access_keys(None, {}) == access_keys(None, {"SSV_API_KEY": ""}) == ()
    for text, says in (("", "has no key"), ("a b", "no client can send"), ("\u00e9", "no client can send")):
        file.write_text(text)
        with pytest.raises(AccessKeyError, match=says):
            access_keys(file, {})
    with pytest.raises(AccessKeyError, match="cannot be read"):
        access_keys(tmp_path / "none", {})


def test_browsers_are_told_whose_pages_may_ask() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    client = client_of(FakeBackend(), keys=["key"], allowed_origins=["https://a.example"])
    allowed = client.options("/v1/chat/completions", headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
    answer = client.get("/v1/models", headers={"Origin": "https://a.example", "Authorization": "Bearer key"})
    assert answer.headers["Access-Control-Expose-Headers"] == "X-Request-Id"
    refused = client.options("/v1/chat/completions", headers=ask | {"Origin": "https://b.example"})
    assert refused.status_code == 400 and "Access-Control-Allow-Origin" not in refused.headers
    assert "Access-Control-Allow-Origin" not in client_of(FakeBackend()).get("/v1/models", headers=ask).headers


def test_the_version_is_told() -> None:
    assert client_of(FakeBackend()).get("/version").json() == {"version": version("ssv")}


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    inner = lettered().inner
    inner.backend.save(str(folder / "tokenizer.json"))
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    manifest = Manifest(
        name="tiny",
        target={"vocab_size": 20},
        draft={},
        eos_token_ids=[0],
        default_precision="fp32",
        tiers={},
        files={},
        sources={},
        versions={},
    )
    write_manifest(tmp_path, manifest)
    return Tokens(tmp_path, 512)


def test_texts_become_token_ids_and_back(tokens: Tokens) -> None:
    client = client_of(FakeBackend(), tokens=tokens)
    expected = list(lettered().encode("ab: c"))
    body = client.post("/tokenize", json={"model": "tiny", "prompt": "ab: c", "return_token_strs": True}).json()
    assert body == {"count": len(expected), "max_model_len": 512, "tokens": expected, "token_strs": body["token_strs"]}
    assert "".join(body["token_strs"]) == "ab: c"
    assert client.post("/detokenize", json={"tokens": [*expected, 0]}).json() == {"prompt": "ab: c<end>"}
    chat_ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": "ab"}]}).json()["tokens"]
    assert chat_ids == list(lettered().encode("ab:"))
    assert client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()["count"] == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": " "}]}, "messages"),
        ("/tokenize", {"prompt": "a", "unknown": 1}, "unknown"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(tokens: Tokens, path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(client_of(FakeBackend(), tokens=tokens).post(path, json=body), 400)["param"] == param


def test_metrics_are_those_of_all_processes(tmp_path: Path) -> None:
    Metrics(tmp_path, "openai").refused("full")
    text = client_of(FakeBackend(), reader=Reader(tmp_path)).get("/metrics").text
    assert 'ssv_requests_refused{reason="full"} 1' in text
