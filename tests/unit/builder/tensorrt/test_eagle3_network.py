"""The TensorRT network of a published EAGLE-3 head drafts what a plain reimplementation does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eagle3_heads import FORMS, assert_same, drafted_by_engines, drafted_by_hand, loaded, published, target_for
from interpreted import interpreted_draft, interpreted_target


@pytest.mark.parametrize("form", FORMS)
def test_the_network_drafts_what_the_authors_code_does(form: str, tmp_path: Path) -> None:
    target, head = target_for(form), published("speculators", **FORMS[form])
    draft = loaded(head, target, tmp_path)
    engines = interpreted_target(target, torch.float32, draft), interpreted_draft(draft, torch.float32, None)
    assert not engines[1].has_scorer
    assert_same(drafted_by_engines(*engines), drafted_by_hand(head, target), 1e-4)
