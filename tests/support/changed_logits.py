"""Requests that change their logits, at random, and a bundle of fakes with every method to decode them by."""

from __future__ import annotations

import random
from typing import Any

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeHeads, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.llm import LLM
from ssv.runtime.request import SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

COSTS = Costs(target=Curve(tokens=(1, 64), seconds=(1.0, 3.0)), draft=Curve(tokens=(1, 64), seconds=(0.05, 0.3)))
TIERS = {
    "premium": verify_all(MAX_PENDING, children=(4,), beam=8, pays=True),
    "balanced": verify_all(20, children=(3,), beam=3, max_depth=5),
    "turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12),
}
TRUSTING_TREE = Policy(
    accept_below=0.45, verify_above=1.0, risk_budget=1.0, max_pending=MAX_PENDING, children=(4,), beam=8, pays=True
)
"""A tier as bundles have it: a tree whose first path may be trusted."""
LOSSLESS = (
    "premium",
    "balanced",
    "speculative",
    "eagle",
    "specinfer",
    "medusa",
    "prompt-lookup",
    "suffix",
    "lookahead",
)


def make_llm(
    *,
    seed: int = 0,
    max_batch: int = 3,
    heads: bool = True,
    tokenizer: BundleTokenizer | None = None,
    vocab_size: int = VOCAB_SIZE,
    turbo: Policy = TIERS["turbo"],
    **options: Any,
) -> LLM:
    target = FakeTarget(
        seed=seed, eos_bias=-1.0, max_batch=max_batch, max_length=60 + MAX_PENDING, vocab_size=vocab_size
    )
    settings = {"agreement": 0.6, "noise": 0.5, "conditioned": bool(seed % 2)} | options
    return LLM(
        target,
        FakeDraft(target, seed=seed + 1000, **settings),
        tokenizer or BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers=TIERS | {"turbo": turbo},
        max_length=60,
        prefill_chunk=4,
        costs=COSTS,
        heads=FakeHeads(target, seed=seed, noise=0.5) if heads else None,
    )


def random_params(rng: random.Random) -> SamplingParams:
    """Some of the settings that change logits, in any company."""

    def some(*values: Any, neutral: Any) -> Any:
        return rng.choice(values) if rng.random() < 0.5 else neutral

    tokens = list(range(VOCAB_SIZE))
    return SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        top_k=some(3, 6, neutral=0),
        top_p=some(0.7, 0.9, neutral=1.0),
        min_p=some(0.05, 0.4, neutral=0.0),
        repetition_penalty=some(0.7, 1.2, 1.9, neutral=1.0),
        presence_penalty=some(-1.0, 0.5, 2.0, neutral=0.0),
        frequency_penalty=some(-0.5, 0.3, 1.1, neutral=0.0),
        logit_bias=tuple((t, rng.choice([-100.0, -1.5, 1.0, 2.5])) for t in rng.sample(tokens, rng.choice([0, 0, 3]))),
        bad_token_ids=tuple(tuple(rng.choices(tokens, k=rng.choice([1, 2, 3]))) for _ in range(rng.choice([0, 0, 4]))),
        stop_token_ids=tuple(rng.sample(tokens, rng.choice([0, 0, 1]))),
        seed=rng.randrange(1000),
        max_tokens=rng.randint(1, 24),
        min_tokens=rng.choice([0, 0, 1]),
        ignore_eos=rng.random() < 0.5,
    )


def asked(rng: random.Random, count: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    return [
        (tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))), random_params(rng)) for _ in range(count)
    ]
