"""What requests change of their logits is part of the target's choice: with every lossless method the text of plain
decoding, which is what a few lines of Python make of the same logits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from changed_logits import LOSSLESS, asked, make_llm, random_params
from drive import run, text_of
from torch import Tensor

from fakes import EOS, VOCAB_SIZE, FakeTarget, FakeTokenizer
from ssv.plugins.reference import gumbel
from ssv.runtime.decode.logits_processor import Columns, Edit, LogitsProcessor, processed, processor_of
from ssv.runtime.request import Request, RequestError, SamplingParams

SUBSET = [3, 0, 11, 6, 2, 9, 5]


def plainly(logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """The changed logits, one token after another."""
    found = []
    for token, logit in enumerate(np.float32(logits_V.numpy())):
        x = logit + np.float32(dict(params.logit_bias).get(token, 0.0))
        if token in prompt or token in output:
            x = x / np.float32(params.repetition_penalty) if x > 0 else x * np.float32(params.repetition_penalty)
        if token in output:
            count = np.float32(output.count(token))
            x -= np.float32(params.frequency_penalty) * count + np.float32(params.presence_penalty)
        found.append(float(x))
    banned = {
        ids[-1]
        for ids in params.bad_token_ids
        if len(ids) == 1 or (len(output) >= len(ids) - 1 and tuple(output[1 - len(ids) :]) == ids[:-1])
    }
    if len(output) < params.min_tokens:
        banned |= {EOS, *params.stop_token_ids}
    if len(banned) < len(found):
        found = [-math.inf if token in banned else x for token, x in enumerate(found)]
    if params.min_p and not params.greedy:
        least = max(found) + float(np.float32(params.temperature * math.log(params.min_p)))
        found = [x if x >= np.float32(least) else -math.inf for x in found]
    return found


def reference(target: FakeTarget, prompt: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], str]:
    """Plain decoding without a cache, without top-k and top-p."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        x = torch.tensor(plainly(target.next_logits([*prompt, *output]), params, prompt, output), dtype=torch.float64)
        if not params.greedy:
            place = torch.tensor(len(prompt) + len(output))
            x = x / params.temperature + gumbel(torch.arange(VOCAB_SIZE), place, torch.tensor(params.seed))
        output.append(int(x.argmax()))
        if (output[-1] == EOS and not params.ignore_eos) or output[-1] in params.stop_token_ids:
            return tuple(output), "stop"
    return tuple(output), "length"


# --- methods --------------------------------------------------------------------------------------------------------


def differing(seed: int, count: int) -> list[Request]:
    """Requests whose text is not that of plain decoding, of lossless methods side by side with a lossy one."""
    rng = random.Random(seed)
    options = {"seed": seed, "token_ids": SUBSET if seed % 3 == 2 else None}
    given = asked(rng, count)
    plain = run(make_llm(**options), [Request(ids, "autoregressive", params) for ids, params in given])
    llm = make_llm(**options)
    found = []
    for method in LOSSLESS:
        requests = [Request(ids, "turbo" if i % 5 == 4 else method, params) for i, (ids, params) in enumerate(given)]
        for request, output, expected in zip(requests, run(llm, requests), plain, strict=True):
            if request.method != "turbo" and text_of(output) != text_of(expected):
                found.append(request)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_lossless_methods_give_the_text_of_plain_decoding(seed: int) -> None:
    assert not differing(seed, 15)


@pytest.mark.parametrize("seed", range(3))
def test_plain_decoding_is_what_the_settings_say(seed: int) -> None:
    llm = make_llm(seed=seed)
    assert isinstance(llm.target, FakeTarget)
    given = [(ids, replace(params, top_k=0, top_p=1.0)) for ids, params in asked(random.Random(seed + 50), 40)]
    outputs = run(llm, [Request(ids, "autoregressive", params) for ids, params in given])
    for (ids, params), output in zip(given, outputs, strict=True):
        assert (output.token_ids, output.finish_reason) == reference(llm.target, ids, params), params


def test_a_path_that_is_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a node of a tree the text is that of its path: without it some texts are others."""
    edit = LogitsProcessor.edit
    monkeypatch.setattr(
        LogitsProcessor, "edit", lambda self, tokens, path, num_output: edit(self, tokens, (), num_output)
    )
    assert any(differing(seed, 15) for seed in range(3))


@pytest.mark.parametrize("method", ["premium", "speculative", "eagle"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_of_the_same_logits_is_always_right(method: str, temperature: float) -> None:
    """The draft's logits are changed like the target's."""
    llm = make_llm(agreement=1.0, noise=0.0, conditioned=False, heads=False)
    params = SamplingParams(
        temperature=temperature,
        seed=3,
        min_p=0.02,
        repetition_penalty=1.5,
        presence_penalty=0.9,
        frequency_penalty=0.6,
        logit_bias=((4, 1.0),),
        bad_token_ids=((2,), (5, 6)),
        max_tokens=30,
        ignore_eos=True,
    )
    for seed in range(4):
        counters = run(llm, [Request((1, seed, 7), method, params)])[0].counters
        passes = [kept for kept, times in counters.passes_by_kept.items() for _ in range(times)]
        assert counters.drafted and min(sorted(passes)[1:]) > 0, passes


def test_a_lossy_tier_keeps_to_what_may_be_chosen() -> None:
    llm = make_llm(heads=False, agreement=0.9)
    params = SamplingParams(bad_token_ids=((2,), (5, 6)), logit_bias=((9, -100.0),), max_tokens=40, ignore_eos=True)
    outputs = run(llm, [Request((1, seed), "turbo", params) for seed in range(12)])
    assert sum(output.counters.trusted for output in outputs)
    for output in outputs:
        pairs = zip(output.token_ids, output.token_ids[1:], strict=False)
        assert not {2, 9} & set(output.token_ids) and (5, 6) not in pairs


def test_stop_tokens_end_the_output_and_are_no_text() -> None:
    llm = make_llm()
    free = run(llm, [Request((1, 2), "premium", SamplingParams(max_tokens=20, ignore_eos=True))])[0]
    stop = next(token for token in free.token_ids[2:] if token not in free.token_ids[:2])
    end = free.token_ids.index(stop)
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    for method in (*LOSSLESS, "autoregressive"):
        output = run(llm, [Request((1, 2), method, params)])[0]
        assert (output.token_ids, output.finish_reason) == (free.token_ids[: end + 1], "stop")
        assert output.text == FakeTokenizer().decode(free.token_ids[:end])


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ids", [None, SUBSET], ids=["whole_head", "subset_head"])
def test_logits_are_changed_as_in_plain_python(seed: int, ids: list[int] | None) -> None:
    """Of a text that grows, with and without a path behind it, and of rows that change nothing beside them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    columns = Columns(None if ids is None else torch.tensor(ids))
    for _ in range(30):
        params = replace(random_params(rng), min_tokens=0)
        prompt = rng.choices(range(VOCAB_SIZE), k=4)
        processor, output, edits, expected = LogitsProcessor(params, prompt, [EOS]), list[int](), [], []
        logits_RV = torch.randn(8, VOCAB_SIZE, generator=generator) * 3
        for logits_V in logits_RV:
            path = rng.choices(range(VOCAB_SIZE), k=rng.choice([0, 1, 3]))
            edit = processor.edit([*prompt, *output], path, len(output) + len(path)) if rng.random() < 0.9 else None
            whole = [*output, *path]
            expected.append(logits_V.tolist() if edit is None else plainly(logits_V, params, prompt, whole))
            edits.append(edit)
            output += rng.choices(range(VOCAB_SIZE), k=rng.choice([0, 1, 2]))
        if ids is not None:
            if params.min_p or len({t for s in params.bad_token_ids if len(s) == 1 for t in s} & set(ids)) == len(ids):
                continue  # what is left out depends on the columns that there are
            logits_RV = logits_RV[:, ids].contiguous()
            expected = [[row[token] for token in ids] for row in expected]
        before = logits_RV.clone()
        assert torch.equal(processed(logits_RV, edits, columns), torch.tensor(expected, dtype=torch.float32))
        assert torch.equal(logits_RV, before)


def test_where_nothing_would_be_left_a_choice_remains() -> None:
    logits_RV = torch.tensor([[1.0, 3.0, 2.0]])
    banned = LogitsProcessor(SamplingParams(bad_token_ids=((0,), (1,), (2,))), [0], []).edit([0], (), 0)
    assert torch.equal(processed(logits_RV, [banned], Columns()), logits_RV)


def test_what_changes_nothing_costs_nothing() -> None:
    assert processor_of(SamplingParams(temperature=1.0, top_p=0.9, stop_token_ids=(3,)), [1], [EOS]) is None
    logits_RV = torch.zeros(2, 3)
    edits: list[Edit | None] = [None, None]
    assert processed(logits_RV, edits, Columns()) is logits_RV
    late = LogitsProcessor(SamplingParams(min_tokens=2), [1], [EOS])
    assert late.edit([1, 5, 6], (), 2) is None and late.edit([1, 5], (), 1) is not None
    assert late.is_idle(2) and not late.is_idle(1)
    assert not LogitsProcessor(SamplingParams(presence_penalty=1.0), [1], [EOS]).is_idle(9)


@pytest.mark.parametrize(
    "settings", [{"stop_token_ids": (12,)}, {"logit_bias": ((99, 1.0),)}, {"bad_token_ids": ((1, -1),)}], ids=repr
)
def test_tokens_outside_the_vocabulary(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary of 12"):
        make_llm().generate([Request((1,), "premium", SamplingParams(**settings))])
