"""Outputs of a given form: always valid where they end by themselves, and with every lossless method those of plain
decoding under the same masks."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from changed_logits import LOSSLESS, TRUSTING_TREE, make_llm, random_params
from drive import run, text_of
from lettered import NUM_TOKENS, lettered

from ssv.runtime.counters import Counters
from ssv.runtime.decode.choice import choices, ranking
from ssv.runtime.decode.logits_processor import Columns, processed
from ssv.runtime.decode.round import MIN_JUMP, DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import Sampling, choose, ranked
from ssv.runtime.grammar import Grammars, GrammarState, grammar_of
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_for
from ssv.runtime.request import Request, RequestError, SamplingParams

FORMS: dict[str, tuple[str, str]] = {
    "object": ("json", ""),
    "schema": (
        "json_schema",
        '{"type": "object", "properties": {"abc": {"enum": [0, 1, "a"]}, "b": {"type": "array", "maxItems": 2, '
        '"items": {"enum": ["ab", "c"]}}}, "required": ["abc", "b"], "additionalProperties": false}',
    ),
    "regex": ("regex", "(ab|c){2,5}[01]{1,3}"),
    "nested": ("ebnf_grammar", 'root ::= "a" root "b" | "c"'),
    "choice": ("choice", '["abab", "abc", "cab01"]'),
}
NUM_ROWS = 60
HALF = [0, 3, 5, 7, 9, 10, 11, 13, 14, 16]


def lettered_llm(seed: int, **options: Any) -> LLM:
    return make_llm(seed=seed, tokenizer=lettered(), vocab_size=NUM_TOKENS, **options)


def is_valid(form: str, text: str) -> bool:
    if form in ("object", "schema"):
        found = json.loads(text)
        return isinstance(found, dict) and (form == "object" or (found["abc"] in (0, 1, "a") and len(found["b"]) <= 2))
    if form == "nested":
        return re.fullmatch("a*cb*", text) is not None and text.count("a") == text.count("b")
    if form == "regex":
        return re.fullmatch(FORMS["regex"][1], text) is not None
    return text in json.loads(FORMS["choice"][1])


def requests_of(form: str, rng: random.Random, count: int) -> list[Request]:
    """With settings that change logits as well, some with none, and some that have no form beside them."""
    found = []
    for i in range(count):
        params = replace(random_params(rng), ignore_eos=False, stop_token_ids=(), max_tokens=40)
        if i % 4 == 1:
            params = SamplingParams(temperature=(0.0, 0.9)[i // 4 % 2], seed=i, max_tokens=40)
        params = params if i % 4 == 3 else replace(params, grammar=grammar_of(*FORMS[form]))
        found.append(Request(tuple(rng.randrange(NUM_TOKENS) for _ in range(4)), "autoregressive", params))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [False, True], ids=["whole_head", "half_head"])
def test_every_method_gives_the_text_of_plain_decoding(form: str, half: bool) -> None:
    """Also where the draft's head has no token that may come next."""
    rng, ended = random.Random(f"{form} {half}"), 0
    options: dict[str, Any] = {"seed": rng.randrange(100), "token_ids": HALF if half else None}
    plain_requests = requests_of(form, rng, 12)
    plain = run(lettered_llm(**options), plain_requests)
    llm = lettered_llm(**options)
    for method in (*LOSSLESS, "turbo"):
        outputs = run(llm, [replace(request, method=method) for request in plain_requests])
        for request, output, expected in zip(plain_requests, outputs, plain, strict=True):
            if method != "turbo":
                assert text_of(output) == text_of(expected), (method, request)
            if request.params.grammar is not None and output.finish_reason == "stop":
                assert is_valid(form, output.text), (method, output.text)
                ended += 1
    assert ended > 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [False, True], ids=["whole_head", "half_head"])
def test_trees_that_trust_keep_the_form(form: str, half: bool) -> None:
    rng = random.Random(f"{form} {half}")
    llm = lettered_llm(rng.randrange(100), token_ids=HALF if half else None, turbo=TRUSTING_TREE)
    requests = [replace(request, method="turbo") for request in requests_of(form, rng, 24)]
    masked = [
        output
        for request, output in zip(requests, run(llm, requests), strict=True)
        if request.params.grammar is not None
    ]
    assert all(is_valid(form, output.text) for output in masked if output.finish_reason == "stop")
    assert any(output.finish_reason == "stop" for output in masked)
    counters = [output.counters for output in masked]
    assert sum(each.trusted for each in counters) > 0
    assert half or sum(each.drafted - each.accepted - each.trusted for each in counters) > 0


def test_a_mask_that_forgets_the_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = GrammarState.allowed
    monkeypatch.setattr(GrammarState, "allowed", lambda self, output, path: allowed(self, output, ()))
    with pytest.raises(AssertionError):
        test_every_method_gives_the_text_of_plain_decoding("schema", False)


def test_a_choice_that_forgets_the_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    accepts = GrammarState.accepts
    monkeypatch.setattr(GrammarState, "accepts", lambda self, output, path, token: accepts(self, output, (), token))
    with pytest.raises(AssertionError):
        test_every_method_gives_the_text_of_plain_decoding("schema", False)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", ["autoregressive", "premium", "prompt-lookup"])
def test_where_the_choice_is_allowed_no_mask_is_made(
    monkeypatch: pytest.MonkeyPatch, method: str, temperature: float
) -> None:
    """And the text is the one without a form."""
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=5)
    (expected,) = run(lettered_llm(3), [Request((1, 2, 3), method, params)])
    monkeypatch.delattr(GrammarState, "allowed")
    masked = replace(params, grammar=grammar_of("regex", "(?s:.*)"))
    (output,) = run(lettered_llm(3), [Request((1, 2, 3), method, masked)])
    assert text_of(output) == text_of(expected) and output.token_ids


@pytest.mark.parametrize("seed", range(8))
def test_choices_and_rankings_are_those_of_masked_logits(seed: int) -> None:
    """Whatever else changes the logits, with top-k and top-p, and where the unmasked choice is or is not allowed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    llm, grammar = lettered_llm(0), grammar_of("regex", "[abc01]*")
    batch = DecodeBatch(llm.target, None, [0], 64, grammars=llm.grammars)
    rows = []
    for i in range(NUM_ROWS):
        params = replace(random_params(rng), min_p=0.0, ignore_eos=False, stop_token_ids=())
        if i % 4:
            params = SamplingParams(temperature=(0.0, 1.5)[i % 2], top_k=(0, 9)[i // 3 % 2], seed=i)
        row = Row(
            replace(params, grammar=grammar),
            policy_for("autoregressive", {}),
            lambda _: False,
            Counters(prompt_tokens=2),
            [1, 2],
        )
        row.processor = batch.members.processor(row.params, row.tokens)
        rows.append(row)
    logits_RV = torch.randn(NUM_ROWS, NUM_TOKENS, generator=generator)
    at = [(b, 0) for b in range(NUM_ROWS)]
    edits = [row.processor.edit(row.tokens, (), 0) for row in rows if row.processor is not None]
    masked_RV = processed(logits_RV, edits, Columns())
    sampling = Sampling.of([row.params for row in rows], [2] * NUM_ROWS)
    assert choices(rows, logits_RV, at, Columns()) == choose(masked_RV, sampling).tolist()
    found = [tokens for tokens, _ in ranking(rows, logits_RV, at, Columns(), 3)]
    assert found == [[t for t in tokens if t >= 0] for tokens in ranked(masked_RV, sampling, 3)[0].tolist()]
    assert len({token in (0, *lettered().inner.encode("abc01")) for token in logits_RV.argmax(dim=1).tolist()}) == 2


def test_what_has_no_choice_is_drafted_without_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is always kept."""
    jumps: list[int] = []
    jump = DecodeBatch._jump

    def noted(self: DecodeBatch, row: Any, limit: int) -> bool:
        if jumped := jump(self, row, limit):
            jumps.append(len(row.tree))
        return jumped

    monkeypatch.setattr(DecodeBatch, "_jump", noted)
    params = SamplingParams(grammar=grammar_of("choice", '["abc01abc01abc01", "b"]'), logit_bias=((11, 9.0),))
    outputs = {}
    for method in ("autoregressive", "prompt-lookup", "premium", "turbo"):
        jumps.clear()
        output = run(lettered_llm(3), [Request((1, 2, 3), method, replace(params, max_tokens=30))])[0]
        outputs[method] = output.text
        assert bool(jumps) == (method != "autoregressive")
        assert all(length >= MIN_JUMP for length in jumps)
        if method == "prompt-lookup":
            assert output.counters.rolled_back == 0
            assert output.counters.target_passes < len(output.token_ids) / 2
    assert len(set(outputs.values())) == 1


def test_a_form_that_ends_early_outweighs_min_tokens() -> None:
    params = SamplingParams(grammar=grammar_of("choice", '["ab"]'), min_tokens=20, max_tokens=30)
    output = run(lettered_llm(0), [Request((1,), "premium", params)])[0]
    assert (output.text, output.finish_reason) == ("ab", "stop")


def test_a_grammar_that_is_too_much_ends_the_output_as_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library allows nothing but an end once its limits are exceeded."""
    monkeypatch.setattr(GrammarState, "has_failed", True)
    params = SamplingParams(grammar=grammar_of("choice", '["ab"]'), max_tokens=30)
    output = run(lettered_llm(0), [Request((1,), "premium", params)])[0]
    assert (output.text, output.finish_reason) == ("ab", "length")


def test_however_a_request_ends_its_form_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, or cancelled while it decodes, or while its prompt joins."""
    begin, begun, ended = Grammars.begin, list[GrammarState](), list[GrammarState]()

    def noted(self: Grammars, grammar: str) -> GrammarState:
        begun.append(begin(self, grammar))
        return begun[-1]

    monkeypatch.setattr(Grammars, "begin", noted)
    monkeypatch.setattr(GrammarState, "end", lambda self: ended.append(self))
    llm = lettered_llm(0, max_batch=4)
    loop, params = llm.loop(), SamplingParams(grammar=grammar_of("regex", "[ab]{30}c"), max_tokens=40)
    for index, length in enumerate((2, 2, 12)):
        loop.submit(index, Request((1,) * length, "premium", params), policy_for("premium", llm.tiers), None)
    while len(begun) < 3:
        list(loop.step())
    assert (len(loop.scheduler.rows), len(ended)) == (2, 0) and loop.scheduler.joining is not None
    loop.cancel(2)
    list(loop.step())
    assert ended == begun[2:]
    loop.cancel(0)
    list(loop.step())
    assert ended == [begun[2], begun[0]]
    while loop.has_work:
        list(loop.step())
    assert ended == [begun[2], begun[0], begun[1]]


def test_without_a_tokenizers_file_there_are_no_forms() -> None:
    with pytest.raises(RequestError, match="outputs cannot have a form here"):
        run(make_llm(), [Request((1,), "premium", SamplingParams(grammar=grammar_of("json")))])
