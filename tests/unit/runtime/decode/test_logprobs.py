"""Log-probabilities are the target's, of every token, whatever was drafted, trusted or changed by the request."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from changed_logits import LOSSLESS, asked, make_llm
from drive import run

from fakes import VOCAB_SIZE, FakeTarget
from ssv.runtime.decode.logprobs import MIN_LOGPROB, logprobs_of
from ssv.runtime.llm import LLM
from ssv.runtime.request import Output, Request, SamplingParams, TokenLogprobs


def check(llm: LLM, prompt: Sequence[int], output: Output, num_top: int) -> None:
    assert isinstance(llm.target, FakeTarget)
    assert len(output.logprobs) == len(output.token_ids)
    for i, (token, found) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        expected_V = llm.target.next_logits([*prompt, *output.token_ids[:i]]).log_softmax(dim=0)
        assert found.token == token
        assert math.isclose(found.logprob, float(expected_V[token]), abs_tol=1e-5)
        order = expected_V.argsort(descending=True)[:num_top].tolist()
        assert [each for each, _ in found.top] == order
        assert all(math.isclose(logprob, float(expected_V[each]), abs_tol=1e-5) for each, logprob in found.top)


@pytest.mark.parametrize("seed", range(3))
def test_every_token_has_the_targets(seed: int) -> None:
    """Of lossless and lossy tiers in one batch, among requests that ask for none."""
    rng, llm = random.Random(seed), make_llm(seed=seed)
    given = [(ids, replace(params, logprobs=rng.choice([0, 3]))) for ids, params in asked(rng, 20)]
    methods = [rng.choice([*LOSSLESS, "turbo", "turbo", "autoregressive"]) for _ in given]
    requests = [Request(ids, method, params) for (ids, params), method in zip(given, methods, strict=True)]
    others = [replace(each, params=replace(each.params, logprobs=None)) for each in requests]
    outputs = run(llm, [each for pair in zip(requests, others, strict=True) for each in pair])
    for (ids, params), output, other in zip(given, outputs[::2], outputs[1::2], strict=True):
        check(llm, ids, output, params.logprobs or 0)
        assert (output.token_ids, output.text) == (other.token_ids, other.text)
        assert not other.logprobs and not output.prompt_logprobs


def test_tokens_that_are_trusted_have_theirs() -> None:
    llm = make_llm(heads=False, agreement=0.9)
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2)
    outputs = run(llm, [Request((1, seed), "turbo", params) for seed in range(6)])
    assert sum(output.counters.trusted for output in outputs)
    for seed, output in enumerate(outputs):
        check(llm, (1, seed), output, 2)


@pytest.mark.parametrize("method", ["autoregressive", "premium", "turbo", "medusa"])
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_prompts_have_theirs(method: str, length: int) -> None:
    """Of prompts of one chunk and of several; a chunk has four tokens."""
    llm = make_llm(seed=1)
    assert isinstance(llm.target, FakeTarget)
    prompt = tuple(i * 5 % VOCAB_SIZE for i in range(length))
    plain, output = run(
        llm, [Request(prompt, method, SamplingParams(max_tokens=9, prompt_logprobs=each)) for each in (None, 2)]
    )
    assert output.token_ids == plain.token_ids
    assert [each.token for each in output.prompt_logprobs] == list(prompt[1:])
    for i, found in enumerate(output.prompt_logprobs):
        expected_V = llm.target.next_logits(prompt[: i + 1]).log_softmax(dim=0)
        assert math.isclose(found.logprob, float(expected_V[found.token]), abs_tol=1e-5)
        assert [each for each, _ in found.top] == expected_V.argsort(descending=True)[:2].tolist()


def test_prompts_that_are_known_are_run_again_for_them() -> None:
    llm = make_llm()
    loop = llm.loop(prompt_cache_bytes=1 << 20)
    prompt = tuple(range(9))
    for index, num_top in enumerate([None, None, 0]):
        request = Request(prompt, "premium", SamplingParams(max_tokens=2, prompt_logprobs=num_top))
        loop.submit(index, request, llm.tiers["premium"], None)
        chunks = []
        while loop.has_work:
            chunks += loop.step()
        assert bool(chunks[-1].counters.cached_tokens) == (index == 1)
        assert sum(len(chunk.prompt_logprobs) for chunk in chunks) == (8 if index == 2 else 0)


def test_what_cannot_be_is_a_number_that_json_has() -> None:
    found = logprobs_of(torch.tensor([0.0, -torch.inf, 0.0]), 1, 3)
    half = math.log(0.5)
    assert found.token == 1 and found.logprob == MIN_LOGPROB
    assert sorted(found.top)[1] == (1, MIN_LOGPROB)
    assert all(math.isclose(logprob, half) for token, logprob in found.top if token != 1)
    assert isinstance(found, TokenLogprobs)
