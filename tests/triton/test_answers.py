"""Answers of the server: those that the same requests have in this process, whatever else runs beside them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from triton_asks import Stream, is_final, tensor, value

from ssv.client.triton import Client, Reply, Settings
from ssv.runtime.llm import LLM
from ssv.runtime.methods import METHODS, policy_for, with_options
from ssv.runtime.request import Output, Request, SamplingParams

LOSSLESS = tuple(method for method in METHODS if method not in ("medusa-typical", "balanced", "turbo"))

PAYING = ("prompt-lookup", "suffix", "premium")
"""What these draft follows what steps cost, which each process measures for itself. It changes no token."""
QUESTION = "Explain how rainbows form."


class Server(Protocol):
    grpc_url: str
    grpc_address: str


@dataclass(frozen=True, slots=True)
class Case:
    """A request, as both sides are asked."""

    prompt: str
    method: str = "premium"
    chat: bool = True
    max_tokens: int = 40
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos")
        return {name: getattr(self, name) for name in names}

    def here(self, llm: LLM) -> Output:
        ids = llm.chat_ids(self.prompt) if self.chat else llm.tokenizer.encode(self.prompt)
        return llm.generate([Request(ids, self.method, SamplingParams(**self.sampling))])[0]

    def there(self, server: Server, stream: bool = True) -> list[Reply]:
        settings = Settings(tier=self.method, chat=self.chat, **self.sampling)
        with Client(server.grpc_url) as client:
            return list(client.stream(self.prompt, settings, stream=stream))


def text_of(replies: list[Reply]) -> str:
    return "".join(reply.text for reply in replies)


def assert_same(replies: list[Reply], expected: Output, case: Case, alone: bool = True) -> None:
    """Compares what a server said with what was expected.

    Args:
        alone: whether no other request ran: lossless ones draft less in company, which changes no token either.
    """
    last, counters = replies[-1], expected.counters
    assert text_of(replies) == expected.text, case
    assert last.finish_reason == expected.finish_reason
    assert sum(reply.num_output_tokens for reply in replies) == len(expected.token_ids)
    assert {reply.num_input_tokens for reply in replies} == {counters.prompt_tokens}
    assert {reply.tier for reply in replies} == {case.method}
    is_lossless = case.method in LOSSLESS or (case.method == "medusa-typical" and case.temperature == 0)
    assert {reply.lossless for reply in replies} == {is_lossless}
    found = (last.judged, last.accepted, last.unverified, last.target_passes)
    if case.method not in PAYING and (alone or case.method not in LOSSLESS):
        assert found == (counters.judged, counters.accepted, counters.trusted, counters.target_passes)
    else:
        assert last.unverified == 0 and last.accepted <= last.judged


@pytest.mark.parametrize("method", METHODS)
def test_alone(server: Server, llm: LLM, method: str) -> None:
    case = Case(QUESTION, method)
    assert_same(case.there(server), case.here(llm), case)


@pytest.mark.parametrize("method", METHODS)
def test_sampled_with_a_seed(server: Server, llm: LLM, method: str) -> None:
    case = Case(QUESTION, method, temperature=0.8, top_k=50, top_p=0.9, seed=2**64 - 3)
    assert_same(case.there(server), case.here(llm), case)


def test_eight_different_requests_at_a_time(server: Server, llm: LLM) -> None:
    cases = [
        Case(QUESTION, "premium"),
        Case("Name three colours.", "balanced"),
        Case("Write a short poem about the sea.", "turbo", temperature=0.7, seed=1),
        Case("The capital of France is", "autoregressive", chat=False, ignore_eos=True),
        Case("What is 2 + 2?", "speculative"),
        Case("Tell me about Rome.", "premium", temperature=1.0, top_p=0.8, seed=2),
        Case("Once upon a time", "turbo", chat=False, max_tokens=25),
        Case("List the planets.", "balanced", stop=("Mars",)),
    ]
    expected = [case.here(llm) for case in cases]
    found: dict[int, list[Reply]] = {}
    threads = [
        threading.Thread(target=lambda i=i, case=case: found.update({i: case.there(server)}))
        for i, case in enumerate(cases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(cases)
    for i, case in enumerate(cases):
        assert_same(found[i], expected[i], case, alone=False)


def test_stop_string_across_chunks(server: Server, llm: LLM) -> None:
    """The stop string has at least two tokens, and none of it leaves."""
    whole = Case(QUESTION, max_tokens=60).here(llm).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 14]
    case = Case(QUESTION, max_tokens=60, stop=(stop, "never said"))
    assert len(llm.tokenizer.encode(stop)) > 1
    replies = case.there(server)
    assert text_of(replies) == whole[: whole.index(stop)]
    assert_same(replies, case.here(llm), case)
    assert replies[-1].finish_reason == "stop"


@pytest.mark.parametrize("method", ["premium", "turbo"])
@pytest.mark.parametrize("prompt", ["😀🎉🚀 " * 12, "今天天气很好。" * 12])
def test_characters_are_never_halved(server: Server, llm: LLM, prompt: str, method: str) -> None:
    case = Case(prompt, method, chat=False, max_tokens=60, temperature=0.6, seed=9, ignore_eos=True)
    expected = case.here(llm)
    replies = case.there(server)
    assert_same(replies, expected, case)
    wide = [character for character in expected.text if ord(character) > 0x2000 and character != "\ufffd"]
    assert len(wide) > 10, "the output has to be what this test is about"
    assert any(not reply.text and reply.num_output_tokens for reply in replies) or len(replies) < len(
        expected.token_ids
    )
    # What the model itself never completes is all that may be shown as broken.
    assert text_of(replies).count("\ufffd") == expected.text.count("\ufffd")
    assert sum("\ufffd" in reply.text for reply in replies[:-1]) <= expected.text.count("\ufffd")


def test_without_a_stream_there_is_one_response(server: Server, llm: LLM) -> None:
    """Also when it takes long enough for the server to ask whether anybody waits."""
    case = Case(QUESTION, "autoregressive", max_tokens=100, ignore_eos=True)
    replies = case.there(server, stream=False)
    assert len(replies) == 1
    assert_same(replies, case.here(llm), case)
    with Stream(server.grpc_address) as stream:
        stream.send(
            tensor("text_input", "BYTES", QUESTION),
            tensor("max_tokens", "INT32", 100),
            tensor("ignore_eos", "BOOL", True),
            enable_empty_final_response=True,
        )
        assert is_final(only := stream.next())
        assert value(only, "finish_reason") == "length"
        assert stream.is_silent()


def test_finish_reasons(server: Server) -> None:
    def reason(case: Case) -> str:
        return case.there(server)[-1].finish_reason

    assert reason(Case("Say yes.", max_tokens=3, ignore_eos=True)) == "length"
    assert reason(Case("What is 2 + 2? Answer with a number.", max_tokens=200)) == "stop"
    assert reason(Case(QUESTION, stop=("a",))) == "stop"


def test_a_long_prompt_is_found_again(server: Server, llm: LLM) -> None:
    case = Case("The rain in Spain stays mainly in the plain, they say. " * 20, "premium", max_tokens=20)
    expected = case.here(llm)
    first, second = case.there(server), case.there(server)
    assert_same(first, expected, case)
    assert_same(second, expected, case)
    assert second[-1].cached_tokens == (second[-1].num_input_tokens - 1) // llm.prefill_chunk * llm.prefill_chunk


def test_timeout(server: Server) -> None:
    """So short that a thousand tokens take longer anywhere; before the first one it may end as well."""
    settings = Settings(tier="autoregressive", max_tokens=1000, ignore_eos=True, timeout=0.05)
    with Client(server.grpc_url) as client:
        replies = list(client.stream(QUESTION, settings))
    assert replies[-1].finish_reason == "deadline"
    assert sum(reply.num_output_tokens for reply in replies) < 1000


def test_messages(server: Server, llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And fire?"},
    ]
    expected = llm.generate([Request(llm.tokenizer.chat_ids(messages), "premium", SamplingParams(max_tokens=20))])[0]
    with Client(server.grpc_url) as client:
        replies = list(client.stream(messages, Settings(max_tokens=20)))
    assert text_of(replies) == expected.text


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eagle", {"max_pending": 12, "children": [3], "beam": 3, "max_depth": 4}),
        ("speculative", {"max_pending": 2}),
        ("lookahead", {"beam": 3, "max_depth": 2, "children": [2], "max_pending": 9}),
        ("prompt-lookup", {"shortest_match": 2, "longest_match": 5, "pays": False}),
        ("suffix", {"longest_match": 2, "min_probability": 0.6, "pays": False}),
        ("premium", {"children": [40], "beam": 64, "max_pending": 64, "pays": False}),
    ],
)
def test_options_of_a_method(
    server: Server, llm: LLM, method: str, options: dict[str, Any], temperature: float
) -> None:
    """They change what is drafted as they do in this process, and no text."""
    case = Case(QUESTION, method, max_tokens=32, temperature=temperature, seed=3)
    policy = with_options(method, policy_for(method, llm.tiers), options)
    here = llm.generate([Request(llm.chat_ids(QUESTION), method, SamplingParams(**case.sampling), policy=policy)])[0]
    with Client(server.grpc_url) as client:
        replies = list(client.stream(QUESTION, Settings(tier=method, policy=options, **case.sampling)))
    assert (
        text_of(replies)
        == here.text
        == Case(QUESTION, "autoregressive", max_tokens=32, temperature=temperature, seed=3).here(llm).text
    )
    assert (replies[-1].tier, replies[-1].lossless) == (method, True)
    assert replies[-1].drafted == here.counters.drafted != case.here(llm).counters.drafted


def test_loosest_tier_within_a_bound(server: Server) -> None:
    with Client(server.grpc_url) as client:
        none = list(client.stream(QUESTION, Settings(max_tokens=4, max_divergence=0.0)))
        any_ = list(client.stream(QUESTION, Settings(max_tokens=4, max_divergence=1.0)))
    assert (none[-1].tier, none[-1].lossless) == ("premium", True)
    assert (any_[-1].tier, any_[-1].lossless) == ("turbo", False)
