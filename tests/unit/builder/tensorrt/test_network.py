"""The TensorRT network computes what the torch engine computes, and a network that is wrong does not.

That is seen for every family and precision, step by step. Networks are built by the real TensorRT for RTX and evaluated
by `network_interpreter`, which knows nothing of our builder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drive import drive, flat, names
from interpreted import interpreted_draft, interpreted_target
from quantized_weights import quantized_weights
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, tiny_spec, tiny_weights
from torch import Tensor
from wide import wide_draft

from ssv.builder.tensorrt import network
from ssv.builder.tensorrt.graph import Graph
from ssv.model.checkpoint import RopeScaling
from ssv.model.decoder import Decoder
from ssv.model.scorer import Scorer
from ssv.runtime.engines import kv_cache, tensorrt_engine
from ssv.runtime.engines.contract import Branches, EngineError
from ssv.runtime.engines.tensorrt_engine import TensorRTEngine
from ssv.runtime.engines.torch_engine import TorchEngine, draft_engine, target_engine

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
    "llama with biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "smollm2": {"tie_embeddings": True},
    "mistral": {"family": "mistral", "num_kv_heads": 4},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "num_kv_heads": 1},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32},
}
# fp16 has 11 bits, bf16 8. The quantized ones run in fp16 over the same quantized weights as the reference; inputs near
# the middle of two FP8 values are then rounded the other way, by up to 1/8 of themselves: that FP8 is right shows in
# fp32.
TOLERANCE = {"fp16": 1e-2, "bf16": 4e-2, "fp8": 8e-2, "int4": 1e-2}
EXACT = 1e-4


def pair(family: str, precision: str) -> tuple[Decoder, torch.dtype]:
    """A decoder whose weights the compute type holds exactly, and that type."""
    spec = tiny_spec(**FAMILIES[family])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    weights = {name: weight.to(dtype).float() for name, weight in tiny_weights(spec).items()}
    if precision in ("fp8", "int4"):
        weights = quantized_weights(spec, weights, precision)
    return Decoder.from_weights(spec, weights), dtype


def torch_target(decoder: Decoder, draft: Any = None) -> TorchEngine:
    return target_engine(decoder, precision="fp32", max_batch=3, max_length=64, draft=draft)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_target_equals_the_torch_engine(family: str, precision: str) -> None:
    decoder, dtype = pair(family, precision)
    found, expected = drive(interpreted_target(decoder, dtype)), drive(torch_target(decoder))
    for name in names():
        assert relative_error(flat(found, name), flat(expected, name)) < TOLERANCE[precision]
    assert torch.equal(flat(found, "token_R"), torch.cat([out.logits_RV.argmax(dim=1) for out in found]))


@pytest.mark.parametrize("precision", ["fp16", "fp8", "int4"])
def test_target_with_nothing_rounded_equals_it_to_the_last_digits(precision: str) -> None:
    decoder, _ = pair("llama with biases", precision)
    found, expected = drive(interpreted_target(decoder, torch.float32)), drive(torch_target(decoder))
    for name in names():
        assert relative_error(flat(found, name), flat(expected, name)) < EXACT


def test_target_with_a_tap_returns_the_drafts_features() -> None:
    decoder = tiny_decoder()
    draft = random_draft(decoder, "conditioned")
    found = drive(interpreted_target(decoder, torch.float16, draft), features_out=True)
    expected = drive(torch_target(decoder, draft), features_out=True)
    for name in names(features_out=True):
        assert relative_error(flat(found, name), flat(expected, name)) < 1e-2


@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_draft_and_scorer_equal_the_torch_engine(kind: Any, uses_hidden: bool) -> None:
    draft = random_draft(tiny_decoder(), kind)
    scorer = tiny_scorer(uses_hidden)
    found = drive(interpreted_draft(draft, torch.float16, scorer))
    expected = drive(draft_engine(draft, precision="fp32", max_batch=3, max_length=64, scorer=scorer))
    for name in names():
        assert relative_error(flat(found, name), flat(expected, name)) < 1e-2
    assert (flat(found, "reject_prob_R") - flat(expected, "reject_prob_R")).abs().max() < 2e-2
    logits = torch.cat([out.logits_RV for out in found])
    assert torch.equal(flat(found, "token_R"), draft.token_ids[logits.argmax(dim=1)])
    # The scorer itself is exact: what differs above is the draft's fp16.
    own = torch.cat([scorer(out.hidden_RH, out.logits_RV).reject_prob_R for out in found])
    assert (flat(found, "reject_prob_R") - own).abs().max() < 1e-5


def test_a_draft_of_five_taps_with_a_corrected_head_equals_the_torch_engine() -> None:
    decoder = tiny_decoder(num_layers=7)
    draft, _ = wide_draft(decoder)
    found = drive(interpreted_target(decoder, torch.float16, draft), features_out=True)
    expected = drive(torch_target(decoder, draft), features_out=True)
    for name in names(features_out=True):
        assert relative_error(flat(found, name), flat(expected, name)) < 1e-2
    found = drive(interpreted_draft(draft, torch.float16, tiny_scorer(True)))
    expected = drive(draft_engine(draft, precision="fp32", max_batch=3, max_length=64, scorer=tiny_scorer(True)))
    for name in (*names(), "reject_prob_R"):
        assert relative_error(flat(found, name), flat(expected, name)) < 2e-2


@pytest.mark.parametrize("uses_hidden", [True, False, None], ids=["hidden", "confidence", "no scorer"])
def test_a_draft_tells_its_tokens_probability_with_and_without_a_scorer(uses_hidden: bool | None) -> None:
    scorer = tiny_scorer(uses_hidden) if uses_hidden is not None else None
    engine = interpreted_draft(random_draft(tiny_decoder(), "standalone"), torch.float16, scorer)
    runner, outputs = engine._runner, []

    class Noting:
        def run(self, profile: int, inputs: Any) -> dict[str, Tensor]:
            outputs.append(runner.run(profile, inputs))
            return outputs[-1]

    engine._runner = Noting()
    engine.step(tiny_ids(2, 4), at(0, 0), rows(0, 3, 5, 7))
    (found,) = outputs
    assert found.keys() == {"hidden", "logits", "token", "token_prob"} | ({"reject_prob"} if scorer else set())
    torch.testing.assert_close(found["token_prob"], found["logits"].softmax(dim=1).amax(dim=1))


def tiny_scorer(uses_hidden: bool) -> Scorer:
    torch.manual_seed(4)
    return Scorer(torch.randn(3 + 64 * uses_hidden) * 0.2, torch.tensor(0.3), uses_hidden)


def test_a_huge_first_token_does_not_overflow_fp16() -> None:
    # As in SmolLM2, whose residual stream carries 24,000 at the first token: squares and the tap's sums exceed 65,504.
    decoder = tiny_decoder()
    decoder.embed.weight[:, 5] = 20000.0
    draft = random_draft(decoder, "conditioned")
    found = drive(interpreted_target(decoder, torch.float16, draft), features_out=True)
    expected = drive(torch_target(decoder, draft), features_out=True)
    for name in names(features_out=True):
        assert relative_error(flat(found, name), flat(expected, name)) < 1e-2


def test_a_draft_that_is_sure_keeps_its_features_finite() -> None:
    decoder = tiny_decoder()
    draft = random_draft(decoder, "conditioned")
    draft.decoder.lm_head.weight *= 40
    scorer = Scorer(torch.tensor([1.0, 1.0, 0.1]), torch.tensor(0.0), False)
    found = drive(interpreted_draft(draft, torch.float16, scorer))
    own = torch.cat([scorer(out.hidden_RH, out.logits_RV).reject_prob_R for out in found])
    assert (flat(found, "reject_prob_R") - own).abs().max() < 1e-4


# --- Networks that are wrong ----------------------------------------------------------------------------------------


def mask_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(slot_BT: Tensor, num_slots: int, branches: Branches | None = None) -> Tensor:
        return kv_cache.visible(slot_BT + 1, num_slots, branches)

    monkeypatch.setattr(tensorrt_engine, "visible", visible)


def rope_halves_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotary(self: Graph, x: Any, cos: Any, sin: Any, position: Any) -> Any:
        layer = self.network.add_rotary_embedding(x, cos, sin, True, 0)
        layer.set_input(3, position)
        return layer.get_output(0)

    monkeypatch.setattr(Graph, "rotary", rotary)


def query_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "query_scale", lambda head_dim: 1.0)


def norm_without_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    over_rms = Graph.over_rms
    monkeypatch.setattr(Graph, "over_rms", lambda self, x, eps: over_rms(self, x, 1e-9))


def keys_and_values_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Graph.attention
    monkeypatch.setattr(Graph, "attention", lambda self, q, k, v, mask: attention(self, q, v, k, mask))


def input_factor_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Graph._awq_product

    def forgetful(self: Graph, x: Any, layer: Any) -> Any:
        factor, layer.input_factor_I = layer.input_factor_I, None
        try:
            return product(self, x, layer)
        finally:
            layer.input_factor_I = factor

    monkeypatch.setattr(Graph, "_awq_product", forgetful)


def nibbles_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Graph._awq_product

    def exchanged(self: Graph, x: Any, layer: Any) -> Any:
        packed = layer.packed_PI
        layer.packed_PI = (packed >> 4) | (packed << 4)
        try:
            return product(self, x, layer)
        finally:
            layer.packed_PI = packed

    monkeypatch.setattr(Graph, "_awq_product", exchanged)


WRONG = {
    mask_off_by_one: "fp16",
    rope_halves_swapped: "fp16",
    query_not_scaled: "fp16",
    norm_without_epsilon: "fp16",
    keys_and_values_exchanged: "fp16",
    input_factor_forgotten: "int4",
    nibbles_exchanged: "int4",
}


@pytest.mark.parametrize("breaks", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_network_is_caught(breaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = WRONG[breaks]
    decoder, _ = pair("llama", precision)
    breaks(monkeypatch)
    found, expected = drive(interpreted_target(decoder, torch.float32)), drive(torch_target(decoder))
    assert relative_error(flat(found, "logits_RV"), flat(expected, "logits_RV")) > 100 * EXACT


# --- The engine over it ---------------------------------------------------------------------------------------------


def runs_of(engine: TensorRTEngine) -> list[tuple[int, tuple[int, ...], int]]:
    return engine._runner.runs  # type: ignore[attr-defined]


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def at(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def test_steps_take_the_narrowest_profile_and_are_cut_to_it() -> None:
    engine = interpreted_target(tiny_decoder(), torch.float16)
    engine.step(tiny_ids(3, 1), at(0, 0, 0), rows(0, 1, 2))
    engine.step(tiny_ids(2, 5), at(1, 1), rows(0, 4, 9))
    engine.step(tiny_ids(1, 40), at(6), rows())
    engine.step(tiny_ids(1, 18), at(6), rows(*range(18)))
    assert runs_of(engine) == [
        (0, (3, 1), 3),
        (1, (2, 5), 4),
        (1, (1, 16), 1),
        (1, (1, 16), 1),
        (1, (1, 8), 1),
        *[(1, (1, 5), 5)] * 3,
        (1, (1, 3), 3),
    ]


def test_steps_beyond_the_cache_are_refused_before_they_run() -> None:
    engine = interpreted_target(tiny_decoder(), torch.float16)
    with pytest.raises(EngineError, match="writes slot 64, the cache holds 64"):
        engine.step(tiny_ids(1, 5), at(60), rows(0))
    with pytest.raises(EngineError, match="without the tap"):
        engine.step(tiny_ids(1, 5), at(0), rows(0), features_out=True)
    assert not runs_of(engine)


def test_rows_move_within_the_cache() -> None:
    engine = interpreted_target(tiny_decoder(), torch.float16)
    engine.step(tiny_ids(1, 6), at(0), rows(), first_row=2)
    expected = engine.step(tiny_ids(1, 1), at(6), rows(0), first_row=2).logits_RV
    engine.move_row(2, 0, 6)
    assert torch.equal(engine.step(tiny_ids(1, 1), at(6), rows(0)).logits_RV, expected)
