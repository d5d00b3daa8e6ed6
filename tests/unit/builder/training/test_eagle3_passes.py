"""Passes over whole windows see of an EAGLE-3 head what it says when it drafts, k of its own steps deep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eagle3_heads import FORMS, TEXT, ByHand, loaded, published, states_of, target_for
from tiny import relative_error

from ssv.builder.training.passes import draft_passes, view_target


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_is_that_many_steps_of_its_own(form: str, tmp_path: Path) -> None:
    target, head = target_for(form), published("speculators", **FORMS[form])
    draft, tokens_BT = loaded(head, target, tmp_path), torch.tensor([TEXT])
    by_hand = ByHand(head, target.embed.weight, target.lm_head.weight)
    known = [by_hand.features([after[run] for run in head.runs]) for after in states_of(target)]
    tokens = TEXT[1:]
    with torch.no_grad():
        passes = list(draft_passes(draft, tokens_BT, view_target(target, draft, tokens_BT), depth=3))
    for depth, found in enumerate(passes):
        features = known[: len(tokens) - depth]
        while len(features) < len(tokens):
            features.append(by_hand.hidden(tokens[: len(features)], features))
        wanted = by_hand.logits(by_hand.hidden(tokens, features))
        assert relative_error(found.logits_BTV[0, -1], wanted) < 1e-5
