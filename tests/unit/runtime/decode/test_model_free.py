"""Drafts that no model makes: the text of plain decoding, in every shape and company, and fewer passes where a text
repeats."""

from __future__ import annotations

import random
from typing import Any

import pytest
from drive import text_of

from fakes import EOS, VOCAB_SIZE, FakeTarget, FakeTokenizer, RepeatingTarget
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode import round as module
from ssv.runtime.decode.tree import Tree
from ssv.runtime.decode.verify import Verdict, walk
from ssv.runtime.llm import LLM
from ssv.runtime.methods import LOOKAHEAD, PROMPT_LOOKUP, SUFFIX
from ssv.runtime.request import Output, Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

POLICIES = {
    "prompt-lookup": PROMPT_LOOKUP,
    "prompt-lookup, longer": PROMPT_LOOKUP.model_copy(update={"longest_match": 6, "pays": False}),
    "suffix": SUFFIX,
    "suffix, shorter": SUFFIX.model_copy(update={"longest_match": 2, "min_probability": 0.4}),
    "suffix, narrow": SUFFIX.model_copy(update={"children": (2, 1), "beam": 1, "max_depth": 3, "pays": False}),
    "lookahead": LOOKAHEAD,
    "lookahead, small": LOOKAHEAD.model_copy(update={"children": (2,), "beam": 2, "max_depth": 2}),
    "lookahead of pairs": LOOKAHEAD.model_copy(update={"children": (3,), "beam": 4, "max_depth": 1}),
    "lookahead, cut": LOOKAHEAD.model_copy(update={"max_pending": 11}),
}
MAX_LENGTH = 64


def costs(passes: tuple[float, float], drafts: tuple[float, float]) -> Costs:
    """Seconds of steps of 1 and of 64 tokens."""
    return Costs(target=Curve(tokens=(1, 64), seconds=passes), draft=Curve(tokens=(1, 64), seconds=drafts))


CHEAP = costs((1.0, 1.5), (1.0, 1.0))
DEAR = costs((1.0, 40.0), (1.0, 1.0))


def make_llm(target: type[FakeTarget], seed: int, **options: Any) -> LLM:
    settings = {"max_batch": 1, "costs": CHEAP, "eos_bias": -1.0, "pass_tokens": None} | options
    sizes = {"max_batch": settings.pop("max_batch"), "max_length": MAX_LENGTH + MAX_PENDING}
    return LLM(
        target(seed=seed, tap=False, eos_bias=settings.pop("eos_bias"), **sizes),
        None,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={},
        max_length=MAX_LENGTH,
        prefill_chunk=4,
        **settings,
    )


def run(llm: LLM, requests: list[Request], policy: Policy | None = None) -> list[Output]:
    """With another policy in place of the tier `premium`."""
    llm.tiers = {} if policy is None else {"premium": policy}
    return llm.generate(requests)


def random_request(rng: random.Random, method: str) -> Request:
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.6, 1.0]),
        top_k=rng.choice([0, 0, 4]),
        seed=rng.randrange(1000),
        max_tokens=rng.randint(1, 45),
        min_tokens=rng.choice([0, 0, 1]),
        stop=rng.choice([(), (), ("b c",), ("E", "x")]),
        ignore_eos=rng.random() < 0.4,
    )
    return Request(tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 15))), method, params)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("target", [FakeTarget, RepeatingTarget])
def test_the_text_is_that_of_plain_decoding(target: type[FakeTarget], name: str) -> None:
    """Alone, and among company that comes and goes, with a bound on a pass and without; greedy and sampled; ends of
    every kind."""
    rng = random.Random(name)
    company = ("autoregressive", "lookahead", "suffix", "prompt-lookup")
    accepted = passes = 0
    for seed in range(3):
        requests = [random_request(rng, "premium" if i % 3 else company[i // 3]) for i in range(12)]
        plain = [Request(request.prompt_ids, "autoregressive", request.params) for request in requests]
        expected = [text_of(output) for output in run(make_llm(target, seed), plain)]
        for options in ({}, {"max_batch": 3}, {"max_batch": 4, "pass_tokens": 24, "costs": None}):
            outputs = run(make_llm(target, seed, **options), requests, POLICIES[name])
            assert [text_of(output) for output in outputs] == expected
            for counters in (output.counters for output in outputs):
                assert counters.drafted == counters.accepted + counters.rolled_back
                assert counters.target_tokens == counters.drafted + counters.target_passes
            if not options:
                own = [output.counters for output in outputs[1::3]]
                accepted += sum(counters.accepted for counters in own)
                passes += sum(counters.target_passes for counters in own)
    assert accepted > (0.2 if target is RepeatingTarget else 0.02) * passes


@pytest.mark.parametrize(
    ("name", "tokens_per_pass"), [("prompt-lookup", 3.5), ("suffix", 3.5), ("lookahead", 3), ("lookahead, small", 2)]
)
def test_a_text_that_goes_in_a_circle_takes_few_passes(name: str, tokens_per_pass: float) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    (output,) = run(make_llm(RepeatingTarget, 0), [Request((1, 2, 3), "premium", params)], POLICIES[name])
    assert output.counters.tokens_per_pass > tokens_per_pass


@pytest.mark.parametrize("name", ["prompt-lookup", "suffix"])
def test_what_does_not_pay_is_not_drafted(name: str) -> None:
    """In a text whose repetitions mean nothing they draft at first, and stop; where passes are dear they never
    begin."""
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    request = Request((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "premium", params)
    own_costs = costs((1.0, 1.0 + 63 * 0.14), (1.0, 1.0))
    drafted = [
        run(make_llm(FakeTarget, 1, costs=each), [request], POLICIES[name])[0].counters.drafted
        for each in (DEAR, own_costs, None)
    ]
    assert drafted[0] == 0 < drafted[1] < 0.5 * drafted[2]


def test_a_wrong_token_that_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_the_first_path(tree: Tree, judged: Any, choices: Any) -> Verdict:
        verdict = walk(tree, judged, choices)
        return Verdict((0,), 1, choices[1]) if not verdict.path and len(tree) else verdict

    params = SamplingParams(max_tokens=50, ignore_eos=True)
    for method in ("prompt-lookup", "suffix", "lookahead"):
        requests = [Request((1, 2, 3), name, params) for name in ("autoregressive", method)]
        llm = make_llm(FakeTarget, 0)
        right = [text_of(output) for output in run(llm, requests)]
        with monkeypatch.context() as patch:
            patch.setattr(module, "walk", takes_the_first_path)
            wrong = text_of(run(llm, requests[1:])[0])
        assert right[0] == right[1] != wrong
