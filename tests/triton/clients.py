"""Clients of the OpenAI API as their users write them; run by `test_foreign_clients.py` with the Python that has them
installed.

    python clients.py CLIENT OPENAI_URL METRICS_URL MODEL

It imports nothing of ssv, and ends with a traceback where a client does not get what it needs.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

QUESTION = "Explain how rainbows form."
TOO_LONG = "word " * 5000


def use_openai(url: str, _: str, model: str) -> None:
    from openai import BadRequestError, NotFoundError, OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0, default_headers={"X-Request-Id": "client-1"})
    messages: Any = [{"role": "user", "name": "ann", "content": QUESTION}]
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        max_completion_tokens=12,
        temperature=0,
        extra_body={"parallel_tool_calls": None},
    )
    assert raw.headers["x-request-id"] == "client-1"
    whole = raw.parse()
    assert whole.choices[0].message.content and whole.usage and whole.usage.completion_tokens == 12
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=12, temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    counts = [c.usage.completion_tokens for c in chunks if c.usage]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 12
    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": TOO_LONG}])
    except BadRequestError as error:
        assert (error.code, error.param) == ("context_length_exceeded", "messages")
        assert error.request_id == "client-1"
    else:
        raise AssertionError("a prompt too long was taken")
    try:
        client.models.retrieve("gpt-4")
    except NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("there is a gpt-4")


def use_langchain(url: str, _: str, model: str) -> None:
    from langchain_core.exceptions import ContextOverflowError
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel

    class Colour(BaseModel):
        """A colour."""

        name: Literal["red", "blue"]
        is_warm: bool

    def weather(town: str) -> str:
        """Tells the weather of a town."""
        return "-5 degrees"

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=12, max_retries=0)
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("Hi", name="ann"),
        AIMessage("Hello."),
        HumanMessage([{"type": "text", "text": QUESTION}]),
    ]
    answer = chat.invoke(messages)
    assert answer.content and answer.usage_metadata and answer.usage_metadata["output_tokens"] == 12
    chunks = list(chat.stream(messages))
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content
    assert [r.content for r in chat.batch([messages, messages])] == [answer.content] * 2
    assert OpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=5).invoke("The sea is")
    longer = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=120, max_retries=0)
    called = longer.bind_tools([weather], tool_choice="weather").invoke("Is it cold in Oslo?")
    (call,) = called.tool_calls
    assert call["name"] == "weather" and isinstance(call["args"]["town"], str)
    told = ToolMessage("-5 degrees", tool_call_id=call["id"])
    assert longer.bind_tools([weather]).invoke([HumanMessage("Is it cold in Oslo?"), called, told])
    for method in ("json_schema", "function_calling"):
        found = longer.with_structured_output(Colour, method=method).invoke(QUESTION)
        assert isinstance(found, Colour) and found.name in ("red", "blue"), method
    try:
        chat.invoke(TOO_LONG)
    except ContextOverflowError:
        pass
    else:
        raise AssertionError("a prompt too long was taken")


def use_pydantic_ai(url: str, _: str, model: str) -> None:
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Colour(BaseModel):
        """A colour."""

        name: Literal["red", "blue"]
        is_warm: bool

    asked = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    settings: Any = {"temperature": 0.0, "max_tokens": 120}
    assert Agent(asked, system_prompt="Be brief.").run_sync(QUESTION, model_settings=settings).output
    for output in (NativeOutput(Colour), ToolOutput(Colour)):
        found = Agent(asked, output_type=output).run_sync(QUESTION, model_settings=settings).output
        assert isinstance(found, Colour), output


def use_litellm(url: str, _: str, model: str) -> None:
    import litellm

    asked: Any = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 12}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(**asked, messages=messages, num_retries=0)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens == 12
    chunks = list(litellm.completion(**asked, messages=messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert litellm.text_completion(**asked, prompt="The sea is").choices[0].text
    try:
        litellm.completion(**asked, messages=[{"role": "user", "content": TOO_LONG}], num_retries=0)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt too long was taken")


def use_prometheus_client(_: str, url: str, __: str) -> None:
    from urllib.request import urlopen

    from prometheus_client.parser import text_string_to_metric_families

    with urlopen(url, timeout=120.0) as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    ours = {name: family for name, family in families.items() if name.startswith("ssv_")}
    assert "ssv_requests_decoding" in ours, sorted(families)
    for name, family in ours.items():
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), name


if __name__ == "__main__":
    _, client, *given = sys.argv
    globals()[f"use_{client}"](*given)
