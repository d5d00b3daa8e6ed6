"""The ways to decode, by name. Each is a `Policy`; one loop (`ssv.runtime.decode.round`) runs them all, mixed in one
batch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ssv.bundle.policy import MAX_PENDING, Policy, TypicalAcceptance, verify_all
from ssv.runtime.request import NUM_DRAFT_TOKENS, Request, RequestError
from ssv.support.strict import problems

TIERS = ("premium", "balanced", "turbo")
"""Sparse speculative verification, by what a bundle was calibrated for: the scorer decides which drafted tokens are
judged and when."""

BASELINES = (
    "autoregressive", "lookahead", "prompt-lookup", "suffix", "medusa", "medusa-typical", "specinfer", "eagle",
    "speculative",
)  # fmt: skip
"""What a bundle can be decoded by beside its tiers: lossless, but for sampled output of `medusa-typical`."""

NEEDS_HEADS = ("medusa", "medusa-typical")
"""What takes a bundle with Medusa's heads."""

METHODS = (*BASELINES, *TIERS)
"""In the order of what they save, as a rule."""

AUTOREGRESSIVE = verify_all(0)
"""Plain decoding: the target makes every token. The baseline of every comparison."""

PROMPT_LOOKUP = verify_all(10, drafter="prompt-lookup", pays=True)
"""What followed the same words before is proposed, at most as many tokens as its author does; no draft model is
asked. What is looked up has three tokens, or two, or one, as published."""

SUFFIX = verify_all(32, drafter="suffix", children=(10,), beam=32, pays=True)
"""The tree of all that followed the same words before, at most as many tokens as published. No path is drafted whose
probability is below 0.1, so no node can have more than ten children."""

LOOKAHEAD = verify_all(55, drafter="lookahead", children=(7,), beam=7, max_depth=4)
"""Window 7, n-grams of 5, 7 guesses: 27 tokens of the window and 28 of the guesses in each pass, beside the root."""

MEDUSA = verify_all(63, drafter="heads", children=(10,), beam=10)
"""Medusa's heads propose a tree of their likeliest tokens, of the size that its authors use: 63 nodes, of the ten
likeliest tokens of each head (arXiv:2401.10774, `mc_sim_7b_63`). Theirs has one shape; this one has the nodes that are
likeliest after the text at hand."""

MEDUSA_TYPICAL = MEDUSA.model_copy(update={"typical": TypicalAcceptance()})
"""The same with its authors' rule for sampled output, which is lossy and bounded by nothing."""

SPECINFER = verify_all(20, children=(1, 1, 3, 1), beam=3, max_depth=8)
"""A static expansion tree: one guess after another, but three for the third token, each continued to a depth of eight
(SpecInfer, Miao et al. 2023, arXiv:2305.09781: the expansion <1, 1, 3, 1, 1, 1, 1, 1>), by the bundle's draft and this
project's verdict."""

EAGLE = verify_all(60, children=(10,), beam=10, max_depth=7)
"""A dynamic tree of a fixed size: the ten best nodes of each level get ten children each, and the 60 best of all are
verified (EAGLE-2, Li et al. 2024, arXiv:2406.16858: 60 tokens, depth 7, top 10)."""

PREMIUM = verify_all(32, children=(4,), beam=8, pays=True)
"""Lossless, and never slower: the tree that saves most at what steps cost here, none where none does."""


_TREE = ("max_pending", "children", "beam", "max_depth")
_WHEN = ("verify_above", "risk_budget")
_BY_MODEL = (*_TREE, "pays", *_WHEN)

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "autoregressive": (),
    "lookahead": _TREE,
    "prompt-lookup": ("max_pending", "shortest_match", "longest_match", "pays", *_WHEN),
    "suffix": (*_TREE, "longest_match", "min_probability", "pays"),
    "medusa": (*_TREE, "pays"),
    "medusa-typical": (*_TREE, "typical"),
    "specinfer": _BY_MODEL,
    "eagle": _BY_MODEL,
    "speculative": _BY_MODEL,
    **dict.fromkeys(TIERS, _BY_MODEL),
}
"""What of each method's policy a request may have otherwise: fields of `Policy` that change how it drafts, and nothing
that its name promises."""

OF_BUNDLES = tuple(name for name in BASELINES if OPTIONS[name] and name != "speculative")
"""Methods that a bundle may have otherwise than published. How many tokens `speculative` drafts each request says."""

_FIXED = {
    "autoregressive": AUTOREGRESSIVE,
    "lookahead": LOOKAHEAD,
    "prompt-lookup": PROMPT_LOOKUP,
    "suffix": SUFFIX,
    "medusa": MEDUSA,
    "medusa-typical": MEDUSA_TYPICAL,
    "specinfer": SPECINFER,
    "eagle": EAGLE,
}


def policy_of(request: Request, tiers: Mapping[str, Policy]) -> Policy:
    """The policy that a request is decoded by: its own, or its method's.

    Raises:
        RequestError: see `policy_for`.
    """
    if request.policy is not None:
        return request.policy
    return policy_for(request.method, tiers, request.num_draft_tokens)


def baselines(has_heads: bool) -> tuple[str, ...]:
    """Those of `BASELINES` that a bundle with or without heads can be decoded by."""
    return tuple(name for name in BASELINES if has_heads or name not in NEEDS_HEADS)


def policy_for(method: str, tiers: Mapping[str, Policy], num_draft_tokens: int = NUM_DRAFT_TOKENS) -> Policy:
    """The policy of a method.

    Args:
        tiers: policies that the bundle has, of its tiers and of methods that it has otherwise than published.
        num_draft_tokens: of `speculative`.

    Raises:
        RequestError: unknown method, or a tier that the bundle was not calibrated for.
    """
    if method == "speculative":
        return speculative(num_draft_tokens)
    if method in tiers and method in METHODS:
        return tiers[method]
    if method in _FIXED:
        return _FIXED[method]
    if method not in TIERS:
        raise RequestError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    has = ", ".join(name for name in TIERS if name in tiers) or "none"
    raise RequestError(f"the bundle has no tier {method!r} (it has: {has})", "calibrate it with `ssv-build calibrate`")


def with_options(method: str, policy: Policy, options: Mapping[str, Any]) -> Policy:
    """A method's policy with some of its numbers changed: one that promises what the method does.

    Args:
        policy: the method's.
        options: values as JSON has them, of the fields in `OPTIONS`. Of `typical` one of its numbers is enough; None is
            as if it were left out.

    Raises:
        RequestError: the method has no such option, a value is none that it can have, or the output would not be what
            the method promises any more.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if not options:
        return policy
    if not (policy.lossless or policy.typical is not None):
        raise RequestError(
            f"{method} is lossy, and its bound on divergence is that of its own policy",
            "leave its options out, or choose premium, which drafts the same trees",
        )
    known = OPTIONS[method]
    if wrong := next((name for name in options if name not in known), None):
        near = next(iter(difflib.get_close_matches(wrong, known, 1)), None)
        has = f"{method} has {', '.join(known)}" if known else f"{method} has none: leave it out"
        raise RequestError(f"{wrong[:64]}: {_why_not(wrong, method)}", f"use {near}, or leave it out" if near else has)
    fields = policy.model_dump(mode="json")
    for name, value in options.items():
        is_part = name == "typical" and isinstance(value, Mapping)
        fields[name] = {**fields[name], **value} if is_part else value
    try:
        # As JSON, in which a list is a tuple and nothing else is what it is not: no text a number, no flag a count.
        changed = Policy.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise RequestError(problems(error), f"see docs/methods.md for what {method} can have") from error
    if changed.max_pending > MAX_PENDING:
        raise RequestError(
            f"max_pending: {changed.max_pending} is too much", f"give at most {MAX_PENDING}, all that may be pending"
        )
    if not changed.is_chain and (asking := [name for name in _WHEN if name in options]):
        raise RequestError(
            f"{asking[0]}: a tree is verified when it is whole, only chains ask for their pass sooner",
            'leave it out, or give "children": [1] too',
        )
    return changed


def _why_not(option: str, method: str) -> str:
    if option == "num_draft_tokens":
        return "the drafted tokens of a chain are max_pending here"
    if option == "drafter":
        return "who drafts is what a method is, and another method drafts in another way"
    if option == "accept_below":
        return "trusted tokens are lossy, and only calibrated tiers have a bound on that"
    if option in Policy.model_fields:
        return f"it changes nothing of {method}"
    return "there is no such option"


def check_num_draft_tokens(given: int | None, methods: Sequence[str]) -> int:
    """The drafted tokens of `speculative` that a command was given, or as many as usual.

    Args:
        given: None where the option was left out.
        methods: those that are asked for.

    Raises:
        RequestError: it is given and none of the methods takes it, or it is out of range.
    """
    if given is None:
        return NUM_DRAFT_TOKENS
    if "speculative" not in methods:
        raise RequestError(
            f"--num-draft-tokens is of the method speculative, not of {', '.join(methods)}",
            "leave it out, or choose speculative",
        )
    speculative(given)
    return given


def speculative(num_draft_tokens: int) -> Policy:
    """Speculative decoding with a fixed number of drafted tokens, all of them judged (Leviathan et al. 2023,
    arXiv:2211.17192).

    Raises:
        RequestError: fewer than one, or more than can be pending.
    """
    if not 1 <= num_draft_tokens <= MAX_PENDING:
        raise RequestError(f"num_draft_tokens {num_draft_tokens}: speculative decoding drafts 1 to {MAX_PENDING}")
    return verify_all(num_draft_tokens)
