"""Whole rounds over TensorRT's networks, run by the interpreter: trees and chains give the text of plain decoding, and
what is wrong in the mask or in the walk is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drive import text_of
from interpreted import interpreted_draft, interpreted_target
from tiny import random_draft, tiny_decoder, tiny_ids
from torch import Tensor

from fakes import FakeTokenizer
from ssv.bundle.policy import Policy, verify_all
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.runtime.decode import round as module
from ssv.runtime.decode.tree import ROOT, Tree, branches_of
from ssv.runtime.decode.verify import Verdict, walk
from ssv.runtime.engines import kv_cache, tensorrt_engine
from ssv.runtime.engines.contract import Branches
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

POLICIES = {
    "chain": verify_all(4),
    "bushy": verify_all(12, children=(4,), beam=3, max_depth=3),
    "static": verify_all(10, children=(2, 2, 1), beam=4, max_depth=4),
}


class SignTokenizer(FakeTokenizer):
    """A sign of ASCII for each of the tiny model's 112 tokens."""

    pieces = tuple(bytes([sign]) for sign in range(16, 128))  # type: ignore[assignment]


def draft_of(target: Decoder) -> Draft:
    """The target's weights with noise: a draft that is often right, and often not."""
    draft = random_draft(target, "standalone", head_size=None)
    given = dict(target.named_parameters())
    torch.manual_seed(8)
    for name, parameter in draft.decoder.layers.named_parameters(prefix="layers"):
        parameter.copy_(given[name] + 0.2 * given[name].std() * torch.randn(parameter.shape))
    draft.decoder.norm.weight.copy_(given["norm.weight"])
    return draft


def make_llm(policy: Policy) -> LLM:
    decoder = tiny_decoder()
    return LLM(
        interpreted_target(decoder, torch.float16),
        interpreted_draft(draft_of(decoder), torch.float16, None),
        BundleTokenizer(SignTokenizer()),
        eos_token_ids=[],
        tiers={"premium": policy},
        max_length=40,
        prefill_chunk=8,
    )


def requests(method: str, num_prompts: int = 2) -> list[Request]:
    return [
        Request(
            tuple(tiny_ids(6 + 3 * seed, seed=seed).tolist()),
            method,
            SamplingParams(temperature=temperature, seed=seed, max_tokens=14, ignore_eos=True),
        )
        for seed in range(1, 1 + num_prompts)
        for temperature in (0.0, 0.7)
    ]


@pytest.mark.parametrize("shape", POLICIES)
def test_the_text_is_plain_decodings(shape: str) -> None:
    """Greedy and sampled, in rows of one batch."""
    llm = make_llm(POLICIES[shape])
    plain, found = llm.generate(requests("autoregressive")), llm.generate(requests("premium"))
    assert [text_of(output) for output in found] == [text_of(output) for output in plain]
    assert sum(output.counters.accepted for output in found) > 10
    assert sum(output.counters.rolled_back for output in found) > 10


# --- what is wrong is noticed -----------------------------------------------------------------------------------------


def sees_a_cousin(slot_BT: Tensor, num_slots: int, branches: Branches | None = None) -> Tensor:
    """Each node of a tree sees the one before it, too, whoever that is."""
    mask_B1TS = kv_cache.visible(slot_BT, num_slots, branches)
    if branches is not None:
        mask_B1TS[:, 0].scatter_(2, (slot_BT - 1).clamp(min=0)[:, :, None], True)
    return mask_B1TS


def wrong_parent(prefixes: Any, paths: Any, ends: Any) -> Branches:
    """The paths of nodes lead over the last node that is as deep as their parent."""
    for row in paths:
        last_at: dict[int, int] = {}
        for path in row:
            if len(path) > 1:
                path[-2] = last_at[len(path) - 1]
            last_at[len(path)] = path[-1]
    return branches_of(prefixes, paths, ends)


def sibling_too(tree: Tree, judged: Any, choices: Any) -> Verdict:
    """Behind a node that is kept comes its sibling."""
    verdict = walk(tree, judged, choices)
    for node in verdict.path[-1:]:
        for other in range(node + 1, len(tree)):
            if tree.parents[other] == tree.parents[node]:
                return Verdict((*verdict.path, other), verdict.num_judged + 1, verdict.next_token)
    return verdict


def any_sibling(tree: Tree, judged: Any, choices: Any) -> Verdict:
    """A child of another node is taken for a node's own."""
    verdict = walk(tree, judged, choices)
    for other in range(len(tree)):
        is_of_another = other > verdict.last and tree.parents[other] not in (ROOT, verdict.last)
        if is_of_another and tree.tokens[other] == verdict.next_token:
            return Verdict((*verdict.path, other), verdict.num_judged + 1, verdict.next_token)
    return verdict


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "an ancestor mask that sees a cousin": (tensorrt_engine, "visible", sees_a_cousin),
    "a wrong parent": (module, "branches_of", wrong_parent),
    "a sibling taken, too": (module, "walk", sibling_too),
    "a child of another node": (module, "walk", any_sibling),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some of many texts: whether a fault changes a choice of one depends on how the machine rounds."""
    llm = make_llm(POLICIES["bushy"])
    plain = llm.generate(requests("autoregressive", 6))
    monkeypatch.setattr(*FAULTS[fault])
    found = llm.generate(requests("premium", 6))
    assert [text_of(output) for output in found] != [text_of(output) for output in plain]
