"""The engine contract on PyTorch: whatever the steps a sequence is cut into, the result is the network's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_weight, relative_error, tiny_decoder, tiny_ids, tiny_spec, whole_window
from torch import Tensor, nn

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, DraftKind, draft_spec
from ssv.model.scorer import Scorer
from ssv.model.smoothing import Ranges, activation_ranges, smooth_join, smoothed_parts
from ssv.runtime.engines import torch_engine
from ssv.runtime.engines.contract import EngineError, StepOutput
from ssv.runtime.engines.cpu_layers import FusedScorer
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import TorchEngine, draft_engine, target_engine
from ssv.support.precisions import TorchPrecision

BIASES: dict[str, Any] = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_kv_heads": 4, "tie_embeddings": True},
    "biases": BIASES,
    "qk-norm": {"qk_norm": True, "head_dim": 24},
    "everything": BIASES | {"qk_norm": True, "num_kv_heads": 1},
    # Queries that see the same keys share a read of them.
    "heads of 32": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32},
    "heads of 64": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
    # No size is a multiple of a vector register's.
    "nine-heads": {"hidden_size": 90, "num_heads": 9, "num_kv_heads": 3, "head_dim": 10, "intermediate_size": 101},
}
any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
any_chunks = pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 8, 10]], ids=["prefill", "decode", "chunks"])


def make_engine(
    decoder: Decoder,
    precision: TorchPrecision = "fp32",
    *,
    max_batch: int = 8,
    max_length: int = 128,
    draft: Draft | None = None,
    ranges: Ranges | None = None,
    device: str = "cpu",
) -> TorchEngine:
    return target_engine(
        decoder,
        precision=precision,
        max_batch=max_batch,
        max_length=max_length,
        draft=draft,
        ranges=ranges,
        device=device,
    )


def step(
    engine: TorchEngine,
    ids_BT: Tensor,
    positions: list[int],
    gather: list[int] | None = None,
    features: Tensor | None = None,
    *,
    counts: list[int] | None = None,
    features_out: bool = False,
    first_row: int = 0,
) -> StepOutput:
    """A step that gathers every row unless told otherwise."""
    gather_rows_R = torch.arange(ids_BT.numel()) if gather is None else torch.tensor(gather, dtype=torch.int64)
    return engine.step(
        ids_BT,
        torch.tensor(positions, dtype=torch.int32),
        gather_rows_R,
        features,
        count_B=None if counts is None else torch.tensor(counts, dtype=torch.int32),
        features_out=features_out,
        first_row=first_row,
    )


def run_chunks(engine: TorchEngine, ids_BT: Tensor, chunks: list[int], first_row: int = 0) -> Tensor:
    """Logits [B, T, V] of whole sequences run a chunk at a time."""
    batch, start, logits = len(ids_BT), 0, []
    for size in chunks:
        out = step(engine, ids_BT[:, start : start + size], [start] * batch, first_row=first_row)
        logits.append(out.logits_RV.view(batch, size, -1))
        start += size
    return torch.cat(logits, dim=1)


def run_ragged(engine: TorchEngine, ids_BT: Tensor, starts: list[int], stops: list[int]) -> list[Tensor]:
    """One step over [start, stop) of each row, padded with other tokens; logits of each row's own tokens."""
    width = max(stop - start for start, stop in zip(starts, stops, strict=True))
    padded_BT = tiny_ids(len(ids_BT), width, seed=99)
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        padded_BT[b, : stop - start] = ids_BT[b, start:stop]
    logits = step(engine, padded_BT, starts).logits_RV.view(len(ids_BT), width, -1)
    return [logits[b, : stop - start] for b, (start, stop) in enumerate(zip(starts, stops, strict=True))]


# --- fp32 -----------------------------------------------------------------------------------------------------------


@any_shape
@any_chunks
def test_any_chunks_equal_the_whole_window(shape: dict[str, Any], chunks: list[int]) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(3, 24)
    logits = run_chunks(make_engine(decoder), ids_BT, chunks)
    assert relative_error(logits, whole_window(decoder, ids_BT)[1]) < 1e-5


def test_hidden_states_are_those_before_the_final_norm() -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(2, 9)
    out = step(make_engine(decoder), ids_BT, [0, 0])
    assert relative_error(out.hidden_RH, whole_window(decoder, ids_BT)[0].flatten(0, 1)) < 1e-5


RAGGED_STARTS, RAGGED_STOPS = [0, 0, 0], [[5, 1, 9], [6, 11, 10], [14, 12, 24]]


@any_shape
def test_ragged_rows_equal_each_row_alone(shape: dict[str, Any]) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(3, 24)
    expected = whole_window(decoder, ids_BT)[1]
    engine, starts = make_engine(decoder), RAGGED_STARTS
    for stops in RAGGED_STOPS:
        for b, found in enumerate(run_ragged(engine, ids_BT, starts, stops)):
            assert relative_error(found, expected[b, starts[b] : stops[b]]) < 1e-5
        starts = stops


def test_rollback_is_stepping_from_an_earlier_position() -> None:
    decoder, first, second = tiny_decoder(), tiny_ids(2, 20, seed=1), tiny_ids(2, 20, seed=2)
    engine = make_engine(decoder)
    step(engine, first, [0, 0])
    # Fewer tokens than were dropped: what is left of those must stay unseen.
    step(engine, second[:, 6:9], [6, 6])
    out = step(engine, second[:, 9:11], [9, 9])
    expected = whole_window(decoder, torch.cat((first[:, :6], second[:, 6:11]), dim=1))[1][:, 9:]
    assert relative_error(out.logits_RV, expected.flatten(0, 1)) < 1e-5


def test_rows_roll_back_by_themselves() -> None:
    decoder, first, second = tiny_decoder(), tiny_ids(2, 20, seed=1), tiny_ids(2, 20, seed=2)
    engine = make_engine(decoder)
    step(engine, first, [0, 0])
    out = step(engine, second[:, :4], [15, 3]).logits_RV.view(2, 4, -1)
    for b, start in enumerate((15, 3)):
        expected = whole_window(decoder, torch.cat((first[b : b + 1, :start], second[b : b + 1, :4]), dim=1))[1]
        assert relative_error(out[b], expected[0, start:]) < 1e-5


@pytest.mark.parametrize("gather", [[7, 0, 3], [2, 2, 2], [5]])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_gathered_rows_come_in_the_order_asked_for(gather: list[int], precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(2, 4)
    every = step(make_engine(decoder, precision), ids_BT, [0, 0])
    some = step(make_engine(decoder, precision), ids_BT, [0, 0], gather)
    assert relative_error(some.logits_RV, every.logits_RV[gather]) < 1e-5
    assert torch.equal(some.hidden_RH, every.hidden_RH[gather])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_step_that_gathers_nothing_fills_the_cache(precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(2, 8)
    engine, other = make_engine(decoder, precision), make_engine(decoder, precision)
    out = step(engine, ids_BT, [0, 0], [])
    assert out.logits_RV.shape == (0, 112) and out.logits_RV.dtype == torch.float32
    assert out.hidden_RH.shape == (0, 64) and out.features_BTF is None
    assert out.reject_prob_R is None and out.token_R is None
    step(other, ids_BT, [0, 0])
    assert torch.equal(engine.cache.keys, other.cache.keys) and torch.equal(engine.cache.values, other.cache.values)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_first_row_steps_only_its_rows(precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(5, 10)
    engine = make_engine(decoder, precision, max_batch=5)
    step(engine, ids_BT, [0] * 5)
    before = engine.cache.keys.clone(), engine.cache.values.clone()
    other = tiny_ids(2, 3, seed=5)
    out = step(engine, other, [10, 7], first_row=2).logits_RV.view(2, 3, -1)
    for cache, kept in zip((engine.cache.keys, engine.cache.values), before, strict=True):
        assert torch.equal(cache[:, [0, 1, 4]], kept[:, [0, 1, 4]])
        assert torch.equal(cache[:, 2, :, :10], kept[:, 2, :, :10])
        assert torch.equal(cache[:, 3, :, :7], kept[:, 3, :, :7])
        assert not torch.equal(cache[:, 3, :, 7:10], kept[:, 3, :, 7:10])
    alone = make_engine(decoder, precision, max_batch=1)
    step(alone, ids_BT[3:4], [0])
    assert relative_error(out[1], step(alone, other[1:], [7]).logits_RV) < 1e-5


@pytest.mark.parametrize(("source", "dest"), [(0, 2), (2, 0), (1, 1)])
def test_move_row(source: int, dest: int) -> None:
    decoder, ids_BT, length = tiny_decoder(), tiny_ids(3, 12), 8
    engine = make_engine(decoder)
    step(engine, ids_BT, [0, 0, 0])
    keys = engine.cache.keys.clone()
    engine.move_row(source, dest, length)
    rest = [row for row in range(3) if row != dest]
    assert torch.equal(engine.cache.keys[:, rest], keys[:, rest])
    assert torch.equal(engine.cache.keys[:, dest, :, length:], keys[:, dest, :, length:])
    out = step(engine, ids_BT[source : source + 1, length:], [length], first_row=dest)
    expected = whole_window(decoder, ids_BT[source : source + 1])[1][0, length:]
    assert relative_error(out.logits_RV, expected) < 1e-5


def assert_same_cache(found: TorchEngine, expected: TorchEngine) -> None:
    assert torch.equal(found.cache.keys, expected.cache.keys)
    assert torch.equal(found.cache.values, expected.cache.values)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_reading_and_writing_the_cache_is_moving_a_row(precision: TorchPrecision) -> None:
    """In pieces, one of them empty."""
    engine, moved = (make_engine(tiny_decoder(), precision, max_batch=3) for _ in range(2))
    for each in (engine, moved):
        step(each, tiny_ids(3, 12), [0, 0, 0])
    for start, stop in ((3, 8), (3, 3), (0, 3)):
        engine.write_cache(0, start, engine.read_cache(2, start, stop))
    moved.move_row(2, 0, 8)
    assert_same_cache(engine, moved)
    ids_BT = tiny_ids(1, 3, seed=5)
    assert torch.equal(step(engine, ids_BT, [8]).logits_RV, step(moved, ids_BT, [8]).logits_RV)


def test_what_was_read_outlives_its_row() -> None:
    engine, moved = (make_engine(tiny_decoder(), max_batch=3) for _ in range(2))
    for each in (engine, moved):
        step(each, tiny_ids(3, 12), [0, 0, 0])
    moved.move_row(1, 2, 9)
    held = engine.read_cache(1, 0, 9)
    for each in (engine, moved):
        step(each, tiny_ids(1, 12, seed=5), [0], first_row=1)
    engine.write_cache(2, 0, held)
    assert_same_cache(engine, moved)


# --- Padding --------------------------------------------------------------------------------------------------------


def without_a_compiler(precision: TorchPrecision) -> TorchEngine:
    return without_stages(make_engine(tiny_decoder(), precision, max_batch=4))


def tapped_engine(precision: TorchPrecision) -> TorchEngine:
    decoder = tiny_decoder(**BIASES)
    return make_engine(decoder, precision, max_batch=4, draft=make_draft(decoder, "conditioned", (0, 1)))


def scored_draft(kind: DraftKind, precision: TorchPrecision) -> TorchEngine:
    weight_F = torch.randn(67, generator=torch.Generator().manual_seed(0)) / 5
    return make_draft_engine(
        make_draft(tiny_decoder(), kind, (0, 1)), precision, Scorer(weight_F, torch.tensor(0.3), True)
    )


RAGGED_ENGINES: dict[str, Callable[[], TorchEngine]] = {
    "fp32": lambda: tapped_engine("fp32"),
    "bf16": lambda: tapped_engine("bf16"),
    "int4": lambda: tapped_engine("int4"),
    "int8": lambda: tapped_engine("int8"),
    "int8-no-compiler": lambda: without_a_compiler("int8"),
    "int4-no-compiler": lambda: without_a_compiler("int4"),
    "fp32-conditioned": lambda: scored_draft("conditioned", "fp32"),
    "int8-conditioned": lambda: scored_draft("conditioned", "int8"),
    "int8-standalone": lambda: scored_draft("standalone", "int8"),
    "int4-conditioned": lambda: scored_draft("conditioned", "int4"),
}


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 2, 0], [5, 5, 5], [1, 1, 1], [0, 4, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("make", RAGGED_ENGINES.values(), ids=RAGGED_ENGINES)
def test_what_padding_is_told_changes_nothing(make: Callable[[], TorchEngine], counts: list[int]) -> None:
    """To the last bit: outputs of the rows' own tokens, the cache up to them, and the step after. Fused stages leave
    padding out."""
    padded, told, positions = make(), make(), [6, 4, 2]
    features_BTF = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)) if padded.num_features else None
    for engine in (padded, told):
        step(engine, tiny_ids(4, 7), [0] * 4, features=None if features_BTF is None else features_BTF[:, :7])
    before = told.cache.keys.clone()
    given = None if features_BTF is None else features_BTF[1:, 2:7] * 2  # no copy: rows that do not lie side by side
    own = [(b, t) for b, count in enumerate(counts) for t in range(count)]
    gather = [5 * b + t for b, t in own[::-1] + own[:1]]
    settings: dict[str, Any] = {"features": given, "features_out": padded.tap is not None, "first_row": 1}
    expected = step(padded, tiny_ids(3, 5, seed=2), positions, gather, **settings)
    found = step(told, tiny_ids(3, 5, seed=2), positions, gather, counts=counts, **settings)
    for name in ("hidden_RH", "logits_RV", "reject_prob_R", "token_R"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    if padded.tap is not None:
        assert found.features_BTF is not None and expected.features_BTF is not None
        assert found.features_BTF.shape == expected.features_BTF.shape
        for b, t in own:
            assert torch.equal(found.features_BTF[b, t], expected.features_BTF[b, t])
    lengths = [position + count for position, count in zip(positions, counts, strict=True)]
    for row, length in ((0, 7), *enumerate(lengths, start=1)):
        assert torch.equal(told.cache.keys[:, row, :, :length], padded.cache.keys[:, row, :, :length])
        assert torch.equal(told.cache.values[:, row, :, :length], padded.cache.values[:, row, :, :length])
        if told.fused is not None:
            assert torch.equal(told.cache.keys[:, row, :, length:], before[:, row, :, length:])
    given = None if given is None else given[:, :1]
    after = [step(engine, tiny_ids(3, 1, seed=3), lengths, features=given, first_row=1) for engine in (padded, told)]
    assert torch.equal(after[1].logits_RV, after[0].logits_RV)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_what_padding_holds_is_not_seen(precision: TorchPrecision) -> None:
    first, second = (make_engine(tiny_decoder(), precision) for _ in range(2))
    ids_BT, counts = tiny_ids(2, 5), [2, 4]
    other_BT = tiny_ids(2, 5, seed=9)
    for b, count in enumerate(counts):
        other_BT[b, :count] = ids_BT[b, :count]
    gather = [0, 1, 5, 6, 7, 8]
    expected = step(first, ids_BT, [0, 0], gather, counts=counts)
    assert torch.equal(step(second, other_BT, [0, 0], gather, counts=counts).logits_RV, expected.logits_RV)


# --- What cannot be -------------------------------------------------------------------------------------------------


def test_the_cache_can_be_filled_to_its_last_position() -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(2, 16)
    logits = run_chunks(make_engine(decoder, max_batch=2, max_length=16), ids_BT, [10, 6])
    assert relative_error(logits, whole_window(decoder, ids_BT)[1]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_step_beyond_the_cache(precision: TorchPrecision) -> None:
    engine = make_engine(tiny_decoder(), precision, max_batch=2, max_length=16)
    with pytest.raises(EngineError, match="writes slot 16, the cache holds 16"):
        step(engine, tiny_ids(2, 4), [0, 13])
    with pytest.raises(EngineError, match="step of rows 0 to 2, the engine's cache has 2"):
        step(engine, tiny_ids(3, 1), [0, 0, 0])
    with pytest.raises(EngineError, match="step of rows 1 to 2"):
        step(engine, tiny_ids(2, 1), [0, 0], first_row=1)
    assert not engine.cache.keys.any()


@pytest.mark.parametrize(
    ("position", "gather", "first_row", "named"),
    [
        (torch.tensor([0, 0, 0], dtype=torch.int32), [0], 0, r"first_slot has shape \(3,\), the step has 2 rows"),
        (torch.tensor([0], dtype=torch.int32), [0], 0, r"first_slot has shape \(1,\), the step has 2 rows"),
        (torch.tensor([0, 0]), [0], 0, "first_slot must be int32 and not negative, got torch.int64"),
        (torch.tensor([0, -1], dtype=torch.int32), [0], 0, r"not negative, got torch.int32 \[0, -1\]"),
        (torch.tensor([0, 0], dtype=torch.int32), [6], 0, r"gather_rows \[6\] lie outside the step's 6 rows"),
        (torch.tensor([0, 0], dtype=torch.int32), [0, -1], 0, "lie outside the step's 6 rows"),
        (torch.tensor([0, 0], dtype=torch.int32), [0], -1, "first_row -1 is negative"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_indices_that_point_elsewhere(
    precision: TorchPrecision, position: Tensor, gather: list[int], first_row: int, named: str
) -> None:
    """Compiled code reads and writes where they say."""
    engine = make_engine(tiny_decoder(), precision, max_batch=2, max_length=16)
    with pytest.raises(EngineError, match=named):
        engine.step(tiny_ids(2, 3), position, torch.tensor(gather), first_row=first_row)
    assert not engine.cache.keys.any()


OUT_OF_RANGE = "count must be int32, 0 to 3 for each of 2 rows, got torch"


@pytest.mark.parametrize(
    ("count", "gather", "named"),
    [
        (torch.tensor([1], dtype=torch.int32), [0], rf"{OUT_OF_RANGE}.int32 \[1\]"),
        (torch.tensor([1, 1, 1], dtype=torch.int32), [0], OUT_OF_RANGE),
        (torch.tensor([[1, 1]], dtype=torch.int32), [0], OUT_OF_RANGE),
        (torch.tensor([], dtype=torch.int32), [], OUT_OF_RANGE),
        (torch.tensor(1, dtype=torch.int32), [0], OUT_OF_RANGE),
        (torch.tensor([1, 1]), [0], f"{OUT_OF_RANGE}.int64"),
        (torch.tensor([1.0, 1.0]), [0], f"{OUT_OF_RANGE}.float32"),
        (torch.tensor([1, -1], dtype=torch.int32), [0], OUT_OF_RANGE),
        (torch.tensor([4, 1], dtype=torch.int32), [0], OUT_OF_RANGE),
        (
            torch.tensor([1, 3], dtype=torch.int32),
            [0, 1, 2],
            r"gather_rows \[1, 2\] are padding: .* \[1, 3\] tokens of 3",
        ),
        (torch.tensor([3, 0], dtype=torch.int32), [2, 3], r"gather_rows \[3\] are padding"),
        (torch.tensor([3, 2], dtype=torch.int32), [5], r"gather_rows \[5\] are padding"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_counts_that_cannot_be(precision: TorchPrecision, count: Tensor, gather: list[int], named: str) -> None:
    engine = make_engine(tiny_decoder(), precision, max_batch=2, max_length=16)
    position, gathered = torch.tensor([0, 0], dtype=torch.int32), torch.tensor(gather, dtype=torch.int64)
    with pytest.raises(EngineError, match=named):
        engine.step(tiny_ids(2, 3), position, gathered, count_B=count)
    assert not engine.cache.keys.any()


def test_cache_longer_than_the_model_can_see() -> None:
    with pytest.raises(EngineError, match="max length 513 exceeds the model's 512 positions"):
        make_engine(tiny_decoder(), max_length=513)


def test_unknown_precision() -> None:
    with pytest.raises(EngineError, match="'fp64' is unknown; known: fp32, bf16, int8, int4"):
        make_engine(tiny_decoder(), "fp64")  # type: ignore[arg-type]


def test_features_must_be_what_the_engine_takes() -> None:
    decoder = tiny_decoder()
    conditioned, ids_BT = make_draft_engine(make_draft(decoder, "conditioned", (0,))), tiny_ids(2, 3)
    with pytest.raises(EngineError, match=r"features_in has shape None, expected \(2, 3, 64\)"):
        step(conditioned, ids_BT, [0, 0])
    with pytest.raises(EngineError, match=r"features_in has shape \(2, 4, 64\), expected \(2, 3, 64\)"):
        step(conditioned, ids_BT, [0, 0], features=torch.zeros(2, 4, 64))
    with pytest.raises(EngineError, match=r"features_in has shape \(2, 3, 64\), expected None"):
        step(make_engine(decoder), ids_BT, [0, 0], features=torch.zeros(2, 3, 64))


def test_features_out_needs_a_tap() -> None:
    with pytest.raises(EngineError, match=r"features_out: .* without the tap"):
        step(make_engine(tiny_decoder()), tiny_ids(1, 2), [0], features_out=True)


# --- The caller's network stays as it is ----------------------------------------------------------------------------


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def ranges_of(decoder: Decoder) -> Ranges:
    return activation_ranges(decoder, lambda: whole_window(decoder, tiny_ids(4, 32, seed=7)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_engines_leave_the_decoder_as_it_is(precision: TorchPrecision) -> None:
    decoder = tiny_decoder(qk_norm=True, qkv_bias=True)
    before, ids_BT = state_of(decoder), tiny_ids(1, 5)
    expected = whole_window(decoder, ids_BT)[1]
    step(make_engine(decoder, precision, ranges=ranges_of(decoder)), ids_BT, [0])
    assert_unchanged(decoder, before)
    assert torch.equal(whole_window(decoder, ids_BT)[1], expected)


def test_int8_engine_leaves_mlp_biases_as_they_are() -> None:
    decoder = tiny_decoder(**BIASES)
    before = state_of(decoder)
    make_engine(decoder, "int8", ranges=ranges_of(decoder))
    assert_unchanged(decoder, before)


# --- Smoothing ------------------------------------------------------------------------------------------------------


def with_outliers(decoder: Decoder) -> Decoder:
    """The same network with a few channels a hundred times as large as the rest before every smoothed product."""
    outliers = torch.tensor([1, 17, 40])
    layers: list[Any] = list(decoder.layers)
    for layer in layers:
        inner = layer.down.in_features
        for norm, linear in ((layer.attn_norm, layer.qkv), (layer.mlp_norm, layer.gate_up)):
            norm.weight[outliers] *= 100
            linear.weight[:, outliers] /= 100
        layer.gate_up.weight[inner + outliers] *= 100
        if layer.gate_up.bias is not None:
            layer.gate_up.bias[inner + outliers] *= 100
        layer.down.weight[:, outliers] /= 100
    decoder.norm.weight[outliers] *= 100
    decoder.lm_head.weight[:, outliers] /= 100
    return decoder


@any_shape
def test_smoothing_keeps_the_function(shape: dict[str, Any]) -> None:
    decoder, ids_BT = tiny_decoder(**(shape | {"tie_embeddings": False})), tiny_ids(2, 16)
    decoder = with_outliers(decoder)
    smoothed = copy.deepcopy(decoder)
    list(smoothed_parts(smoothed, ranges_of(decoder)))
    assert not torch.equal(smoothed.lm_head.weight, decoder.lm_head.weight)
    assert relative_error(whole_window(smoothed, ids_BT)[1], whole_window(decoder, ids_BT)[1]) < 1e-4


def test_smoothing_a_tied_head_leaves_the_embedding() -> None:
    decoder = tiny_decoder(tie_embeddings=True)
    expected, embedding = whole_window(decoder, tiny_ids(1, 8))[1], decoder.embed.weight.clone()
    list(smoothed_parts(decoder, ranges_of(decoder)))
    assert torch.equal(decoder.embed.weight, embedding)
    assert relative_error(whole_window(decoder, tiny_ids(1, 8))[1], expected) < 1e-4


@torch.no_grad()
def test_smoothing_a_join_keeps_its_function() -> None:
    torch.manual_seed(0)
    join, norms = nn.Linear(48, 8, bias=False), [nn.RMSNorm(32), nn.RMSNorm(16)]
    first, second = torch.randn(5, 32), torch.randn(5, 16) * 10

    def run() -> Tensor:
        return join(torch.cat((norms[0](first), norms[1](second)), dim=-1))

    expected = run()
    smooth_join(join, norms, activation_ranges(nn.ModuleDict({"join": join}), run)["join"])
    assert not torch.equal(norms[0].weight, torch.ones(32)) and not torch.equal(norms[1].weight, torch.ones(16))
    assert relative_error(run(), expected) < 1e-5


def test_ranges_are_the_largest_magnitudes_of_each_input() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    first, second = torch.tensor([[1.0, -7.0, 0.5]]), torch.tensor([[[-2.0, 3.0, 0.0], [0.0, 0.0, -4.0]]])
    ranges = activation_ranges(module, lambda: (module(first), module(second)))
    assert ranges.keys() == {"0", "2"}
    assert torch.equal(ranges["0"], torch.tensor([2.0, 7.0, 4.0]))
    assert not module[0]._forward_pre_hooks


def test_smoothing_wins_back_what_outliers_cost_int8() -> None:
    decoder, ids_BT = with_outliers(tiny_decoder()), tiny_ids(2, 32)
    expected = whole_window(decoder, ids_BT)[1].flatten(0, 1)
    plain = step(make_engine(decoder, "int8"), ids_BT, [0, 0])
    smoothed = step(make_engine(decoder, "int8", ranges=ranges_of(decoder)), ids_BT, [0, 0])
    assert relative_error(plain.logits_RV, expected) > 0.3
    assert relative_error(smoothed.logits_RV, expected) < 0.12


# --- as stored ------------------------------------------------------------------------------------------------------


def stored(kind: torch.dtype) -> tuple[Decoder, Decoder]:
    """A decoder in fp32, and the same one in the type that its checkpoint has. With biases and norms of queries and
    keys."""
    spec = tiny_spec(family="qwen3", qk_norm=True, **BIASES)
    torch.manual_seed(0)
    weights = {name: random_weight(name, shape).to(kind) for name, shape in spec.weight_shapes().items()}
    return Decoder.from_weights(spec, weights), Decoder.from_weights(spec, weights, dtype=None)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("smooth", [True, False], ids=["smoothed", "plain"])
def test_engines_of_what_is_stored_and_of_fp32_are_the_same(
    kind: torch.dtype, precision: TorchPrecision, smooth: bool
) -> None:
    fp32, as_stored = stored(kind)
    assert as_stored.layers[0].qkv.weight.dtype == kind
    before = {name: weight.clone() for name, weight in as_stored.state_dict().items()}
    ranges = ranges_of(fp32) if smooth else None
    outs = []
    for decoder in (fp32, as_stored):
        torch.manual_seed(5)
        draft = Draft(draft_spec(decoder.spec, "conditioned", (0, 1), 48)).requires_grad_(False)
        for name, parameter in draft.named_parameters():
            parameter.copy_(random_weight(name, tuple(parameter.shape)))
        draft.share_target(decoder, torch.arange(48))
        engines = {"precision": precision, "max_batch": 2, "max_length": 32}
        target = target_engine(decoder, draft=draft, ranges=ranges, **engines)
        out = step(target, tiny_ids(2, 9), [0, 0], features=None, features_out=True)
        outs += [out.logits_RV, out.features_BTF]
        if kind == torch.bfloat16:  # in which the rows of its LM head are the target's
            outs.append(
                step(draft_engine(draft, **engines), tiny_ids(2, 9), [0, 0], features=out.features_BTF).logits_RV
            )
    half = len(outs) // 2
    assert all(torch.equal(one, other) for one, other in zip(outs[:half], outs[half:], strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in as_stored.state_dict().items())


def test_what_runs_in_int8_is_not_held_in_fp32() -> None:
    spec = tiny_spec(vocab_size=2048)
    torch.manual_seed(0)
    weights = {name: random_weight(name, shape).bfloat16() for name, shape in spec.weight_shapes().items()}
    engine = make_engine(Decoder.from_weights(spec, weights, dtype=None), "int8")
    held = {name: weight for name, weight in engine.decoder.named_parameters() if weight.dim() > 1}
    assert held.keys() == {"embed.weight"}
    assert held["embed.weight"].dtype == torch.bfloat16, "a row is converted when it is looked up"


def test_loading_leaves_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    make_engine(tiny_decoder(), "int8")
    assert torch.get_num_threads() == threads
    with pytest.raises(KeyError, match="qkv"):
        make_engine(tiny_decoder(), "int8", ranges={"lm_head": torch.ones(64)})
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_cache_takes_memory_where_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    cache = KVCache(tiny_spec(), 8, 65536, torch.float32, "cpu")
    size = 2 * cache.keys.numel() * cache.keys.element_size()
    assert size == 256 << 20
    assert resident() - before < size // 8
    assert not cache.keys[:, 3, :, 60000:].any() and not cache.values[1, 7].any()
    cache.write(5, 100, torch.ones(2, 2, 2, 3, 16))
    assert cache.read(5, 99, 104).sum() == 2 * 2 * 2 * 3 * 16
    cache.move_row(5, 6, 128)
    assert torch.equal(cache.read(6, 0, 128), cache.read(5, 0, 128))
    assert resident() - before < size // 2


any_packed = pytest.mark.parametrize("precision", ["int8", "int4"])


# --- int8 and int4 on a CPU -----------------------------------------------------------------------------------------


def assert_equal_but_for_flips(found_RX: Tensor, expected_RX: Tensor) -> None:
    """Two orders of adding in fp32 differ in the seventh digit, and where a value lies between two levels they round it
    apart. One such flip is worth up to a tenth of a row and of what attends to it, but most rows have none."""
    error_R = (found_RX - expected_RX).norm(dim=-1) / expected_RX.norm(dim=-1)
    assert error_R.median() < 1e-5
    assert error_R.max() < 0.25


def fused_and_not(
    decoder: Decoder, precision: TorchPrecision, draft: Draft | None = None
) -> tuple[TorchEngine, TorchEngine]:
    fused, modules = (make_engine(decoder, precision, draft=draft) for _ in range(2))
    assert fused.fused is not None, "runtime/engines/_cpu.c was not compiled"
    return fused, without_stages(modules)


def without_stages(engine: TorchEngine, scorer: Scorer | None = None) -> TorchEngine:
    engine.fused, engine._score = None, scorer
    return engine


@any_packed
@any_shape
@any_chunks
def test_fused_layers_equal_their_modules(precision: TorchPrecision, shape: dict[str, Any], chunks: list[int]) -> None:
    fused, modules = fused_and_not(tiny_decoder(**shape), precision)
    ids_BT = tiny_ids(8, 24)
    assert_equal_but_for_flips(
        run_chunks(fused, ids_BT, chunks).flatten(0, 1), run_chunks(modules, ids_BT, chunks).flatten(0, 1)
    )


@any_packed
@any_shape
def test_fused_layers_equal_their_modules_on_ragged_rows(precision: TorchPrecision, shape: dict[str, Any]) -> None:
    ids_BT, logits = tiny_ids(8, 24), []
    for engine in fused_and_not(tiny_decoder(**shape), precision):
        starts, rows = [0] * 8, []
        for stops in (row[:2] + row * 2 for row in RAGGED_STOPS):
            rows += run_ragged(engine, ids_BT, starts, stops)
            starts = stops
        logits.append(torch.cat(rows))
    assert_equal_but_for_flips(*logits)


@any_packed
@any_shape
def test_fused_layers_equal_their_modules_on_long_sequences(precision: TorchPrecision, shape: dict[str, Any]) -> None:
    fused, modules = fused_and_not(tiny_decoder(**shape), precision)
    ids_BT = tiny_ids(8, 83)
    found, expected = (run_chunks(engine, ids_BT, [80, 1, 1, 1]).flatten(0, 1) for engine in (fused, modules))
    assert_equal_but_for_flips(found, expected)


@any_packed
@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("shape", [{}, BIASES], ids=["plain", "biases"])
def test_fused_layers_tap_what_their_modules_do(
    precision: TorchPrecision, layers: tuple[int, ...], shape: dict[str, Any]
) -> None:
    decoder, ids_BT = tiny_decoder(num_layers=3, **shape), tiny_ids(8, 6)
    fused, modules = fused_and_not(decoder, precision, make_draft(decoder, "conditioned", layers))
    found, expected = (step(engine, ids_BT, [0] * 8, features_out=True) for engine in (fused, modules))
    assert found.features_BTF is not None and expected.features_BTF is not None
    assert_equal_but_for_flips(found.features_BTF.flatten(0, 1), expected.features_BTF.flatten(0, 1))
    assert_equal_but_for_flips(found.hidden_RH, expected.hidden_RH)
    assert_equal_but_for_flips(found.logits_RV, expected.logits_RV)
    # Asking for features changes nothing else.
    assert torch.equal(step(fused, ids_BT, [0] * 8).logits_RV, found.logits_RV)


@any_packed
@torch.inference_mode()
@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("shape", [{}, BIASES, SHAPES["nine-heads"]], ids=["plain", "biases", "nine-heads"])
def test_a_fused_draft_equals_its_modules(precision: TorchPrecision, shape: dict[str, Any], uses_hidden: bool) -> None:
    decoder = tiny_decoder(**shape)
    draft, hidden = make_draft(decoder, "conditioned", (0, 1)), decoder.spec.hidden_size
    scorer = Scorer(torch.randn(3 + hidden * uses_hidden) / 8, torch.tensor(-0.3), uses_hidden)
    fused = make_draft_engine(draft, precision, scorer)
    modules = without_stages(make_draft_engine(draft, precision, scorer), scorer)
    ids_BT, features_BTF = tiny_ids(4, 12), torch.randn(4, 12, hidden) * 20
    given = features_BTF.clone()
    for at in (slice(0, 9), slice(9, 10), slice(10, 12)):
        found, expected = (
            step(engine, ids_BT[:, at], [at.start] * 4, features=features_BTF[:, at]) for engine in (fused, modules)
        )
        assert_equal_but_for_flips(found.hidden_RH, expected.hidden_RH)
        assert_equal_but_for_flips(found.logits_RV, expected.logits_RV)
        assert found.reject_prob_R is not None
        rescored_R = scorer(found.hidden_RH, found.logits_RV).reject_prob_R
        assert torch.allclose(found.reject_prob_R, rescored_R, rtol=1e-4, atol=1e-6)
    assert torch.equal(features_BTF, given)


@torch.inference_mode()
@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 1000, 16384])
def test_fused_scorer_equals_the_scorer(vocab: int, uses_hidden: bool) -> None:
    torch.manual_seed(vocab)
    rows, hidden = 9, 33
    logits_RV = torch.randn(rows, vocab) * torch.tensor([0.0, 1e-3, 1, 1, 3, 10, 40, 100, 1000])[:, None]
    logits_RV[2] += 500
    logits_RV[3, vocab // 2] = logits_RV[3, 0] = logits_RV[3].max() + 1  # a tie at the top
    logits_RV[4, vocab // 3 + 1 :] = -torch.inf
    hidden_RH = torch.randn(rows, hidden) * torch.tensor([1.0, 1e-4, 0, 30, 1, 1, 1, 1, 1])[:, None]
    scorer = Scorer(torch.randn(3 + hidden * uses_hidden) / 8, torch.tensor(0.2), uses_hidden)
    found = FusedScorer(scorer)(hidden_RH, logits_RV)
    assert torch.allclose(found, scorer(hidden_RH, logits_RV).reject_prob_R, rtol=2e-4, atol=1e-6)
    log_p_RV = logits_RV.double().clamp(min=-1e6).log_softmax(dim=1)
    top_R2 = log_p_RV.topk(min(vocab, 2)).values
    confidence = torch.stack(
        (
            (-torch.expm1(top_R2[:, 0])).clamp(min=1e-7).log(),
            -(log_p_RV.exp() * log_p_RV).sum(dim=1),
            (top_R2[:, 0] - top_R2[:, 1]).clamp(max=1e4) if vocab > 1 else torch.full((rows,), 1e4).double(),
        ),
        dim=1,
    )
    state = hidden_RH.double() / (hidden_RH.double().square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    features = torch.cat((state, confidence), dim=1) if uses_hidden else confidence
    expected = torch.sigmoid(features @ scorer.weight_F.double() + scorer.bias)
    assert torch.allclose(found.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("logits", [[3.0], [-torch.inf, 0.5], [0.0, 1e30, -torch.inf], [-9e3, 0.0]], ids=str)
def test_fused_scorer_bounds_the_margin_as_the_scorer_does(logits: list[float]) -> None:
    """With a weight that does not drown in the sigmoid."""
    scorer = Scorer(torch.tensor([0.0, 0.0, 1e-4]), torch.tensor(-0.5), False)
    hidden_RH, logits_RV = torch.zeros(1, 4), torch.tensor([logits])
    assert torch.allclose(FusedScorer(scorer)(hidden_RH, logits_RV), scorer(hidden_RH, logits_RV).reject_prob_R)


@any_shape
def test_int8_is_near_fp32(shape: dict[str, Any]) -> None:
    """Tolerance: 63 levels to either side leave an error of about one percent to each of the nine products of two
    layers and the head; random weights without outliers or redundancy turn that into 3 to 8 percent of the logits."""
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(3, 24)
    logits = run_chunks(make_engine(decoder, "int8"), ids_BT, [24])
    assert relative_error(logits, whole_window(decoder, ids_BT)[1]) < 0.12


@any_packed
@any_shape
@any_chunks
def test_packed_weights_give_the_same_to_the_bit_in_any_chunks(
    precision: TorchPrecision, shape: dict[str, Any], chunks: list[int]
) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(2, 24)
    together = run_chunks(make_engine(decoder, precision), ids_BT, [12, 12])
    assert torch.equal(run_chunks(make_engine(decoder, precision), ids_BT, chunks), together)


@any_packed
@any_shape
def test_packed_rows_do_not_see_their_neighbours(precision: TorchPrecision, shape: dict[str, Any]) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(3, 24)
    engine, starts = make_engine(decoder, precision), RAGGED_STARTS
    alone = [run_chunks(make_engine(decoder, precision), ids_BT[b : b + 1], [1] * 24)[0] for b in range(3)]
    for stops in RAGGED_STOPS:
        for b, found in enumerate(run_ragged(engine, ids_BT, starts, stops)):
            assert torch.equal(found, alone[b][starts[b] : stops[b]])
        starts = stops


@any_packed
@pytest.mark.parametrize("shape", ["grouped", "heads of 64"])
def test_packed_weights_give_the_same_to_the_bit_on_long_sequences(precision: TorchPrecision, shape: str) -> None:
    decoder, ids_BT = tiny_decoder(**SHAPES[shape]), tiny_ids(2, 83)
    expected = run_chunks(make_engine(decoder, precision), ids_BT, [1] * 83)
    assert torch.equal(run_chunks(make_engine(decoder, precision), ids_BT, [80, 3]), expected)


@any_packed
def test_packed_rows_do_not_see_how_long_their_neighbours_are(precision: TorchPrecision) -> None:
    decoder, long, short = tiny_decoder(), tiny_ids(7, 108), tiny_ids(1, 8)
    engine = make_engine(decoder, precision)
    run_chunks(engine, long[:, :100], [10] * 10)
    found = step(engine, torch.cat((long[:, 100:], short)), [100] * 7 + [0]).logits_RV[-8:]
    assert torch.equal(found, step(make_engine(decoder, precision), short, [0]).logits_RV)


@any_packed
@any_shape
def test_packed_does_not_depend_on_the_number_of_threads(
    precision: TorchPrecision, shape: dict[str, Any], two_threads: None
) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(2, 24)
    on_two = run_chunks(make_engine(decoder, precision), ids_BT, [16, 1, 7])
    torch.set_num_threads(1)
    assert torch.equal(run_chunks(make_engine(decoder, precision), ids_BT, [1, 23]), on_two)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@any_packed
def test_packed_rollback_is_exact(precision: TorchPrecision) -> None:
    decoder, first, second = tiny_decoder(), tiny_ids(2, 20, seed=1), tiny_ids(2, 20, seed=2)
    engine, fresh = make_engine(decoder, precision), make_engine(decoder, precision)
    run_chunks(engine, first, [20])
    found = step(engine, second[:, 6:10], [6, 6])
    step(fresh, first[:, :6], [0, 0])
    assert torch.equal(found.logits_RV, step(fresh, second[:, 6:10], [6, 6]).logits_RV)


@any_packed
def test_packed_gathered_rows_are_the_same_to_the_bit(precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(2, 8)
    every = step(make_engine(decoder, precision), ids_BT, [0, 0]).logits_RV
    for row in range(16):
        assert torch.equal(step(make_engine(decoder, precision), ids_BT, [0, 0], [row]).logits_RV[0], every[row])


@any_packed
def test_packed_features_are_the_same_to_the_bit(precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(1, 8)
    draft = make_draft(decoder, "conditioned", (0, 1))
    engine, together = make_engine(decoder, precision, draft=draft), make_engine(decoder, precision, draft=draft)
    expected = step(together, ids_BT, [0], features_out=True).features_BTF
    single = [step(engine, ids_BT[:, t : t + 1], [t], features_out=True).features_BTF for t in range(8)]
    assert expected is not None and torch.equal(torch.cat(single, dim=1), expected)  # type: ignore[arg-type]


@any_packed
def test_packed_steps_may_grow_and_shrink(precision: TorchPrecision) -> None:
    decoder, ids_BT = tiny_decoder(), tiny_ids(4, 60)
    engine, chunks = make_engine(decoder, precision), [1, 2, 5, 6, 1, 20, 3, 22]
    assert_equal_but_for_flips(
        run_chunks(engine, ids_BT, chunks).flatten(0, 1),
        run_chunks(make_engine(decoder, precision), ids_BT, [20, 20, 20]).flatten(0, 1),
    )


# --- int4 and bf16 --------------------------------------------------------------------------------------------------


def rounded_to_int4(weight_OI: Tensor) -> Tensor:
    """Each run of 32 inputs in 16 levels from its smallest to its largest value, scale and smallest being fp16."""
    rounded = weight_OI.clone()
    for start in range(0, weight_OI.shape[1], 32):
        group = weight_OI[:, start : start + 32]
        low, high = group.min(dim=1, keepdim=True).values, group.max(dim=1, keepdim=True).values
        scale, low = ((high - low) / 15).half().float(), low.half().float()
        rounded[:, start : start + 32] = ((group - low) / scale).round().clamp(0, 15) * scale + low
    return rounded


def rounded_to_int8(weight_OI: Tensor) -> Tensor:
    scale = weight_OI.abs().max(dim=1, keepdim=True).values / 127
    return (weight_OI / scale).round() * scale


def with_rounded(decoder: Decoder, precision: TorchPrecision) -> Decoder:
    """With the weights that a precision has; the LM head has 8 bits in int4 too."""
    decoder = copy.deepcopy(decoder)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            rounded = rounded_to_int4 if precision == "int4" and name != "lm_head" else rounded_to_int8
            module.weight = nn.Parameter(rounded(module.weight))
    return decoder.requires_grad_(False)


@any_shape
@any_packed
def test_packed_weights_are_rounded_weights(shape: dict[str, Any], precision: TorchPrecision) -> None:
    """But for the rounding of activations, in blocks of 32 to 127 levels either side."""
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(2, 24)
    expected = whole_window(with_rounded(decoder, precision), ids_BT)[1]
    logits = run_chunks(make_engine(decoder, precision), ids_BT, [10, 1, 13])
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < 4e-2
    if precision == "int4":
        assert relative_error(logits, whole_window(decoder, ids_BT)[1]) > 6e-2  # the rounding itself is larger


@any_packed
def test_elsewhere_than_on_the_cpu_weights_are_rounded_alike(
    precision: TorchPrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ids_BT = tiny_decoder(**BIASES), tiny_ids(2, 24)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch_engine, "_is_cpu", lambda _: False)
        engine = make_engine(decoder, precision)
    logits = run_chunks(engine, ids_BT, [24])
    expected = run_chunks(make_engine(with_rounded(decoder, precision), "bf16"), ids_BT, [24])
    assert torch.equal(logits, expected)


@any_shape
def test_bf16_is_near_fp32(shape: dict[str, Any]) -> None:
    decoder, ids_BT = tiny_decoder(**shape), tiny_ids(2, 24)
    engine = make_engine(decoder, "bf16")
    logits = run_chunks(engine, ids_BT, [10, 1, 13])
    assert engine.cache.keys.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert relative_error(logits, whole_window(decoder, ids_BT)[1]) < 3e-2


# --- Drafts ---------------------------------------------------------------------------------------------------------


def make_draft(target: Decoder, kind: DraftKind, layers: tuple[int, ...], head_size: int | None = 48) -> Draft:
    """A draft of random weights over a random choice of the target's tokens."""
    torch.manual_seed(5)
    draft = Draft(draft_spec(target.spec, kind, layers, head_size)).requires_grad_(False)
    for name, parameter in draft.named_parameters():
        parameter.copy_(random_weight(name, tuple(parameter.shape)))
    draft.share_target(target, torch.randperm(target.spec.vocab_size)[: draft.spec.head_size])
    return draft


def make_draft_engine(
    draft: Draft, precision: TorchPrecision = "fp32", scorer: Scorer | None = None, ranges: Ranges | None = None
) -> TorchEngine:
    return draft_engine(draft, precision=precision, max_batch=4, max_length=64, scorer=scorer, ranges=ranges)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def draft_reference(draft: Draft, ids_BT: Tensor, features_BTF: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of whole windows, by hand up to the decoder's layers."""
    decoder = copy.deepcopy(draft.decoder)
    x_BTH = decoder.embed.weight[ids_BT]
    if features_BTF is not None:
        eps = decoder.spec.rms_norm_eps
        token, feature = (
            rms_norm(x, norm.weight, eps) for x, norm in ((x_BTH, draft.embed_norm), (features_BTF, draft.feature_norm))
        )
        x_BTH = features_BTF + torch.cat((token, feature), dim=-1) @ draft.join.weight.T
    decoder.embed = nn.Embedding.from_pretrained(x_BTH.flatten(0, 1))
    numbers_BT = torch.arange(ids_BT.numel()).view(ids_BT.shape)  # each token is its own row of that embedding
    hidden, logits, _ = whole_window(decoder, numbers_BT)
    return hidden, logits


def test_target_features_are_the_tapped_layers_projected() -> None:
    target, ids_BT = tiny_decoder(num_layers=4), tiny_ids(2, 12)
    draft = make_draft(target, "conditioned", (2, 0))
    assert draft.tap is not None
    engine = make_engine(target, draft=draft)
    assert step(engine, ids_BT, [0, 0]).features_BTF is None
    features = step(engine, ids_BT, [0, 0], [0], features_out=True).features_BTF
    assert features is not None and features.shape == (2, 12, 64)
    tapped = whole_window(target, ids_BT, (0, 2))[2]
    assert tapped is not None
    assert relative_error(features, tapped @ draft.tap.project.weight.T) < 1e-5


def test_standalone_draft() -> None:
    target, ids_BT = tiny_decoder(), tiny_ids(2, 12)
    draft = make_draft(target, "standalone", (0, 1))
    engine = make_draft_engine(draft)
    hidden, logits = draft_reference(draft, ids_BT, None)
    assert engine.num_features == 0 and engine.vocab_size == 48
    assert engine.token_ids_V is not None and torch.equal(engine.token_ids_V, draft.token_ids)
    assert relative_error(run_chunks(engine, ids_BT, [7, 1, 4]), logits) < 1e-5
    assert relative_error(step(engine, ids_BT, [0, 0]).hidden_RH, hidden.flatten(0, 1)) < 1e-5


def test_logits_of_the_draft_are_those_of_its_token_ids() -> None:
    target, ids_BT = tiny_decoder(), tiny_ids(1, 6)
    draft, full = make_draft(target, "standalone", (0, 1)), make_draft(target, "standalone", (0, 1), None)
    full.share_target(target, torch.arange(112))
    full.load_state_dict({k: v for k, v in draft.own_state().items() if k != "token_ids"}, strict=False)
    some, every = make_draft_engine(draft), make_draft_engine(full)
    assert some.token_ids_V is not None and every.token_ids_V is None
    expected = step(every, ids_BT, [0]).logits_RV[:, some.token_ids_V]
    assert relative_error(step(some, ids_BT, [0]).logits_RV, expected) < 1e-5


def test_a_whole_vocabulary_in_another_order_keeps_its_token_ids() -> None:
    target = tiny_decoder()
    draft = make_draft(target, "standalone", (0,), None)
    engine = make_draft_engine(draft)
    assert engine.vocab_size == 112 and engine.token_ids_V is not None
    assert torch.equal(engine.token_ids_V, draft.token_ids)


def test_conditioned_draft() -> None:
    target, ids_BT = tiny_decoder(num_layers=3), tiny_ids(2, 12)
    draft = make_draft(target, "conditioned", (0, 2))
    engine = make_draft_engine(draft)
    assert engine.num_features == 64
    features = step(make_engine(target, draft=draft), ids_BT, [0, 0], features_out=True).features_BTF
    assert features is not None
    hidden, logits = draft_reference(draft, ids_BT, features)
    first = step(engine, ids_BT[:, :7], [0, 0], features=features[:, :7])
    second = step(engine, ids_BT[:, 7:], [7, 7], features=features[:, 7:])
    assert relative_error(first.logits_RV, logits[:, :7].flatten(0, 1)) < 1e-5
    assert relative_error(second.logits_RV, logits[:, 7:].flatten(0, 1)) < 1e-5
    assert relative_error(second.hidden_RH, hidden[:, 7:].flatten(0, 1)) < 1e-5


def test_conditioned_draft_on_its_own_hidden_states() -> None:
    target, ids_BT = tiny_decoder(num_layers=3), tiny_ids(1, 9)
    draft, features = make_draft(target, "conditioned", (1,)), torch.randn(1, 6, 64)
    engine = make_draft_engine(draft)
    out = step(engine, ids_BT[:, :6], [0], [5], features)
    for position in range(6, 9):
        features = torch.cat((features, out.hidden_RH[None]), dim=1)
        out = step(engine, ids_BT[:, position : position + 1], [position], features=features[:, -1:])
    _, logits = draft_reference(draft, ids_BT, features)
    assert relative_error(out.logits_RV, logits[0, 8:]) < 1e-5


def reject_prob_by_hand(scorer: Scorer, hidden_RH: Tensor, logits_RV: Tensor) -> Tensor:
    p_RV = logits_RV.double().softmax(dim=-1)
    p1, p2 = p_RV.topk(2, dim=-1).values.unbind(dim=-1)
    entropy = -(p_RV * p_RV.log()).sum(dim=-1)
    features = torch.stack(((1 - p1).log(), entropy, p1.log() - p2.log()), dim=-1)
    if scorer.uses_hidden:
        hidden = hidden_RH.double()
        features = torch.cat((hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt(), features), dim=-1)
    return 1 / (1 + (-(features @ scorer.weight_F.double() + scorer.bias.double())).exp())


@pytest.mark.parametrize("kind", ["standalone", "conditioned"])
@pytest.mark.parametrize("uses_hidden", [True, False])
def test_draft_tells_how_likely_a_rejection_is(kind: DraftKind, uses_hidden: bool) -> None:
    draft = make_draft(tiny_decoder(), kind, (0, 1))
    weight_F = torch.randn(67 if uses_hidden else 3, generator=torch.Generator().manual_seed(0)) / 5
    scorer = Scorer(weight_F, torch.tensor(0.3), uses_hidden)
    engine = make_draft_engine(draft, scorer=scorer)
    features = torch.randn(2, 5, 64) if draft.conditioned else None
    out = step(engine, tiny_ids(2, 5), [0, 0], [9, 2, 4], features)
    expected = reject_prob_by_hand(scorer, out.hidden_RH, out.logits_RV)
    assert out.reject_prob_R is not None and out.reject_prob_R.dtype == torch.float32
    assert float(expected.max() - expected.min()) > 0.01
    assert relative_error(out.reject_prob_R, expected) < 1e-5


@pytest.mark.parametrize("head", ["subset", "reordered", "whole"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_draft_with_a_scorer_tells_its_argmax(precision: TorchPrecision, head: str) -> None:
    """As an id of the target's vocabulary; the fused scorer does not look for it."""
    target = tiny_decoder()
    draft = make_draft(target, "standalone", (0, 1), 48 if head == "subset" else None)
    if head == "whole":
        draft.share_target(target, torch.arange(112))
    scorer = Scorer(torch.tensor([0.3, -0.2, 0.1]), torch.tensor(0.1), False)
    engine = make_draft_engine(draft, precision, scorer)
    assert (engine.token_ids_V is None) == (head == "whole")
    if precision in ("int8", "int4"):
        assert step(engine, tiny_ids(2, 5), [0, 0]).token_R is None
        without_stages(engine, scorer)
    out = step(engine, tiny_ids(2, 5), [0, 0], [9, 2, 4])
    assert out.token_R is not None and out.token_R.dtype == torch.int64
    assert out.token_R.tolist() == draft.token_ids[out.logits_RV.argmax(dim=1)].tolist()
    nothing = step(engine, tiny_ids(2, 5), [5, 5], [])
    assert nothing.token_R is not None and nothing.token_R.shape == (0,)
    assert nothing.reject_prob_R is not None and nothing.reject_prob_R.shape == (0,)


def test_engines_without_a_scorer_do_not_tell_their_argmax() -> None:
    target, ids_BT = tiny_decoder(), tiny_ids(2, 5)
    for engine in (make_engine(target), make_draft_engine(make_draft(target, "standalone", (0,)))):
        out = step(engine, ids_BT, [0, 0])
        assert out.token_R is None and out.reject_prob_R is None


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("int8", 0.12), ("int4", 0.4)])
@pytest.mark.parametrize("kind", ["standalone", "conditioned"])
def test_drafts_of_other_precisions(kind: DraftKind, precision: TorchPrecision, tolerance: float) -> None:
    draft, ids_BT = make_draft(tiny_decoder(), kind, (0, 1)), tiny_ids(2, 16)
    before = state_of(draft)
    features = torch.randn(2, 16, 64) if draft.conditioned else None
    out = step(make_draft_engine(draft, precision), ids_BT, [0, 0], features=features)
    assert relative_error(out.logits_RV, draft_reference(draft, ids_BT, features)[1].flatten(0, 1)) < tolerance
    assert_unchanged(draft, before)


@pytest.mark.parametrize("kind", ["standalone", "conditioned"])
def test_smoothed_int8_draft(kind: DraftKind) -> None:
    draft, ids_BT = make_draft(tiny_decoder(), kind, (0, 1)), tiny_ids(2, 16)
    with_outliers(draft.decoder)
    features = torch.randn(2, 16, 64) if draft.conditioned else None
    if draft.conditioned:
        draft.feature_norm.weight[3] *= 100
        draft.join.weight[:, 64 + 3] /= 100
    fp32, before = make_draft_engine(draft), state_of(draft)
    assert fp32.draft is not None
    ranges = activation_ranges(fp32.draft, lambda: step(fp32, ids_BT, [0, 0], features=features))
    expected = step(fp32, ids_BT, [0, 0], features=features).logits_RV
    plain = step(make_draft_engine(draft, "int8"), ids_BT, [0, 0], features=features).logits_RV
    smoothed = step(make_draft_engine(draft, "int8", ranges=ranges), ids_BT, [0, 0], features=features).logits_RV
    assert relative_error(smoothed, expected) < 0.12 < 0.3 < relative_error(plain, expected)
    assert_unchanged(draft, before)


def test_smoothed_int8_tap() -> None:
    target, ids_BT = tiny_decoder(num_layers=3), tiny_ids(2, 16)
    draft = make_draft(target, "conditioned", (0, 2))
    tap = draft.tap
    assert tap is not None
    # One channel of the residual stream far above the rest, as trained models have it; the tap barely looks at it.
    target.embed.weight[:, 5] += 200
    tap.project.weight[:, [5, 64 + 5]] /= 200
    tapped = whole_window(target, ids_BT, (0, 2))[2]
    assert tapped is not None
    expected = tapped @ tap.project.weight.T
    ranges = ranges_of(target) | {"tap.project": tapped.flatten(0, 1).abs().amax(dim=0)}
    before = state_of(draft)
    plain, smoothed = (
        step(make_engine(target, "int8", draft=draft, ranges=some), ids_BT, [0, 0], features_out=True).features_BTF
        for some in (None, ranges)
    )
    assert plain is not None and smoothed is not None
    assert relative_error(smoothed, expected) < 0.05
    assert relative_error(plain, expected) > 2 * relative_error(smoothed, expected)
    assert_unchanged(draft, before)
