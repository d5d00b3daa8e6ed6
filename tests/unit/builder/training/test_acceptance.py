"""Tokens per pass as a checkpoint is chosen by them: those of the decoding loop, over engines, on the same text."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_decoder

from fakes import FakeTokenizer
from ssv.builder.training.acceptance import CHAIN, Shape, tokens_per_pass
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns, Writer, Writing
from ssv.builder.training.distill import fit_start
from ssv.bundle.policy import Policy, verify_all
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, draft_spec, start_from_target
from ssv.runtime.counters import Counters
from ssv.runtime.engines.torch_engine import draft_engine, target_engine
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

END = 5
PIECES = ChatPieces(before=[1, 2], to_assistant=[END, 3], to_user=[END, 4], end_of_turn=END)
WINDOW = 48


class Numbers(FakeTokenizer):
    """A piece of text for each token of the tiny target."""

    pieces = (b"<end>", b"ab", *(f" {token}".encode() for token in range(110)))


def written(target: Decoder) -> Conversations:
    turns = Turns([[20, 21, 22], [30, 31]])
    return Writer(target, PIECES, turns, Writing(24, WINDOW, greedy=True, max_user_tokens=6)).write(0)


def near(target: Decoder, data: Conversations) -> Draft:
    """A draft that is right now and then."""
    spec = draft_spec(target.spec, "conditioned", (0, 1), None)
    draft = start_from_target(spec, target, (0, 1), torch.randperm(112, generator=torch.Generator().manual_seed(3)))
    fit_start(target, draft, data.tokens.long())
    return draft.requires_grad_(False)


def answers(data: Conversations) -> list[tuple[list[int], int]]:
    """Each answer: what stands before it, and how long it is."""
    found = []
    for ids, spoken in zip(data.tokens.tolist(), data.is_assistant.tolist(), strict=True):
        at = 2
        while at < len(ids):
            end = at
            while end < len(ids) and spoken[end]:
                end += 1
            if end > at:
                found.append((ids[:at], end - at))
            at = max(end, at + 1)
    return found


def of_the_loop(target: Decoder, draft: Draft, policy: Policy, data: Conversations) -> float:
    sizes = {"precision": "fp32", "max_batch": 4, "max_length": 4 * WINDOW}
    llm = LLM(
        target_engine(target, draft=draft, **sizes),  # type: ignore[arg-type]
        draft_engine(draft, **sizes),  # type: ignore[arg-type]
        BundleTokenizer(Numbers()),
        eos_token_ids=[END],
        tiers={"premium": policy},
        max_length=2 * WINDOW,
    )
    asked = answers(data)
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for _, length in asked]
    outputs = llm.generate([Request(tuple(ids), "premium", each) for (ids, _), each in zip(asked, params, strict=True)])
    total = sum((output.counters for output in outputs), Counters(requests=0))
    assert total.emitted == int(data.is_assistant.sum())
    return total.tokens_per_pass


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_chain_gives_what_the_decoding_loop_gives(levels: int) -> None:
    target = tiny_decoder()
    data = written(target)
    draft = near(target, data)
    found = tokens_per_pass(target, draft, data, (Shape(1, levels, levels),), batch_rows=7)[0]
    assert 1.1 < found < 1.5
    assert found == pytest.approx(of_the_loop(target, draft, verify_all(levels), data), abs=1e-9)


@pytest.mark.parametrize("levels", [1, 3])
def test_a_tree_gives_what_the_decoding_loop_gives(levels: int) -> None:
    """Where both draft the same: all that is found."""
    target = tiny_decoder()
    data = written(target)
    draft = near(target, data)
    nodes = 4 + 16 * (levels - 1)
    found = tokens_per_pass(target, draft, data, (Shape(4, levels, nodes),))[0]
    policy = verify_all(nodes, children=(4,), beam=4, max_depth=levels)
    assert found == pytest.approx(of_the_loop(target, draft, policy, data), abs=1e-9)


def test_more_nodes_give_more() -> None:
    target = tiny_decoder()
    data = written(target)
    shapes = (CHAIN, Shape(2, 5, 10), Shape(4, 5, 40))
    one, two, four = tokens_per_pass(target, near(target, data), data, shapes)
    assert 1 < one < two < four


def test_text_without_an_answer_has_no_pass() -> None:
    target = tiny_decoder()
    data = written(target)
    nothing = Conversations(data.tokens, torch.zeros_like(data.is_assistant))
    assert tokens_per_pass(target, near(target, data), nothing, (CHAIN,)) == [0.0]
