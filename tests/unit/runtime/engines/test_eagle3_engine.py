"""Engines over published EAGLE-3 heads draft what a plain reimplementation does: in fp32, and in int8 with its fused
stages and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_heads import FORMS, TEXT, assert_same, drafted_by_engines, drafted_by_hand, loaded, published, target_for
from tiny import relative_error, tiny_ids, whole_window

from ssv.builder.training.passes import draft_passes, view_target
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.smoothing import Ranges, activation_ranges
from ssv.runtime.engines.cpu_layers import FusedLayers
from ssv.runtime.engines.torch_engine import TorchEngine, draft_engine, target_engine
from ssv.support.precisions import TorchPrecision

SIZES: dict[str, Any] = {"max_batch": 2, "max_length": 32}


def engines_of(
    draft: Draft, target: Decoder, precision: TorchPrecision = "fp32", ranges: Ranges | None = None
) -> tuple[TorchEngine, TorchEngine]:
    return (
        target_engine(target, precision="fp32", draft=draft, **SIZES),
        draft_engine(draft, precision=precision, ranges=ranges, **SIZES),
    )


def ranges_of(draft: Draft, target: Decoder) -> Ranges:
    tokens_BT = tiny_ids(4, 24, seed=7)

    def run() -> None:
        for step in draft_passes(draft, tokens_BT, view_target(target, draft, tokens_BT), depth=3):
            draft.logits(step.hidden_BTH.flatten(0, 1))

    return activation_ranges(draft, run)


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_drafts_what_the_authors_code_does(form: str, tmp_path: Path) -> None:
    target, head = target_for(form), published("eagle3", **FORMS[form])
    engines = engines_of(loaded(head, target, tmp_path), target)
    assert not engines[1].has_scorer and engines[1].num_features == 64
    assert_same(drafted_by_engines(*engines), drafted_by_hand(head, target), 1e-5)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_int8_is_near_it_fused_or_not(
    form: str, smoothed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms whose output goes elsewhere too (norm before residual, normed output) must not be smoothed."""
    target, head = target_for(form), published("eagle3", **FORMS[form])
    draft = loaded(head, target, tmp_path)
    # A channel that sticks out, so that smoothing moves something.
    draft.feature_norm.weight.data[3] *= 20
    head.tensors["midlayer.hidden_norm.weight"][3] *= 20
    draft.decoder.norm.weight.data[5] *= 20
    head.tensors["norm.weight"][5] *= 20
    ranges = ranges_of(draft, target) if smoothed else None
    fused = drafted_by_engines(*engines_of(draft, target, "int8", ranges))
    wanted = drafted_by_hand(head, target)
    most = 0.12 if smoothed else 0.6
    assert relative_error(fused[0][0], wanted[0][0]) < most
    monkeypatch.setattr(FusedLayers, "available", staticmethod(lambda: False))
    with pytest.warns(UserWarning, match="without their compiled stages"):
        engines = engines_of(draft, target, "int8", ranges)
    # The same products: what lies between them is rounded otherwise.
    assert relative_error(drafted_by_engines(*engines)[0][0], fused[0][0]) < 1e-3


@pytest.mark.parametrize("form", ["normed output", "EAGLE 3.1", "norm before residual"])
def test_int8_carries_on_what_fp32_does(form: str, tmp_path: Path) -> None:
    """Smoothing scales what the LM head sees of the final norm, not what the next token is joined with."""
    target = target_for(form)
    draft = loaded(published("eagle3", **FORMS[form]), target, tmp_path)
    draft.decoder.norm.weight.data[5] *= 20
    steps = []
    for precision, ranges in (("fp32", None), ("int8", ranges_of(draft, target))):
        _, engine = engines_of(draft, target, precision, ranges)  # type: ignore[arg-type]
        features_BTF = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
        first = torch.zeros(1, dtype=torch.int32)
        steps.append(engine.step(torch.tensor([TEXT[:5]]), first, torch.tensor([4]), features_BTF).hidden_RH)
    assert relative_error(steps[1], steps[0]) < 0.12


def test_a_step_of_several_rows_with_padding(tmp_path: Path) -> None:
    """Rows of a fused step are what they are alone, bit for bit."""
    target = target_for("EAGLE 3.1")
    draft = loaded(published("speculators", **FORMS["EAGLE 3.1"]), target, tmp_path)
    _, engine = engines_of(draft, target, "int8", ranges_of(draft, target))
    ids_BT = torch.tensor([TEXT[1:], TEXT[1:]])
    assert draft.tap is not None
    tapped_BTX = whole_window(target, torch.tensor([TEXT]), draft.tap.layers)[2]
    assert tapped_BTX is not None
    features_BTF = draft.tap(tapped_BTX[:, :-1]).expand(2, -1, -1)
    starts, counts = torch.zeros(2, dtype=torch.int32), torch.tensor([8, 5], dtype=torch.int32)
    both = engine.step(ids_BT, starts, torch.tensor([7, 8 + 4]), features_BTF, count_B=counts)
    alone = engine.step(ids_BT[:1, :5], starts[:1], torch.tensor([4]), features_BTF[:1, :5])
    assert torch.equal(both.logits_RV[1], alone.logits_RV[0]) and torch.equal(both.hidden_RH[1], alone.hidden_RH[0])
