"""Settings out of range are refused by name; policies of the methods; the counters' sums."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ssv.bundle.policy import Policy, TypicalAcceptance, verify_all
from ssv.runtime.counters import Counters
from ssv.runtime.methods import LOOKAHEAD, METHODS, OPTIONS, PROMPT_LOOKUP, SUFFIX, policy_for, policy_of, with_options
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.support.errors import UserError

INVALID: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": -0.5},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"max_tokens": 0},
    {"max_tokens": -3},
    {"min_tokens": -1},
    {"min_tokens": 11, "max_tokens": 10},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"min_p": math.nan},
    {"presence_penalty": 2.1},
    {"presence_penalty": math.nan},
    {"frequency_penalty": -2.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 101.0},
    {"repetition_penalty": math.inf},
    {"stop": ("a", "")},
    {"latency_bound_ms": 0.0},
    {"latency_bound_ms": -1.0},
    {"latency_bound_ms": math.nan},
]


@pytest.mark.parametrize("settings", INVALID, ids=repr)
def test_invalid_setting_is_refused_by_name(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**settings)
    if name != "stop":
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"logit_bias": ((7, 101.0),)}, "logit_bias 101.0 of token 7"),
        ({"logit_bias": ((7, math.nan),)}, "logit_bias nan"),
        ({"logit_bias": ((7, 1.0), (7, 2.0))}, "a token twice"),
        ({"bad_token_ids": ((1, 2), ())}, "an empty sequence"),
    ],
)
def test_tokens_that_are_named_wrongly(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 5},
        {"top_k": 0},
        {"top_k": 10**6},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"max_tokens": 1},
        {"min_tokens": 10, "max_tokens": 10},
        {"stop": ()},
        {"latency_bound_ms": 1e-3},
        {"latency_bound_ms": math.inf},
    ],
    ids=repr,
)
def test_settings_at_their_borders(settings: dict[str, Any]) -> None:
    SamplingParams(**settings)


def test_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=1e-6).greedy


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 1.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Request((1,), "autoregressive").method = "premium"  # type: ignore[misc]


# --- methods --------------------------------------------------------------------------------------------------------

PREMIUM = Policy(accept_below=0, verify_above=0.5, risk_budget=0.9, max_pending=8)
TURBO = Policy(accept_below=0.1, verify_above=0.9, risk_budget=0.99, max_pending=16)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("logprobs", 1.5, "whole number"),
        ("prompt_logprobs", True, "whole number"),
        ("temperature", "1", "a number"),
        ("temperature", None, "a number"),
        ("top_p", "0.5", "a number"),
        ("min_p", (0.1,), "a number"),
        ("presence_penalty", True, "a number"),
        ("latency_bound_ms", "x", "a number"),
        ("ignore_eos", "no", "True or False"),
        ("fates", 1, "True or False"),
        ("grammar", {"type": "object"}, "must be text: .*grammar_of"),
        ("stop", "END", "a tuple of strings"),
        ("stop", (5,), "a tuple of strings"),
        ("stop_token_ids", ("a",), "token ids"),
        ("stop_token_ids", 5, "token ids"),
        ("logit_bias", {5: 1.0}, "pairs, a token id and a number"),
        ("logit_bias", ((5, "1"),), "pairs, a token id and a number"),
        ("bad_token_ids", (5,), "tuples of token ids"),
        ("bad_token_ids", (("a",),), "tuples of token ids"),
    ],
)
def test_settings_of_another_type(name: str, value: Any, named: str) -> None:
    with pytest.raises(RequestError, match=f"{name} .*{named}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("prompt_ids", "hello", "tuple of token ids: .*chat_ids"),
        ("prompt_ids", None, "tuple of token ids"),
        ("prompt_ids", (1.5,), "tuple of token ids"),
        ("params", {"max_tokens": 3}, "must be `SamplingParams`"),
        ("num_draft_tokens", 2.5, "whole number"),
        ("num_draft_tokens", "5", "whole number"),
        ("deadline", "soon", r"a number: take it from `time\.monotonic\(\)`"),
        ("arrived", "x", "a number"),
        ("policy", "eagle", "must be a `Policy`: .*goes into `method`"),
    ],
)
def test_fields_of_another_type(name: str, value: Any, named: str) -> None:
    with pytest.raises(RequestError, match=f"{name} .*{named}"):
        Request(**{"prompt_ids": (1,), "method": "premium", name: value})


def test_numbers_of_other_libraries() -> None:
    ids = tuple(np.arange(1, 3))
    assert Request(ids, "premium", SamplingParams(temperature=np.float32(0.5), stop_token_ids=ids)).prompt_ids == ids


@pytest.mark.parametrize("name", ["top_k", "seed", "max_tokens", "min_tokens"])
@pytest.mark.parametrize("value", [2.5, None, "3", True])
def test_counts_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} .* whole number"):
        SamplingParams(**{name: value})


def test_methods() -> None:
    assert METHODS == (
        "autoregressive", "lookahead", "prompt-lookup", "suffix", "medusa", "medusa-typical", "specinfer", "eagle",
        "speculative", "premium", "balanced", "turbo",
    )  # fmt: skip
    trees = {name: policy_for(name, {}) for name in ("specinfer", "eagle")}
    assert all(policy.lossless and not policy.is_chain for policy in trees.values())
    assert [trees["specinfer"].children_of(depth) for depth in range(8)] == [1, 1, 3, 1, 1, 1, 1, 1]
    assert (trees["eagle"].max_pending, trees["eagle"].max_depth, trees["eagle"].beam) == (60, 7, 10)
    assert policy_for("autoregressive", {}).max_pending == 0
    for k in (1, 5, 32):
        assert policy_for("speculative", {}, k) == Policy(accept_below=0, verify_above=1, risk_budget=1, max_pending=k)
    assert policy_for("medusa", {}).drafter == "heads" and policy_for("medusa", {}).lossless
    assert policy_for("turbo", {"premium": PREMIUM, "turbo": TURBO}) is TURBO


def test_lossless() -> None:
    assert policy_for("autoregressive", {}).lossless
    assert policy_for("speculative", {}).lossless
    assert PREMIUM.lossless
    assert not TURBO.lossless and not TURBO.lossless_for(greedy=True)
    assert policy_for("medusa-typical", {}).lossless_for(greedy=True)
    assert not policy_for("medusa-typical", {}).lossless
    assert policy_for("medusa-typical", {}).model_copy(update={"max_pending": 0}).lossless
    assert TURBO.model_copy(update={"max_pending": 0}).lossless


@pytest.mark.parametrize("k", [0, -1, 65])
def test_speculative_needs_a_token(k: int) -> None:
    with pytest.raises(RequestError, match=f"num_draft_tokens {k}"):
        policy_for("speculative", {}, k)


def test_unknown_method() -> None:
    known = (
        "autoregressive, lookahead, prompt-lookup, suffix, medusa, medusa-typical, specinfer, eagle, speculative, "
        "premium, balanced, turbo"
    )
    with pytest.raises(RequestError, match=f"unknown method 'Premium'; known: {known}"):
        policy_for("Premium", {"Premium": PREMIUM})


def test_tier_that_the_bundle_lacks() -> None:
    with pytest.raises(RequestError, match=r"no tier 'balanced' \(it has: premium, turbo\).*ssv-build calibrate"):
        policy_for("balanced", {"premium": PREMIUM, "turbo": TURBO})
    with pytest.raises(RequestError, match="it has: none"):
        policy_for("premium", {})


@pytest.mark.parametrize(
    "change",
    [
        {"accept_below": -0.1},
        {"verify_above": 1.1},
        {"risk_budget": math.nan},
        {"max_pending": -1},
        {"max_pendng": 3},
        {"children": ()},
        {"children": (3, 65)},
        {"beam": 65},
        {"max_depth": 65},
    ],
    ids=repr,
)
def test_policy_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        Policy.model_validate(PREMIUM.model_dump() | change)
    with pytest.raises(UserError, match=next(iter(change))):
        Policy(**{**PREMIUM.model_dump(), **change})


@pytest.mark.parametrize("drafter", ["heads", "prompt-lookup", "suffix", "lookahead"])
def test_what_has_no_score_trusts_nothing(drafter: str) -> None:
    with pytest.raises(ValidationError, match=f"{drafter} proposes tokens without a score .*`accept_below` at 0"):
        Policy.model_validate(verify_all(8, drafter=drafter).model_dump() | {"accept_below": 0.1})


# --- counters -------------------------------------------------------------------------------------------------------


def test_counters_add() -> None:
    one = Counters(prompt_tokens=3, emitted=9, drafted=8, judged=6, accepted=5, target_passes=2, total_s=0.5)
    both = one + Counters(emitted=1, judged=4, accepted=1, target_passes=1, total_s=0.25)
    assert both == Counters(
        requests=2, prompt_tokens=3, emitted=10, drafted=8, judged=10, accepted=6, target_passes=3, total_s=0.75
    )
    assert both.acceptance_rate == 0.6
    assert both.to_dict()["emitted"] == 10
    assert both.tokens_per_pass == (10 - 2) / 3
    assert sum([one, one], Counters(requests=0)).tokens_per_pass == one.tokens_per_pass == 4.0


def test_passes_by_what_they_kept() -> None:
    one = Counters(target_passes=3, passes_by_kept=Counter([0, 2, 2]))
    both = one + Counters(target_passes=1, passes_by_kept=Counter([3]))
    assert one.passes_by_kept == {0: 1, 2: 2}  # a sum leaves its parts as they are
    assert both.passes_by_kept == {0: 1, 2: 2, 3: 1}
    assert both.kept_by_depth == [0.75, 0.75, 0.25]
    assert Counters(target_passes=2, passes_by_kept=Counter([0, 0])).kept_by_depth == []
    assert Counters().kept_by_depth == []
    assert json.loads(json.dumps(both.to_dict()))["passes_by_kept"] == {"0": 1, "2": 2, "3": 1}


def test_rates() -> None:
    assert Counters(emitted=9, target_passes=2).tokens_per_pass == 4.0
    assert Counters().tokens_per_pass == 0.0
    assert Counters().acceptance_rate == 0.0


def test_a_request_may_bring_its_own_policy() -> None:
    own = Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=9, children=(3, 2))
    assert policy_of(Request((1,), "mine", policy=own), {}) is own
    assert policy_of(Request((1,), "premium"), {"premium": PREMIUM}) is PREMIUM
    with pytest.raises(RequestError, match="unknown method 'mine'"):
        policy_of(Request((1,), "mine"), {})


# --- options of a method's policy -----------------------------------------------------------------------------------


def test_every_method_says_which_options_it_has() -> None:
    assert set(OPTIONS) == set(METHODS)
    assert {name for options in OPTIONS.values() for name in options} < set(Policy.model_fields)


@pytest.mark.parametrize("method", METHODS)
def test_options_give_a_policy_that_keeps_what_the_method_promises(method: str) -> None:
    """All that a method has, at other values; the published ones stand where nothing is said."""
    policy = policy_for(method, {"premium": PREMIUM, "balanced": PREMIUM, "turbo": PREMIUM})
    values: dict[str, Any] = {"max_pending": 12, "children": [3], "beam": 2, "max_depth": 3, "pays": False}
    values |= {"shortest_match": 2, "longest_match": 5, "min_probability": 0.25}
    values |= {"typical": {"posterior_threshold": 0.25}}
    options = {name: values[name] for name in OPTIONS[method] if name in values}
    changed = with_options(method, policy, options)
    assert changed.drafter == policy.drafter and changed.accept_below == 0
    assert [changed.lossless_for(greedy=greedy) for greedy in (True, False)] == [
        policy.lossless_for(greedy=greedy) for greedy in (True, False)
    ]
    for name in Policy.model_fields:
        if name not in options:
            assert getattr(changed, name) == getattr(policy, name), name
        elif name == "typical":
            assert changed.typical == TypicalAcceptance(posterior_threshold=0.25, posterior_alpha=0.3)
        else:
            assert getattr(changed, name) == (tuple(values[name]) if name == "children" else values[name])
    assert with_options(method, policy, {}) is policy
    assert with_options(method, policy, dict.fromkeys(options)) is policy


def test_lookahead_has_its_authors_options() -> None:
    """W 5, N 4 and G 3: (W + G) (N - 1) tokens beside and with the root."""
    options = {"beam": 5, "max_depth": 3, "children": [3], "max_pending": 23}
    changed = with_options("lookahead", LOOKAHEAD, options)
    assert (changed.beam, changed.max_depth, changed.children, changed.max_pending) == (5, 3, (3,), 23)


def test_look_ups_have_their_authors_options() -> None:
    changed = with_options("prompt-lookup", PROMPT_LOOKUP, {"shortest_match": 3, "longest_match": 8, "max_pending": 20})
    assert (changed.lengths_of_match, changed.max_pending) == ((3, 8), 20)
    changed = with_options("suffix", SUFFIX, {"longest_match": 64, "min_probability": 0})
    assert (changed.lengths_of_match, changed.least_probability) == ((1, 64), 0.0)
    # Each by itself beside the published other one.
    assert with_options("prompt-lookup", PROMPT_LOOKUP, {"shortest_match": 3}).lengths_of_match == (3, 3)
    assert with_options("suffix", SUFFIX, {"longest_match": 1}).least_probability == 0.1


def test_a_policy_looks_up_what_its_drafter_can() -> None:
    with pytest.raises(UserError, match="`longest_match` is of prompt-lookup and suffix, not of the drafter 'model'"):
        verify_all(5, longest_match=3)
    with pytest.raises(UserError, match="`min_probability` is of suffix, not of the drafter 'prompt-lookup'"):
        verify_all(5, drafter="prompt-lookup", min_probability=0.1)
    with pytest.raises(UserError, match="`shortest_match` is of prompt-lookup, not of the drafter 'suffix'"):
        verify_all(5, drafter="suffix", shortest_match=1)


def test_a_chain_may_ask_for_its_pass_sooner() -> None:
    chain = with_options("premium", PREMIUM, {"children": [1], "verify_above": 0.4, "risk_budget": 0.6})
    assert chain.is_chain and chain.lossless and (chain.verify_above, chain.risk_budget) == (0.4, 0.6)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (
            "eagle",
            {"max_deph": 3},
            "max_deph: there is no such option: use max_depth, or leave it out",
        ),
        (
            "eagle",
            {"accept_below": 0.1},
            "accept_below: trusted tokens are lossy, and only calibrated tiers .*: eagle has max_p",
        ),
        ("eagle", {"accept_below": 0}, "accept_below: trusted tokens are lossy"),
        ("eagle", {"drafter": "suffix"}, "drafter: who drafts is what a method is, and another method drafts"),
        ("eagle", {"typical": {}}, "typical: it changes nothing of eagle: eagle has"),
        ("medusa", {"typical": {}}, "typical: it changes nothing of medusa"),
        ("eagle", {"beam": 0}, "beam: Input should be greater than or equal to 1: see docs/methods.md"),
        ("eagle", {"beam": 65}, "beam: Input should be less than or equal to 64"),
        ("eagle", {"beam": "8"}, "beam: Input should be a valid integer"),
        ("eagle", {"beam": True}, "beam: Input should be a valid integer"),
        ("eagle", {"beam": 2.5}, "beam: Input should be a valid integer"),
        ("eagle", {"pays": 1}, "pays: Input should be a valid boolean"),
        ("eagle", {"children": 4}, "children: Input should be a valid array"),
        ("eagle", {"children": []}, "children: Tuple should have at least 1 item"),
        ("eagle", {"children": [4, 0]}, "children.1: Input should be greater than or equal to 1"),
        ("eagle", {"max_pending": 65}, "max_pending: 65 is too much: give at most 64, all that may be pending"),
        ("eagle", {"max_pending": -1}, "max_pending: Input should be greater than or equal to 0"),
        ("eagle", {"risk_budget": 0.5}, 'risk_budget: a tree is verified when it is whole, .*give "children": .1. too'),
        (
            "speculative",
            {"num_draft_tokens": 3},
            "num_draft_tokens: the drafted tokens of a chain are max_pending here",
        ),
        (
            "autoregressive",
            {"beam": 2},
            "beam: it changes nothing of autoregressive: autoregressive has none: leave it out",
        ),
        (
            "prompt-lookup",
            {"beam": 2},
            "beam: it changes nothing of prompt-lookup: prompt-lookup has max_pending, shortest_match",
        ),
        ("prompt-lookup", {"min_probability": 0.2}, "min_probability: it changes nothing of prompt-lookup"),
        ("prompt-lookup", {"longest_match": 0}, "longest_match: Input should be greater than or equal to 1"),
        ("prompt-lookup", {"longest_match": 17}, "prompt lookup looks up at most 16 tokens: lower `longest_match`"),
        (
            "prompt-lookup",
            {"shortest_match": 4},
            "no n-gram has 4 tokens at least and 3 at most: lower `shortest_match` or raise `longest_match`",
        ),
        ("prompt-lookup", {"longest_match": True}, "longest_match: Input should be a valid integer"),
        ("prompt-lookup", {"longest": 4}, "longest: there is no such option: use longest_match, or leave it out"),
        ("suffix", {"shortest_match": 2}, "shortest_match: it changes nothing of suffix"),
        ("suffix", {"longest_match": 65}, "longest_match: Input should be less than or equal to 64"),
        ("suffix", {"min_probability": 1.5}, "min_probability: Input should be less than or equal to 1"),
        ("premium", {"longest_match": 8}, "longest_match: it changes nothing of premium"),
        ("lookahead", {"pays": True}, "pays: it changes nothing of lookahead"),
        ("medusa-typical", {"typical": {"posterior_alpha": 2}}, "typical.posterior_alpha: Input should be less than"),
        ("medusa-typical", {"typical": 0.1}, "typical: Input should be an object"),
        ("turbo", {"beam": 4}, "turbo is lossy, and its bound on divergence is that of its own policy: leave its opt"),
    ],
)
def test_options_that_a_method_cannot_have(method: str, options: dict[str, Any], says: str) -> None:
    policy = policy_for(method, {"premium": PREMIUM, "turbo": TURBO})
    with pytest.raises(RequestError, match=says):
        with_options(method, policy, options)
