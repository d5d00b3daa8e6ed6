"""/v1/responses of a real server, asked with OpenAI's own package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

QUESTION = "Explain how rainbows form."
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"enum": ["Oslo", "Rome", "Lima"]}, "wind": {"enum": [None, "strong"]}},
        "required": ["town", "wind"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_the_text_of_the_chat_completion(client: OpenAI, model: str, stream: bool) -> None:
    said = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
    asked: Any = {"model": model, "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    if stream:
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        found = events[-1].response
        assert events[-1].type == "response.incomplete" and "".join(deltas) == found.output_text
        assert len(deltas) > 1  # it came in pieces
    else:
        found = client.responses.create(**asked)
    assert found.output_text == said.choices[0].message.content
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage is not None and said.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (said.usage.prompt_tokens, 24)
    assert found.model_extra["ssv"]["tier"] == "premium" and found.model_extra["ssv"]["arm"] is None


def test_a_conversation_with_a_call_goes_on(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "tools": [TOOL], "temperature": 0, "max_output_tokens": 60}
    question: Any = {"role": "user", "content": "Is it cold in Oslo?"}
    first: Any = client.responses.create(**asked, input=[question], tool_choice={"type": "function", "name": "weather"})
    (call,) = first.output
    arguments = json.loads(call.arguments)
    assert first.status == "completed" and call.name == "weather"
    assert arguments["town"] in ("Oslo", "Rome", "Lima") and arguments["wind"] in (None, "strong")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "-5 degrees"}
    second = client.responses.create(**asked, input=[question, call, result])
    assert second.output and second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_form_is_kept(client: OpenAI, name: str) -> None:
    schema = {"type": "object", "properties": {"wind": {"const": None}}, "required": ["wind"]}
    form: Any = {
        "format": {"type": "json_schema", "name": "weather", "schema": {**schema, "additionalProperties": False}}
    }
    for tier in ("autoregressive", "premium", "turbo"):
        asked: Any = {"model": f"{name}:{tier}", "input": QUESTION, "max_output_tokens": 40, "text": form}
        assert json.loads(client.responses.create(**asked).output_text) == {"wind": None}


def test_settings_have_their_effect(client: OpenAI, name: str) -> None:
    """Those that it shares with chat completions, and that OpenAI's own has not."""
    asked: Any = {"input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    said = client.responses.create(**asked, model=f"{name}:turbo")
    # A bound that short leaves nothing pending: the text is the same, by more passes of the target.
    bounded = client.responses.create(**asked, model=f"{name}:turbo", extra_body={"latency_bound_ms": 0.001})
    passes = [(answer.model_extra or {})["ssv"]["target_passes"] for answer in (said, bounded)]
    assert passes[0] < passes[1]
    word = said.output_text.split()[3]
    stopped = client.responses.create(**asked, model=f"{name}:turbo", extra_body={"stop": word})
    assert stopped.output_text == said.output_text[: said.output_text.index(word)] and stopped.status == "completed"
    with pytest.raises(BadRequestError, match="latency_bound_ms") as raised:
        client.responses.create(**asked, model=name, extra_body={"latency_bound_ms": 0})
    assert raised.value.param == "latency_bound_ms"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"role": "user", "content": ""}]}, "input"),
        ({"input": "word " * 3000}, "input"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"tools": [{**TOOL, "parameters": {"not": {}}}], "tool_choice": "required"}, "tools"),
    ],
    ids=["store", "previous", "empty", "long", "limit", "form", "tools"],
)
def test_what_cannot_be_is_refused_in_its_own_words(
    client: OpenAI, model: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.responses.create(**{"model": model, "input": QUESTION, "stream": stream, **fields})
    assert raised.value.param == param
    assert not {"messages", "response_format", "guided_decoding_guide"} & set(raised.value.message.split())


def test_the_arm_that_the_router_chose_is_disclosed(client: OpenAI, name: str) -> None:
    """Of those who name no tier: one user's in one arm, whatever the door."""
    arms = {}
    for user in map(str, range(6)):
        answer: Any = client.responses.create(model=name, input="Hi", max_output_tokens=2, user=user)
        chat: Any = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=2, user=user)
        *_, last = client.completions.create(model=name, prompt="Hi", max_tokens=2, user=user, stream=True)
        found = [each.model_extra["ssv"] for each in (answer, chat, last)]
        assert len({each["arm"] for each in found}) == 1
        arms[user] = found[0]["arm"]
        assert {each["tier"] for each in found} == {{"a": "premium", "b": "turbo"}[arms[user]]}
    assert set(arms.values()) == {"a", "b"}
