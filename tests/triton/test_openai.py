"""The OpenAI API of a real server, asked with OpenAI's own package."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from openai import (
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)
from triton_asks import SECONDS, Busy, full, wait_until

from ssv.bundle.manifest import read_manifest
from ssv.client.cli import main as generate
from ssv.runtime.fates import fate_entry
from ssv.runtime.llm import LLM
from ssv.runtime.methods import METHODS
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

MESSAGES: Any = [{"role": "user", "content": "Explain how rainbows form."}]


class Server(Busy, Protocol):
    """What is used of the fixture."""

    @property
    def grpc_url(self) -> str: ...
    @property
    def openai_url(self) -> str: ...
    @property
    def log(self) -> Path: ...


def disclosed(response: Any) -> dict[str, Any]:
    return dict(response.model_extra["ssv"])


def metric(server: Server, start: str) -> float:
    with urlopen(server.metrics_url, timeout=SECONDS) as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(start)}\S* (\S+)$", text, re.MULTILINE))


def test_models(client: OpenAI, name: str, bundle: Path) -> None:
    tiers = read_manifest(bundle, verify=False).tiers
    assert [entry.id for entry in client.models.list()] == [name, *(f"{name}:{tier}" for tier in tiers)]
    assert client.models.retrieve(f"{name}:premium").object == "model"
    with pytest.raises(NotFoundError):
        client.models.retrieve("huge")


@pytest.mark.parametrize("tier", METHODS)
def test_every_tier_answers_and_is_disclosed(client: OpenAI, name: str, tier: str) -> None:
    answer = client.chat.completions.create(model=f"{name}:{tier}", messages=MESSAGES, max_tokens=24, temperature=0)
    assert answer.model == f"{name}:{tier}"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    what = disclosed(answer)
    assert what["tier"] == tier
    assert what["lossless"] == (tier not in ("balanced", "turbo"))
    assert not (what["lossless"] and what["unverified_tokens"])
    assert 0 <= what["acceptance_rate"] <= 1


def test_lossless_tiers_say_the_same(client: OpenAI, name: str) -> None:
    texts = {
        client.completions.create(model=f"{name}:{tier}", prompt="The sea", max_tokens=32, temperature=0)
        .choices[0]
        .text
        for tier in ("premium", "autoregressive", "speculative")
    }
    assert len(texts) == 1


STEERED: list[dict[str, Any]] = [
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"logit_bias": {"253": -100, "28": 3}, "extra_body": {"repetition_penalty": 1.3, "min_p": 0.1}},
    {"extra_body": {"bad_words": ["the", "water"], "min_tokens": 20, "stop_token_ids": [30]}},
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("fields", STEERED, ids=["penalties", "bias", "words"])
def test_what_changes_the_choice_is_lossless_too(
    client: OpenAI, model: str, name: str, fields: dict[str, Any], temperature: float
) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 40, "temperature": temperature, "seed": 5}
    said = {
        tier: client.chat.completions.create(model=f"{name}:{tier}", **asked, **fields).choices[0].message.content
        for tier in ("autoregressive", "premium", "eagle", "suffix")
    }
    assert len(set(said.values())) == 1
    assert client.chat.completions.create(model=model, **asked).choices[0].message.content != said["premium"]
    if "extra_body" in fields and "bad_words" in fields["extra_body"]:
        assert not {" the ", " water "} & set(re.findall(r" \w+ ", str(said["premium"])))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "is_real": {"type": "boolean"},
    },
    "required": ["name", "colours", "is_real"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_of_a_schema_is_valid_and_lossless(client: OpenAI, name: str, temperature: float) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    asked: Any = {"messages": MESSAGES, "max_tokens": 80, "temperature": temperature, "seed": 3}
    said: dict[str, str] = {}
    for tier in ("autoregressive", "premium", "suffix", "medusa", "balanced", "turbo"):
        answer = client.chat.completions.create(model=f"{name}:{tier}", **asked, response_format=form)
        assert answer.choices[0].finish_reason == "stop"
        said[tier] = str(answer.choices[0].message.content)
        found = json.loads(said[tier])
        assert list(found) == ["name", "colours", "is_real"] and len(found["name"]) <= 20
        assert set(found["colours"]) <= {"red", "green", "blue"} and isinstance(found["is_real"], bool)
    assert len({said[tier] for tier in ("autoregressive", "premium", "suffix", "medusa")}) == 1
    # Who names no tier is the A/B router's.
    stream = client.chat.completions.create(model=f"{name}:premium", **asked, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said["premium"]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"[0-9]{3}-[a-z]{2}"}, r"[0-9]{3}-[a-z]{2}"),
        ({"guided_choice": ["blue", "grey", "ultramarine"]}, "blue|grey|ultramarine"),
        ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | "sea"'}}, r"\(*sea\)*"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 200}, r"\{.*\}"),
    ],
    ids=["regex", "choice", "grammar", "object"],
)
def test_other_forms(client: OpenAI, name: str, fields: dict[str, Any], pattern: str) -> None:
    body = {"max_tokens": 40, "temperature": 0, **fields}
    said = {
        tier: client.completions.create(model=f"{name}:{tier}", prompt="The sea is", extra_body=body).choices[0]
        for tier in ("autoregressive", "premium")
    }
    assert said["premium"].text == said["autoregressive"].text
    if said["premium"].finish_reason == "stop":
        assert re.fullmatch(pattern, said["premium"].text)


def test_a_schema_that_cannot_be_is_refused(client: OpenAI, model: str) -> None:
    with pytest.raises(BadRequestError, match="Unimplemented keys") as raised:
        client.chat.completions.create(
            model=model, messages=MESSAGES, extra_body={"guided_json": {"not": {"type": "string"}}}
        )
    assert raised.value.param == "guided_json"


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"enum": ["Oslo", "Rome", "Lima"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["town", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_functions_are_called(client: OpenAI, model: str, name: str, choice: Any) -> None:
    """And the conversation goes on with what they said."""
    asked: Any = {"messages": [{"role": "user", "content": "Is it cold in Oslo?"}], "tools": TOOLS, "temperature": 0}
    said = []
    for tier in ("autoregressive", "premium", "turbo"):
        answer = client.chat.completions.create(
            model=f"{name}:{tier}", **asked, max_tokens=120, tool_choice=choice, parallel_tool_calls=False
        )
        calls = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and calls is not None and len(calls) == 1
        function: Any = calls[0]
        arguments = json.loads(function.function.arguments)
        if function.function.name == "weather":
            assert arguments["town"] in ("Oslo", "Rome", "Lima") and arguments["days"] <= 9
        said.append((function.function.name, arguments))
    assert said[0] == said[1]
    chunks = client.chat.completions.create(
        model=model, **asked, max_tokens=120, tool_choice=choice, parallel_tool_calls=False, stream=True
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(str(each.function and each.function.name)) for each in deltas] == [said[1][0]]
    message: Any = answer.choices[0].message.model_dump(exclude_none=True)
    heard = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "-5 degrees"}
    answer = client.chat.completions.create(
        model=model, messages=[*asked["messages"], message, heard], tools=TOOLS, temperature=0, max_tokens=16
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_choices_have_seeds_of_their_own(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "The sea", "max_tokens": 12, "temperature": 1.0}
    answer = client.completions.create(**asked, n=3, seed=7)
    alone = [client.completions.create(**asked, seed=7 + k).choices[0].text for k in range(3)]
    assert [choice.text for choice in answer.choices] == alone and len(set(alone)) == 3


def test_a_prompt_of_token_ids_is_its_text(client: OpenAI, model: str, llm: LLM) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0}
    texts = ["The sea is", "Once upon"]
    ids = [list(llm.tokenizer.encode(text)) for text in texts]
    said = client.completions.create(**asked, prompt=texts, echo=True)
    assert [choice.text for choice in client.completions.create(**asked, prompt=ids, echo=True).choices] == [
        choice.text for choice in said.choices
    ]
    assert all(choice.text.startswith(text) for choice, text in zip(said.choices, texts, strict=True))


@pytest.mark.parametrize("tier", ["autoregressive", "premium", "turbo"])
def test_log_probabilities_are_the_targets(client: OpenAI, name: str, llm: LLM, tier: str) -> None:
    answer = client.completions.create(
        model=f"{name}:{tier}", prompt="The sea is", max_tokens=12, temperature=0, logprobs=3, echo=True
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.token_logprobs is not None
    assert found.top_logprobs is not None and found.text_offset is not None
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.token_logprobs[0] is None
    ids = llm.tokenizer.encode("".join(found.tokens))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    expected = llm.generate([Request(ids, "autoregressive", params)])[0].prompt_logprobs
    assert found.token_logprobs[1:] == pytest.approx([each.logprob for each in expected], abs=2e-3)
    if tier != "turbo":
        for top, logprob in zip(found.top_logprobs[3:], found.token_logprobs[3:], strict=True):
            assert max(top.values()) == logprob  # greedy


def test_log_probabilities_of_a_chat(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert "".join(token.token for token in found.content) == answer.choices[0].message.content
    assert all(token.top_logprobs[0].token == token.token for token in found.content)


@pytest.mark.parametrize("tier", ["speculative", "turbo"])
def test_fates_are_those_of_the_same_answer_here(client: OpenAI, name: str, llm: LLM, tier: str) -> None:
    asked: Any = {"model": f"{name}:{tier}", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    chunks = client.chat.completions.create(**asked, stream=True, extra_body={"ssv_fates": True})
    choices = [chunk.choices[0] for chunk in chunks]
    told = [entry for choice in choices for entry in (choice.model_extra or {}).get("ssv_fates", [])]
    assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == "".join(
        choice.delta.content or "" for choice in choices
    )
    ids = llm.chat_ids(MESSAGES[0]["content"])
    (output,) = llm.generate([Request(ids, tier, SamplingParams(max_tokens=40, fates=True))])
    expected = [fate_entry(fate, llm.tokenizer) for fate in output.fates]
    assert [{**entry, "risk": None} for entry in told] == [{**entry, "risk": None} for entry in expected]
    assert {"accepted", "corrected"} <= {entry["fate"] for entry in told}
    assert ("trusted" in {entry["fate"] for entry in told}) == (tier == "turbo")
    whole = client.chat.completions.create(**asked, extra_body={"ssv_fates": True}).choices[0]
    assert (whole.model_extra or {})["ssv_fates"] == told
    assert "ssv_fates" not in client.chat.completions.create(**asked).model_dump_json()


def test_the_page_is_where_the_server_says(server: Server, url: str) -> None:
    (address,) = re.findall(r"^page +(\S+)$", server.log.read_text(), re.MULTILINE)
    assert address == url.removesuffix("v1")
    with urlopen(address, timeout=SECONDS) as response:
        assert response.headers.get_content_type() == "text/html"


def test_the_terminal_explains_an_answer_of_the_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--url", server.grpc_url, "--method", "turbo", "--max-tokens", "20", "--explain", "--quiet"]
    assert generate([*command, MESSAGES[0]["content"]]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("   0  .")
    assert re.match(r"20 tokens, \d+ passes of the target: \d+ saved \(\d+%\); divergence of at most 5.0%", summary)


def test_a_chat_stream_is_the_whole_answer(client: OpenAI, name: str) -> None:
    # Not `premium`, whose passes depend on what steps cost: what is disclosed is to be the same twice.
    asked: Any = {"model": f"{name}:speculative", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *answer, last = chunks
    texts = [chunk.choices[0].delta.content for chunk in answer]
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 1  # it came in pieces: in how many, the server's speed says
    assert all(texts[1:-1])  # and none of them empty
    assert answer[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert disclosed(answer[-1]) == disclosed(whole)
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_completion_stream_is_the_whole_answer(client: OpenAI, name: str) -> None:
    asked: Any = {"model": f"{name}:turbo", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_async_client_reads_streams_side_by_side(url: str, model: str) -> None:
    async def answer(client: AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(model=model, prompt="The sea", max_tokens=16, seed=seed, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def test() -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(answer(client, seed) for seed in (1, 2, 3, 1)))

    texts = asyncio.run(test())
    assert texts[0] == texts[3]
    assert len(set(texts)) > 1  # temperature is 1 unless it is said


def test_settings_have_their_effect(client: OpenAI, model: str) -> None:
    def ask(**fields: Any) -> Any:
        return client.completions.create(**{"model": model, "prompt": "One, two, three,", "temperature": 0, **fields})

    assert ask().usage.completion_tokens == 16
    assert ask(max_tokens=5).usage.completion_tokens == 5
    text = ask(max_tokens=30).choices[0].text
    word = text.split()[3]
    stopped = ask(max_tokens=30, stop=word)
    assert stopped.choices[0].text == text[: text.index(word)]
    assert stopped.choices[0].finish_reason == "stop"
    assert ask(temperature=1.5, extra_body={"top_k": 1}, max_tokens=30).choices[0].text == text
    forced = ask(max_tokens=300, extra_body={"ignore_eos": True, "min_tokens": 300})
    assert forced.usage.completion_tokens == 300
    assert forced.choices[0].finish_reason == "length"
    cut = ask(max_tokens=1000, extra_body={"ignore_eos": True, "ssv_timeout": 0.05})
    assert cut.usage.completion_tokens < 1000
    assert cut.choices[0].finish_reason == "length"


def test_a_conversation_goes_on_and_its_beginning_is_in_the_cache(client: OpenAI, model: str) -> None:
    beginning: Any = [{"role": "system", "content": "Be brief, and say nothing twice. " * 40}, *MESSAGES]
    first = client.chat.completions.create(model=model, messages=beginning, max_tokens=16, temperature=0)
    messages = [
        *beginning,
        first.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "And why?"}]},
    ]
    second = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_options_of_a_method_change_its_draft_and_no_text(client: OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": f"{name}:eagle", "prompt": "The sea is", "max_tokens": 16, "temperature": 0}
    plain = client.completions.create(**asked)
    narrow = client.completions.create(**asked, extra_body={"ssv_policy": {"max_pending": 4, "max_depth": 2}})
    assert narrow.choices[0].text == plain.choices[0].text
    assert disclosed(narrow)["tier"] == "eagle" and disclosed(narrow)["lossless"]
    drafted = [each.model_dump()["metrics"]["speculative_decoding"]["num_draft_tokens"] for each in (narrow, plain)]
    assert 0 < drafted[0] < drafted[1]


def test_a_bound_of_divergence_chooses_the_tier(client: OpenAI, name: str) -> None:
    answer = client.completions.create(model=name, prompt="Hi", max_tokens=4, extra_body={"ssv_max_divergence": 0.0})
    assert disclosed(answer)["lossless"]
    answer = client.completions.create(model=name, prompt="Hi", max_tokens=4, extra_body={"ssv_max_divergence": 1.0})
    assert disclosed(answer)["tier"] == "turbo"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 100_000}, "max_tokens 100000 is too large: give at most"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_tokens": 5, "extra_body": {"min_tokens": 6}}, "min_tokens 6"),
        ({"prompt": "x " * 50_000}, "shorten it"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"extra_body": {"top": 5}}, "top is unknown"),
        ({"extra_body": {"ssv_tier": "turbo", "ssv_max_divergence": 0.001}}, "exceeds ssv_max_divergence"),
        ({"extra_body": {"ssv_tier": "turbo", "ssv_policy": {"beam": 2}}}, "ssv_policy: turbo is lossy"),
        ({"extra_body": {"ssv_tier": "eagle", "ssv_policy": {"max_dept": 2}}}, "use max_depth"),
    ],
)
def test_what_cannot_be_is_refused_and_says_why(
    client: OpenAI, name: str, fields: dict[str, Any], words: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError, match=re.escape(words)) as raised:
        client.completions.create(**{"model": name, "prompt": "Hi", "stream": stream, **fields})
    assert raised.value.type == "invalid_request_error"
    # Neither Triton's words nor a status of gRPC's come before it.
    assert not re.search(r"ensemble|request id|INVALID", raised.value.message)


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_is_exceeded_has_its_code(client: OpenAI, model: str, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(BadRequestError, match="maximum context length is") as raised:
        client.chat.completions.create(model=model, messages=messages, stream=stream)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")


def test_requests_answered_and_refused_are_found_in_the_log_by_their_id(
    server: Server, client: OpenAI, name: str
) -> None:
    def ask(id: str, **fields: Any) -> str:
        model_of_tier = f"{name}:premium"
        asked = {"model": model_of_tier, "messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 4, **fields}
        try:
            create = client.chat.completions.with_raw_response.create
            return str(create(**asked, extra_headers={"X-Request-Id": id}).headers["x-request-id"])
        except APIStatusError as error:
            return str(error.response.headers["x-request-id"])

    given: dict[str, dict[str, Any]] = {
        "test-answered": {},
        "test-refused-here": {"extra_body": {"best_of": 2}},
        "test-refused-there": {"max_tokens": 5000},
    }
    assert [ask(id, **fields) for id, fields in given.items()] == list(given)
    found: dict[str, dict[str, Any]] = {}

    def logged() -> bool:
        for line in server.log.read_text(errors="replace").splitlines():
            if line.startswith("{") and (fields := json.loads(line)).get("id") in given:
                found[f"{fields['event']} {fields['id']}"] = fields
        return {f"access {id}" for id in given} | {"request test-answered"} <= found.keys()

    wait_until(logged, "all have their lines")
    answered = found["access test-answered"]
    assert (answered["status"], answered["tier"], answered["output_tokens"]) == (200, "premium", 4)
    assert 0 < answered["first_token_s"] <= answered["total_s"]
    assert [found[f"access {id}"]["status"] for id in given] == [200, 400, 400]
    assert "xyzzy" not in repr(found)


def test_a_body_too_large_is_413(client: OpenAI, model: str) -> None:
    with pytest.raises(APIStatusError) as raised:
        client.completions.create(model=model, prompt="x" * 3_000_000)
    assert raised.value.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: Server, url: str, model: str, stream: bool) -> None:
    cancelled = metric(server, 'ssv_requests{reason="cancelled"')
    address = urlsplit(url)
    body = {"model": model, "prompt": "Hi", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=SECONDS) as connection:
        connection.sendall(head.encode() + content)
        if stream:
            assert b"200 OK" in connection.recv(1 << 16)
        else:
            wait_until(lambda: metric(server, "ssv_requests_decoding") > 0, "it decodes")
    wait_until(lambda: metric(server, 'ssv_requests{reason="cancelled"') == cancelled + 1, "it is cancelled")
    wait_until(lambda: metric(server, "ssv_requests_decoding") == 0, "the row is free")


def test_a_full_queue_is_503_and_tells_when_to_come_again(server: Server, client: OpenAI, model: str) -> None:
    with full(server), pytest.raises(InternalServerError) as raised:
        client.completions.create(model=model, prompt="Hi", max_tokens=2)
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"] == "1"
    assert raised.value.type == "server_error"
    wait_until(lambda: metric(server, "ssv_requests_decoding") == 0, "all have left")


def test_texts_are_tokenized_as_the_server_does(client: OpenAI, url: str, llm: LLM) -> None:
    root = url.removesuffix("/v1")
    ids = list(llm.tokenizer.encode("The sea is wide."))
    found = client.post(f"{root}/tokenize", body={"prompt": "The sea is wide."}, cast_to=object)
    assert isinstance(found, dict) and (found["tokens"], found["max_model_len"]) == (ids, 2048)
    assert client.post(f"{root}/detokenize", body={"tokens": ids}, cast_to=object) == {"prompt": "The sea is wide."}
    found = client.post(f"{root}/tokenize", body={"messages": MESSAGES}, cast_to=object)
    assert isinstance(found, dict) and found["tokens"] == list(llm.chat_ids(MESSAGES[0]["content"]))
    with urlopen(f"{root}/metrics", timeout=SECONDS) as response:
        assert b"ssv_target_passes" in response.read()


def test_a_key_is_asked_for(another_server: Callable[..., AbstractContextManager[Server]], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    with another_server("--api-key-file", str(keys), "--allowed-origins", "https://a.example", "--no-page") as started:
        base_url = started.openai_url
        assert not re.search("^page ", started.log.read_text(), re.MULTILINE)
        wait_until(lambda: health(base_url) == 200, "it answers without a key")
        with OpenAI(base_url=base_url, api_key="two", max_retries=0) as known:
            assert len(list(known.models.list())) > 1
        unknown = OpenAI(base_url=base_url, api_key="three", max_retries=0)
        with unknown, pytest.raises(AuthenticationError):
            unknown.models.list()
        with pytest.raises(HTTPError, match="401"):  # as for all that is not there
            urlopen(base_url.removesuffix("v1"))


def test_conversations_go_through_the_template_of_a_file(
    another_server: Callable[..., AbstractContextManager[Server]], bundle: Path, llm: LLM, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\nIn {{ place | default('Rome') }}: "
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = BundleTokenizer.load(bundle, chat_template=path)
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "Light"}]
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (MESSAGES, {}, {}),
        (MESSAGES, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (MESSAGES, {"chat_template_kwargs": {"place": "Oslo"}}, {"variables": {"place": "Oslo"}}),
        (begun, {"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
    ]
    expected = [tokenizer.chat_ids(said, **options) for said, _, options in cases]
    assert len({*expected, tuple(llm.chat_ids(MESSAGES[0]["content"]))}) == len(cases) + 1
    with another_server("--chat-template", str(path)) as started:
        path.write_text("What was read before the start is used.")
        url = started.openai_url
        wait_until(lambda: health(url) == 200, "it answers")
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600.0) as client:
            name = next(iter(client.models.list())).id
            for (said, fields, _), ids in zip(cases, expected, strict=True):
                body = {"messages": said, **fields}
                found: Any = client.post(f"{url.removesuffix('/v1')}/tokenize", body=body, cast_to=object)
                assert tuple(found["tokens"]) == ids
                asked: Any = {"model": name, "temperature": 0, "max_tokens": 8, "extra_body": fields}
                answer = client.chat.completions.create(messages=said, **asked)
                assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
                raw: Any = {"model": name, "temperature": 0, "max_tokens": 8, "prompt": list(ids)}
                assert answer.choices[0].message.content == client.completions.create(**raw).choices[0].text


def health(url: str) -> int:
    try:
        with urlopen(f"{url.removesuffix('/v1')}/health", timeout=SECONDS) as response:
            return int(response.status)
    except OSError:
        return 0
