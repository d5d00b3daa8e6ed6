"""/v1/responses: what OpenAI's client reads of it, what is asked of the server, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from openai import BadRequestError
from pydantic import BaseModel

from ssv.client.triton import ServerError
from ssv.runtime.tools import call_grammar

from .test_app import MODELS, SPECULATED, SPECULATION, FakeBackend, client_of, error_of, openai_of, reply

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
CALL = '<tool_call>[{"name": "weather", "arguments": {"place": "Rome"}}]</tool_call>'


def respond(backend: FakeBackend, **fields: Any) -> httpx2.Response:
    return client_of(backend).post("/v1/responses", json={"model": "tiny", "input": "Hi", **fields})


def test_a_response_is_openais_with_a_disclosure() -> None:
    backend = FakeBackend(reply("Hel"), SPECULATED)
    found = openai_of(backend).responses.create(model="tiny:turbo", input="Hi", instructions="Be brief.", store=False)
    assert (found.object, found.status, found.output_text, found.error) == ("response", "completed", "Hello", None)
    assert found.id.startswith("resp_") and found.id == backend.request_id
    (message,) = found.output
    assert (message.type, message.status) == ("message", "completed")
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (7, 4, 11)
    assert found.usage.input_tokens_details.cached_tokens == 5
    extra = found.model_extra or {}
    assert (extra["ssv"]["tier"], extra["ssv"]["divergence_bound"]) == ("turbo", 0.05)
    assert extra["metrics"] == {"speculative_decoding": SPECULATION}
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (backend.prompt, backend.settings.tier, backend.is_streamed) == (said, "turbo", False)


def test_what_comes_back_from_an_answer_is_a_conversation() -> None:
    backend = FakeBackend(reply("Let me look. " + CALL, "stop"))
    client = openai_of(backend)
    first: Any = client.responses.create(model="tiny", input="Weather?", tools=[TOOL])  # type: ignore[list-item]
    message, call = first.output
    assert (message.content[0].text.strip(), call.name) == ("Let me look.", "weather")
    assert json.loads(call.arguments) == {"place": "Rome"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "12"}]}
    asked = {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
    client.responses.create(model="tiny", input=[asked, *first.output, result])
    prompt: Any = backend.prompt
    assert [each["role"] for each in prompt] == ["user", "assistant", "tool"]
    _, said, told = prompt
    assert said["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"place": "Rome"}}
    assert told == {"role": "tool", "content": "12", "tool_call_id": call.call_id}


def test_settings_are_those_of_a_chat_completion() -> None:
    backend = FakeBackend()
    fields = {"max_output_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": -1, "ssv_timeout": 2.0}
    assert respond(backend, **fields).status_code == 200
    found = backend.settings
    assert (found.max_tokens, found.temperature, found.top_p, found.top_k) == (9, 0.5, 0.5, 3)
    assert (found.seed, found.timeout) == (2**64 - 1, 2.0)
    fields = {"min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.2}
    fields |= {"logit_bias": {"5": 1.5}, "bad_words": ["a"], "stop": "b", "stop_token_ids": [3], "min_tokens": 2}
    assert respond(backend, **fields, ignore_eos=True, latency_bound_ms=40.0, user="Ann").status_code == 200
    found = backend.settings
    assert (found.min_p, found.presence_penalty, found.frequency_penalty) == (0.1, 1.0, -0.5)
    assert (found.repetition_penalty, found.logit_bias, found.bad_words) == (1.2, {5: 1.5}, ["a"])
    assert (found.stop, found.stop_token_ids, found.min_tokens) == (["b"], [3], 2)
    assert (found.ignore_eos, found.latency_bound_ms, found.user) == (True, 40.0, "Ann")
    named = {"type": "function", "name": "weather"}
    assert respond(backend, tools=[TOOL], tool_choice=named).status_code == 200
    tools = [{"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}]
    assert backend.settings.guide == ("ebnf_grammar", call_grammar(MODELS.tool_form, tools, most=1))


def test_a_typed_answer_is_parsed() -> None:
    class Place(BaseModel):
        name: str

    backend = FakeBackend(reply('{"name": ', ""), reply('"Rome"}', "stop"))
    found = openai_of(backend).responses.parse(model="tiny", input="Where?", text_format=Place)
    assert found.output_parsed == Place(name="Rome")
    assert backend.settings.guide is not None
    assert (backend.settings.guide[0], json.loads(backend.settings.guide[1])["required"]) == ("json_schema", ["name"])


def test_a_stream_has_the_typed_events_in_their_order() -> None:
    backend = FakeBackend(reply("Hel"), reply(""), reply("lo "), reply(CALL, "stop"))
    tools: Any = [TOOL]
    events: list[Any] = list(openai_of(backend).responses.create(model="tiny", input="Hi", tools=tools, stream=True))
    assert backend.is_streamed
    assert [event.sequence_number for event in events] == list(range(len(events)))
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.delta"]
    message += ["output_text.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    kinds = ["created", "in_progress", *message, *call, "completed"]
    assert [event.type for event in events] == [f"response.{kind}" for kind in kinds]
    assert {event.response.id for event in events if hasattr(event, "response")} == {backend.request_id}
    assert (events[0].response.output, events[0].response.status) == ([], "in_progress")
    assert events[2].item.content == [] and events[3].part.text == ""
    assert events[-1].response.output_text == events[6].text
    assert events[-1].response.output == [events[8].item, events[12].item]
    assert events[-1].response.model_extra["ssv"]["tier"] == "turbo"


def test_openais_helper_for_streams_puts_the_answer_together() -> None:
    backend = FakeBackend(reply("Hel"), reply("lo", "stop"))
    with openai_of(backend).responses.stream(model="tiny", input="Hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert (deltas, final.output_text, final.status) == (["Hel", "lo"], "Hello", "completed")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(stream: bool) -> None:
    found = respond(FakeBackend(reply("Hel", "length")), stream=stream)
    if stream:
        kind, data = found.text.split("\n\n")[-2].split("\n")
        assert kind == "event: response.incomplete"
        body = json.loads(data.removeprefix("data: "))["response"]
    else:
        body = found.json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


def test_an_error_after_the_beginning_is_the_streams_last_event() -> None:
    backend = FakeBackend(reply("Hel"), ServerError("gone", "UNAVAILABLE", is_cut_off=True))
    events: list[Any] = list(openai_of(backend).responses.create(model="tiny", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert (failed.status, failed.error.code, failed.output[0].status) == ("failed", "server_error", "incomplete")
    assert failed.output_text == "Hel" and "gone" in failed.error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("store", True),
        ("prompt", {"id": "p"}),
        ("include", ["reasoning.encrypted_content"]),
        ("reasoning", {"effort": "high"}),
        ("truncation", "auto"),
        ("top_logprobs", 2),
        ("max_tool_calls", 1),
        ("service_tier", "flex"),
        ("messages", []),
        ("max_tokens", 5),
        ("n", 2),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{**TOOL, "name": "a b"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "file_search"}),
        ("text", {"format": {"type": "json_schema", "name": "x"}}),
        ("text", {"verbosity": "low"}),
        ("input", []),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [{"type": "reasoning", "id": "rs_1", "summary": []}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("input", [{"role": "tool", "content": "x"}]),
        ("input", [{"type": "function_call", "call_id": "1"}]),
        ("input", 5),
        ("max_output_tokens", 0),
        ("ssv_tier", "gold"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    backend = FakeBackend()
    error = error_of(respond(backend, **{name: value}), 400)
    assert str(error["param"]).partition("[")[0].partition(".")[0] == name
    assert backend.num_calls == 0


def test_what_is_null_or_changes_nothing_is_taken() -> None:
    nothing = dict.fromkeys(("previous_response_id", "conversation", "reasoning", "tools", "text", "metadata"))
    more = {"store": None, "background": False, "truncation": "disabled", "include": [], "user": "u"}
    assert respond(FakeBackend(), **nothing, **more).status_code == 200


def test_the_servers_errors_have_this_apis_names() -> None:
    what = "the prompt has 900 tokens, and prompt and output together may have 512: shorten it"
    backend = FakeBackend(ServerError(what, "INVALID_ARGUMENT"))
    with pytest.raises(BadRequestError) as caught:
        openai_of(backend).responses.create(model="tiny", input="Hi")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
