"""Drafts: how they start, and that what is stored is what comes back, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, tiny_spec, whole_window
from torch import Tensor

from ssv.builder.training.passes import CausalAttend
from ssv.model.checkpoint import CheckpointError, RopeScaling
from ssv.model.decoder import Decoder
from ssv.model.draft import (
    Draft,
    DraftKind,
    DraftSpec,
    draft_spec,
    grow_draft,
    load_draft,
    load_draft_head,
    save_draft,
    start_from_target,
)
from ssv.support.errors import UserError

any_kind = pytest.mark.parametrize("kind", ["conditioned", "standalone"])


@torch.no_grad()
def logits_of(draft: Draft) -> Tensor:
    """Logits of two windows; the features of a conditioned draft go through its tap."""
    ids_M, position_M = tiny_ids(20), torch.arange(10).repeat(2)
    features_MF = None
    if draft.tap is not None:
        tapped_MX = torch.randn(20, draft.tap.project.in_features, generator=torch.Generator().manual_seed(3))
        features_MF = draft.tap.project(tapped_MX)
    return draft.logits(draft.run_layers(ids_M, features_MF, position_M, CausalAttend(2)))


# --- How a draft starts ---------------------------------------------------------------------------------------------


def test_standalone_draft_of_all_layers_is_its_target() -> None:
    target, token_ids = tiny_decoder(mlp_bias=True), torch.tensor([5, 111, 0, 7])
    draft = start_from_target(draft_spec(target.spec, "standalone", (0, 1), 4), target, (0, 1), token_ids)
    expected = whole_window(target, tiny_ids(20).view(2, 10))[1].flatten(0, 1)[:, token_ids]
    assert relative_error(logits_of(draft), expected) < 1e-5


def test_standalone_draft_takes_the_layers_named() -> None:
    target = tiny_decoder(num_layers=4)
    draft = start_from_target(draft_spec(target.spec, "standalone", (3, 0), None), target, (3, 0), torch.arange(112))
    for mine, source in zip(draft.decoder.layers, (3, 0), strict=True):
        assert all(map(torch.equal, mine.parameters(), target.layers[source].parameters()))


def test_conditioned_draft_starts_as_the_last_layer_of_its_target() -> None:
    target, token_ids = tiny_decoder(num_layers=3), torch.tensor([5, 111, 0, 7])
    draft = start_from_target(draft_spec(target.spec, "conditioned", (1, 0), 4), target, (1, 0), token_ids)
    assert draft.tap is not None and draft.tap.layers == (0, 1)
    ids_BT = tiny_ids(2, 10)
    _, logits, tapped = whole_window(target, ids_BT, (0, 1))
    assert tapped is not None
    features_MF = draft.tap.project(tapped.flatten(0, 1))
    hidden = draft.run_layers(ids_BT.flatten(), features_MF, torch.arange(10).repeat(2), CausalAttend(2))
    assert relative_error(draft.logits(hidden).detach(), logits.flatten(0, 1)[:, token_ids]) < 1e-5


@any_kind
def test_a_started_draft_is_a_copy(kind: DraftKind) -> None:
    target = tiny_decoder()
    draft = start_from_target(draft_spec(target.spec, kind, (0, 1), 48), target, (0, 1), torch.arange(48))
    for parameter in draft.decoder.layers.parameters():
        parameter.data.zero_()
    assert all(parameter.any() for parameter in target.layers.parameters())
    assert not draft.decoder.embed.weight.requires_grad and not draft.decoder.lm_head.weight.requires_grad


def test_draft_of_layers_that_the_target_lacks() -> None:
    with pytest.raises(UserError, match=r"layers \[2\]: .* 0 to 1"):
        draft_spec(tiny_spec(), "conditioned", (2,), None)
    with pytest.raises(UserError, match="name at least one"):
        draft_spec(tiny_spec(), "standalone", (), None)


def test_head_larger_than_the_vocabulary() -> None:
    with pytest.raises(UserError, match="head_size 113 exceeds the target's vocab_size 112"):
        draft_spec(tiny_spec(), "standalone", (0,), 113)


# --- Round trip -----------------------------------------------------------------------------------------------------


@any_kind
@pytest.mark.parametrize("head_size", [48, None])
def test_round_trip(kind: DraftKind, head_size: int | None, tmp_path: Path) -> None:
    target = tiny_decoder(qkv_bias=True, qk_norm=True)
    draft = random_draft(target, kind, head_size)
    save_draft(draft, tmp_path / "draft.safetensors", torch.float32)
    loaded = load_draft(tmp_path / "draft.safetensors", target)
    assert loaded.spec == draft.spec
    assert loaded.token_ids.dtype == torch.int64 and torch.equal(loaded.token_ids, draft.token_ids)
    assert torch.equal(logits_of(loaded), logits_of(draft))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@any_kind
def test_round_trip_in_bf16(kind: DraftKind, tmp_path: Path) -> None:
    target, path, again = tiny_decoder(), tmp_path / "draft.safetensors", tmp_path / "again.safetensors"
    draft = random_draft(target, kind)
    save_draft(draft, path)
    loaded = load_draft(path, target)
    for name, value in draft.own_state().items():
        expected = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected)
    assert relative_error(logits_of(loaded), logits_of(draft)) < 3e-2
    save_draft(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_rope_scaling_survives(tmp_path: Path) -> None:
    target = tiny_decoder(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8))
    draft = random_draft(target, "standalone")
    save_draft(draft, tmp_path / "draft.safetensors", torch.float32)
    assert torch.equal(logits_of(load_draft(tmp_path / "draft.safetensors", target)), logits_of(draft))


@any_kind
def test_what_the_target_has_is_not_stored_again(kind: DraftKind, tmp_path: Path) -> None:
    target = tiny_decoder()
    save_draft(random_draft(target, kind), tmp_path / "draft.safetensors")
    assert not [name for name in load_file(tmp_path / "draft.safetensors") if "embed." in name or "lm_head" in name]
    loaded = load_draft(tmp_path / "draft.safetensors", target)
    assert loaded.decoder.embed.weight.data_ptr() == target.embed.weight.data_ptr()
    assert torch.equal(loaded.decoder.lm_head.weight, target.lm_head.weight[loaded.token_ids])


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A good draft of `tiny_decoder()`, for the tests to damage."""
    save_draft(random_draft(tiny_decoder(), "conditioned"), tmp_path / "draft.safetensors")
    return tmp_path / "draft.safetensors"


def change(path: Path, weights: Callable[[dict[str, Tensor]], object], **spec: Any) -> None:
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["ssv_draft"]) | spec
    state = load_file(path)
    weights(state)
    save_file(state, path, metadata={"ssv_draft": json.dumps(data)})


def test_draft_of_another_vocabulary(stored: Path) -> None:
    with pytest.raises(CheckpointError, match="draft vocab_size 112 != target vocab_size 128: distill"):
        load_draft(stored, tiny_decoder(vocab_size=128))


def test_draft_of_another_hidden_size(stored: Path) -> None:
    with pytest.raises(CheckpointError, match="draft hidden_size 64 != target hidden_size 96: distill"):
        load_draft(stored, tiny_decoder(hidden_size=96))


def test_draft_of_a_deeper_target(stored: Path) -> None:
    with pytest.raises(CheckpointError, match="draft taps layer 1, the target has 1"):
        load_draft(stored, tiny_decoder(num_layers=1))


JOIN = "join.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda w: w.pop(JOIN), f"weight {JOIN}"),
    "renamed": (lambda w: w.update({"joint.weight": w.pop(JOIN)}), f"weight {JOIN}"),
    "unknown": (lambda w: w.update({"extra.weight": torch.zeros(2)}), "weight extra.weight"),
    "misshapen": (lambda w: w.update({JOIN: w[JOIN][:-1].clone()}), f"weight {JOIN}"),
    "no token ids": (lambda w: w.pop("token_ids"), "weight token_ids"),
    "token too large": (lambda w: w["token_ids"].fill_(112), "token_ids outside the vocabulary of 112"),
    "token twice": (lambda w: w["token_ids"].fill_(7), "token_ids name a token twice"),
    "token negative": (lambda w: w["token_ids"].fill_(-1), "token_ids outside the vocabulary of 112"),
}


@pytest.mark.parametrize(("weights", "named"), DAMAGE.values(), ids=DAMAGE)
def test_refused_weights(stored: Path, weights: Callable[[dict[str, Tensor]], object], named: str) -> None:
    change(stored, weights)
    with pytest.raises(CheckpointError, match=rf"draft\.safetensors: .*{named}"):
        load_draft(stored, tiny_decoder())


def test_refused_specs(stored: Path) -> None:
    target, decoder = tiny_decoder(), tiny_spec(num_layers=1).to_dict()
    change(stored, lambda _: None, kind="medusa")
    with pytest.raises(CheckpointError, match="draft kind 'medusa' is unknown; known: conditioned, standalone"):
        load_draft(stored, target)
    change(stored, lambda _: None, kind="conditioned", decoder=decoder | {"colour": "red"})
    with pytest.raises(CheckpointError, match="unknown field in decoder spec: colour"):
        load_draft(stored, target)
    change(stored, lambda _: None, decoder=decoder, head_size=50)
    with pytest.raises(CheckpointError, match="weight token_ids"):
        load_draft(stored, target)
    change(stored, lambda _: None, head_size=48, kind="standalone", feature_layers=[])
    with pytest.raises(CheckpointError, match=r"weight embed_norm\.weight of shape .* is unknown"):
        load_draft(stored, target)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_layers", [1, 0]),
        ("feature_layers", [-1]),
        ("feature_layers", [0, 0]),
        ("feature_layers", []),
        ("feature_layers", 3),
        ("head_size", 0),
        ("head_size", 113),
        ("head_size", "all"),
        ("decoder", "small"),
        ("colour", "red"),
        ("eagle3", {"target_hidden_size": 0}),
        ("eagle3", {"target_hidden_size": 64, "tap_norm": "all"}),
        ("eagle3", {"target_hidden_size": 64, "norm_output": "yes"}),
        ("eagle3", {"target_hidden_size": 64, "depth": 2}),
        ("eagle3", {}),
        ("own_embedding", "yes"),
        ("own_lm_head", None),
    ],
)
def test_malformed_specs(stored: Path, field: str, value: object) -> None:
    change(stored, lambda _: None, **{field: value})
    with pytest.raises(CheckpointError, match=r"draft|decoder"):
        load_draft(stored, tiny_decoder())


def test_metadata_that_is_not_json(stored: Path) -> None:
    save_file(load_file(stored), stored, metadata={"ssv_draft": "{"})
    with pytest.raises(CheckpointError, match="metadata is not JSON"):
        load_draft(stored, tiny_decoder())


@pytest.mark.parametrize("field", ["kind", "decoder", "feature_layers", "head_size"])
def test_spec_names_what_it_lacks(field: str) -> None:
    data = draft_spec(tiny_spec(), "conditioned", (0,), 48).to_dict()
    assert DraftSpec.from_dict(json.loads(json.dumps(data))).to_dict() == data
    del data[field]
    with pytest.raises(CheckpointError, match=f"draft spec lacks {field}"):
        DraftSpec.from_dict(data)


@pytest.mark.parametrize("kept", [0, 50, 5000, -1])
def test_truncated_file(stored: Path, kept: int) -> None:
    stored.write_bytes(stored.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"draft\.safetensors cannot be read .* truncated"):
        load_draft(stored, tiny_decoder())


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        load_draft(tmp_path / "none.safetensors", tiny_decoder())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_that_are_no_draft(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "scorer.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="is not a draft: build one with `ssv-build distill`"):
        load_draft(tmp_path / "scorer.safetensors", tiny_decoder())


def test_head_is_read_without_the_target(tmp_path: Path) -> None:
    draft = random_draft(tiny_decoder(), "conditioned")
    save_draft(draft, tmp_path / "draft.safetensors")
    head = load_draft_head(tmp_path / "draft.safetensors")
    assert head.spec == draft.spec
    assert torch.equal(head.token_ids, draft.token_ids)


# --- Half the room, and a corrected LM head ---------------------------------------------------------------------------


@any_kind
def test_int8_storage_is_near_and_comes_back_as_it_was_rounded(kind: DraftKind, tmp_path: Path) -> None:
    """By half a step of a group's scale at most; written again it is the same file."""
    target, path, again = tiny_decoder(hidden_size=96), tmp_path / "draft.safetensors", tmp_path / "again.safetensors"
    draft = random_draft(target, kind, head_rank=8)
    draft.decoder.get_submodule("layers.0.o").weight.data[5] = 0  # type: ignore[operator,index]
    save_draft(draft, path, storage="int8")
    loaded = load_draft(path, target, for_training=True)
    assert loaded.spec == draft.spec
    for name, value in draft.own_state().items():
        found = loaded.state_dict()[name]
        if value.dim() != 2 or not value.is_floating_point():
            assert torch.equal(found, value.bfloat16().float() if value.is_floating_point() else value), name
            continue
        assert load_file(path)[name].dtype == torch.int8
        for start in range(0, value.shape[1], 64):
            one, other = value[:, start : start + 64], found[:, start : start + 64]
            most = one.abs().amax(dim=1, keepdim=True) / 127
            # The scale is rounded to bf16, so that the largest may lie beyond 127 of them.
            assert ((one - other).abs() <= most * (0.51 + 127 / 256)).all(), name
    assert relative_error(logits_of(loaded), logits_of(draft)) < 3e-2
    save_draft(loaded, again, storage="int8")
    assert relative_error(logits_of(load_draft(again, target, for_training=True)), logits_of(loaded)) < 1e-2
    save_draft(draft, again)
    assert path.stat().st_size < 0.65 * again.stat().st_size


SCALE = "join.weight.group_scale"
STORED_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda w: w.pop(SCALE), "join.weight is int8 and has no scales"),
    "no matrix": (lambda w: w.pop(JOIN), f"{SCALE} has no int8 matrix"),
    "a matrix of another type": (lambda w: w.update({JOIN: w[JOIN].float()}), f"{SCALE} has no int8 matrix"),
    "fewer scales": (lambda w: w.update({SCALE: w[SCALE][:, :1].clone()}), rf"{SCALE} has shape \(64, 1\)"),
}


@pytest.mark.parametrize(("weights", "named"), STORED_DAMAGE.values(), ids=STORED_DAMAGE)
def test_refused_int8_storage(tmp_path: Path, weights: Callable[[dict[str, Tensor]], object], named: str) -> None:
    path = tmp_path / "draft.safetensors"
    save_draft(random_draft(tiny_decoder(), "conditioned"), path, storage="int8")
    change(path, weights)
    with pytest.raises(CheckpointError, match=rf"draft\.safetensors: .*{named}"):
        load_draft(path, tiny_decoder())


def test_a_corrected_head_is_added_up_where_a_draft_is_loaded(tmp_path: Path) -> None:
    target, path = tiny_decoder(), tmp_path / "draft.safetensors"
    draft = random_draft(target, "conditioned", head_rank=4)
    save_draft(draft, path, torch.float32)
    expected = logits_of(draft)
    apart, added = load_draft(path, target, for_training=True), load_draft(path, target)
    assert apart.spec == draft.spec and torch.equal(logits_of(apart), expected)
    assert added.head_in is None and added.head_out is None
    assert added.spec.head_rank == 0 and added.spec.own_lm_head
    assert relative_error(logits_of(added), expected) < 1e-5
    assert draft.head_in is not None and draft.head_out is not None
    change_VH = draft.head_out.weight @ draft.head_in.weight
    assert torch.allclose(added.decoder.lm_head.weight, target.lm_head.weight[draft.token_ids] + change_VH, atol=1e-5)
    assert torch.equal(target.lm_head.weight, tiny_decoder().lm_head.weight)
    # What was added up is its own from then on, and is stored.
    save_draft(added, path, torch.float32)
    assert torch.equal(logits_of(load_draft(path, target)), logits_of(added))


@pytest.mark.parametrize(("field", "value"), [("head_rank", -1), ("head_rank", 65), ("head_rank", "all")])
def test_malformed_ranks(stored: Path, field: str, value: object) -> None:
    change(stored, lambda _: None, **{field: value})
    with pytest.raises(CheckpointError, match=r"draft head_rank .* must lie between 0 and 64"):
        load_draft(stored, tiny_decoder())


def test_a_rank_above_the_hidden_size() -> None:
    with pytest.raises(UserError, match="head_rank 65 exceeds the target's hidden_size 64"):
        draft_spec(tiny_spec(), "conditioned", (0,), 48, head_rank=65)


# --- Growing ----------------------------------------------------------------------------------------------------------

GROWTHS: dict[str, dict[str, Any]] = {
    "taps": {"layers": (0, 1, 2, 3)},
    "layers": {"num_layers": 3},
    "rank": {"head_rank": 6},
    "all": {"layers": (0, 1, 3), "num_layers": 2, "head_rank": 6},
    "nothing": {},
}


@torch.no_grad()
def with_taps(draft: Draft, target: Decoder) -> Tensor:
    assert draft.tap is not None
    ids_BT = tiny_ids(2, 10)
    tapped_BTX = whole_window(target, ids_BT, draft.tap.layers)[2]
    assert tapped_BTX is not None
    features_MF = draft.tap(tapped_BTX.flatten(0, 1))
    hidden_MH = draft.run_layers(ids_BT.flatten(), features_MF, torch.arange(10).repeat(2), CausalAttend(2))
    return draft.logits(hidden_MH)


@pytest.mark.parametrize("growth", GROWTHS.values(), ids=GROWTHS)
def test_a_grown_draft_computes_what_it_did(growth: dict[str, Any]) -> None:
    target = tiny_decoder(num_layers=4)
    earlier = random_draft(target, "conditioned", layers=(1, 3))
    options = {"layers": (1, 3)} | growth
    spec = draft_spec(target.spec, "conditioned", options.pop("layers"), 48, **options)
    grown = grow_draft(earlier, spec, target)
    assert grown.spec == spec and torch.equal(grown.token_ids, earlier.token_ids)
    assert relative_error(with_taps(grown, target), with_taps(earlier, target)) < 1e-5
    # What is new is there to be trained.
    assert {name for name, p in grown.named_parameters() if not p.requires_grad} == {
        "decoder.embed.weight",
        "decoder.lm_head.weight",
    }


SHRUNK: dict[str, tuple[dict[str, Any], str]] = {
    "taps": ({"layers": (3,)}, "feature_layers"),
    "other taps": ({"layers": (0, 3)}, "feature_layers"),
    "layers": ({"num_layers": 1}, "num_layers"),
    "rank": ({"head_rank": 0}, "head_rank"),
    "another rank": ({"head_rank": 5}, "head_rank"),
    "head": ({"head_size": 40}, "head_size"),
    "join": ({"eagle3": True, "num_layers": 1, "head_rank": 0}, "eagle3 .*"),
}


@pytest.mark.parametrize(("shrunk", "named"), SHRUNK.values(), ids=SHRUNK)
def test_a_draft_does_not_grow_into_less_or_another(shrunk: dict[str, Any], named: str) -> None:
    target = tiny_decoder(num_layers=4)
    earlier = random_draft(target, "conditioned", layers=(1, 3), num_layers=2, head_rank=4)
    options = {"layers": (1, 3), "num_layers": 2, "head_rank": 4, "head_size": 48} | shrunk
    spec = draft_spec(target.spec, "conditioned", options.pop("layers"), options.pop("head_size"), **options)
    with pytest.raises(UserError, match=f"has another {named} ?than the recipe asks for"):
        grow_draft(earlier, spec, target)
