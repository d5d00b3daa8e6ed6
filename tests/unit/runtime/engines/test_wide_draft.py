"""The torch engine over a draft of five taps and a corrected LM head computes what was trained: in fp32, and in int8
and int4 with its compiled stages and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import relative_error, tiny_decoder, tiny_ids, whole_window
from torch import Tensor
from wide import TAPS, wide_draft

from ssv.builder.training.passes import CausalAttend, draft_passes, view_target
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.smoothing import activation_ranges
from ssv.runtime.engines.cpu_layers import FusedLayers
from ssv.runtime.engines.torch_engine import draft_engine, target_engine
from ssv.support.precisions import TorchPrecision

SIZES: dict[str, Any] = {"max_batch": 2, "max_length": 40}
LENGTH = 11
either_depth = pytest.mark.parametrize("num_layers", [1, 2])


@torch.no_grad()
def trained(draft: Draft, target: Decoder, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, T, F] and logits [B, T - 1, V], as training computes them."""
    assert draft.tap is not None
    tapped_BTX = whole_window(target, ids_BT, TAPS)[2]
    assert tapped_BTX is not None
    features_BTF = draft.tap(tapped_BTX)
    rows, length = len(ids_BT), ids_BT.shape[1] - 1
    hidden_MH = draft.run_layers(
        ids_BT[:, 1:].flatten(),
        features_BTF[:, :-1].flatten(0, 1),
        torch.arange(length).repeat(rows),
        CausalAttend(rows),
    )
    return features_BTF, draft.logits(hidden_MH).view(rows, length, -1)


def by_engines(
    target: Decoder, draft: Draft, precision: TorchPrecision, ids_BT: Tensor, **options: Any
) -> list[Tensor]:
    """The same, in a prompt's step and steps of one and two tokens."""
    ranges = options.get("ranges")
    theirs = {name.removeprefix("draft."): value for name, value in ranges.items()} if ranges else None
    of_target = target_engine(target, precision="fp32", draft=draft, **SIZES)
    of_draft = draft_engine(draft, precision=precision, ranges=theirs, **SIZES)
    start, length = torch.zeros(2, dtype=torch.int32), ids_BT.shape[1]
    features_BTF = of_target.step(ids_BT, start, torch.arange(2 * length), features_out=True).features_BTF
    assert features_BTF is not None
    found, at = [], 0
    for count in (length - 4, 1, 2):
        out = of_draft.step(
            ids_BT[:, at + 1 : at + 1 + count],
            start + at,
            torch.arange(2 * count),
            features_BTF[:, at : at + count].contiguous(),
        )
        found.append(out.logits_RV.view(2, count, -1).clone())
        at += count
    return [features_BTF, torch.cat(found, dim=1)]


@either_depth
def test_in_fp32_it_is_what_was_trained(num_layers: int) -> None:
    target = tiny_decoder(num_layers=7)
    draft, as_trained = wide_draft(target, num_layers)
    ids_BT = tiny_ids(2, LENGTH)
    for found, expected in zip(
        by_engines(target, draft, "fp32", ids_BT), trained(as_trained, target, ids_BT), strict=True
    ):
        assert relative_error(found, expected) < 1e-5


@either_depth
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.1), ("int4", 0.35)])
def test_packed_it_is_near_fused_or_not(
    precision: TorchPrecision, most: float, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_decoder(num_layers=7)
    draft, _ = wide_draft(target, num_layers)
    ids_BT = tiny_ids(2, LENGTH)
    expected = by_engines(target, draft, "fp32", ids_BT)[1]
    fused = by_engines(target, draft, precision, ids_BT)[1]
    assert 1e-4 < relative_error(fused, expected) < most
    monkeypatch.setattr(FusedLayers, "available", staticmethod(lambda: False))
    with pytest.warns(UserWarning, match="without their compiled stages"):
        modules = by_engines(target, draft, precision, ids_BT)[1]
    assert relative_error(modules, fused) < 5e-3


def test_smoothing_keeps_what_it_computes() -> None:
    """A calibrated bundle has the ranges of its inputs, those of the added up LM head among them."""
    target = tiny_decoder(num_layers=7)
    draft, _ = wide_draft(target)
    draft.decoder.norm.weight.data[5] *= 20  # sticks out
    ids_BT, sample_BT = tiny_ids(2, LENGTH), tiny_ids(4, 24, seed=7)

    def run() -> None:
        for each in draft_passes(draft, sample_BT, view_target(target, draft, sample_BT), depth=3):
            draft.logits(each.hidden_BTH.flatten(0, 1))

    ranges = activation_ranges(draft, run)
    assert "decoder.lm_head" in ranges
    expected = by_engines(target, draft, "fp32", ids_BT)[1]
    plain, smoothed = (
        relative_error(by_engines(target, draft, "int8", ids_BT, ranges=given)[1], expected) for given in (None, ranges)
    )
    assert smoothed < 0.1 and smoothed < plain
