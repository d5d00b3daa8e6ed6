"""Published EAGLE-3 heads: what they compute, by a plain reimplementation; what is refused; and that what is exported
comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_heads import (
    DEPTH,
    FORMS,
    TEXT,
    Drafted,
    Published,
    assert_same,
    drafted_by_hand,
    loaded,
    published,
    target_for,
)
from tiny import random_draft, tiny_decoder, whole_window

from ssv.builder.training.passes import CausalAttend
from ssv.model.checkpoint import CheckpointError
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, draft_spec, start_from_target
from ssv.model.eagle3 import Layout, read_eagle3
from ssv.model.eagle3 import published as exported
from ssv.support.errors import UserError

any_layout = pytest.mark.parametrize("layout", ["eagle3", "speculators"])
any_form = pytest.mark.parametrize("form", FORMS)


@torch.no_grad()
def drafted(draft: Draft, target: Decoder) -> Drafted:
    """What the network drafts after the text, all of which is run again for each token."""
    assert draft.tap is not None
    _, _, tapped = whole_window(target, torch.tensor([TEXT]), draft.tap.layers)
    assert tapped is not None
    tokens, features_MF, found = TEXT[1:], draft.tap(tapped[0])[: len(TEXT) - 1], []
    for _ in range(DEPTH):
        position_M = torch.arange(len(tokens))
        hidden_MH = draft.run_layers(torch.tensor(tokens), features_MF, position_M, CausalAttend(1))
        logits_V = draft.logits(hidden_MH[-1:])[0]
        found.append((logits_V, int(draft.token_ids[logits_V.argmax()])))
        tokens, features_MF = [*tokens, found[-1][1]], torch.cat((features_MF, draft.carried(hidden_MH[-1:])))
    return found


# --- what they compute ----------------------------------------------------------------------------------------------


@any_layout
@any_form
def test_a_head_drafts_what_its_authors_code_does(layout: str, form: str, tmp_path: Path) -> None:
    target, head = target_for(form), published(layout, **FORMS[form])
    draft = loaded(head, target, tmp_path)
    assert_same(drafted(draft, target), drafted_by_hand(head, target), 1e-5)
    assert draft.token_ids.tolist() == head.token_ids
    assert draft.spec.decoder.max_positions == 512  # the target's: the head's config says 32


def test_a_layer_of_qwen3(tmp_path: Path) -> None:
    target, head = target_for("as in the paper"), published("speculators", family="qwen3")
    assert_same(drafted(loaded(head, target, tmp_path), target), drafted_by_hand(head, target), 1e-5)


def test_an_embedding_that_is_the_targets_is_not_stored_again(tmp_path: Path) -> None:
    target = target_for("own embedding")
    head = published("eagle3", embedding=target.embed.weight.detach().clone())
    draft = loaded(head, target, tmp_path)
    assert not draft.spec.own_embedding and draft.decoder.embed.weight.data_ptr() == target.embed.weight.data_ptr()
    assert_same(drafted(draft, target), drafted_by_hand(head, target), 1e-5)


@pytest.mark.parametrize(
    ("layout", "said", "runs"),
    [
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}, (1, 3, 8)),  # after so many layers
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 7]}}, (1, 3, 8)),  # outputs of these
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": True}}, (2, 4, 5)),
    ],
)
def test_each_layout_numbers_the_targets_layers_in_its_way(
    layout: str, said: dict[str, Any], runs: tuple[int, ...], tmp_path: Path
) -> None:
    target, head = target_for("as in the paper"), published(layout)
    head.config |= said
    head.runs = runs
    assert_same(drafted(loaded(head, target, tmp_path), target), drafted_by_hand(head, target), 1e-5)


def test_two_tapped_layers(tmp_path: Path) -> None:
    target, head = target_for("as in the paper"), published("speculators", num_taps=2, tap_norm="fc_norm")
    head.config["eagle_aux_hidden_state_layer_ids"] = list(head.runs[:2])
    head.runs = head.runs[:2]
    assert_same(drafted(loaded(head, target, tmp_path), target), drafted_by_hand(head, target), 1e-5)


def test_a_file_with_its_config_beside_it(tmp_path: Path) -> None:
    folder = published("eagle3").write(tmp_path)
    assert read_eagle3(folder / "model.safetensors", target_for("as in the paper")).spec.eagle3 is not None


# --- how one that is trained here starts ----------------------------------------------------------------------------


def test_a_draft_in_this_form_starts_as_the_last_layer_of_its_target() -> None:
    target, token_ids = tiny_decoder(num_layers=3), torch.tensor([5, 111, 0, 7])
    spec = draft_spec(target.spec, "conditioned", (0, 1), 4, eagle3=True)
    draft = start_from_target(spec, target, (0, 1), token_ids)
    assert draft.tap is not None
    ids_BT = torch.tensor([TEXT])
    _, logits, tapped = whole_window(target, ids_BT, (0, 1))
    assert tapped is not None
    hidden = draft.run_layers(ids_BT[0], draft.tap(tapped[0]), torch.arange(len(TEXT)), CausalAttend(1))
    assert torch.allclose(draft.logits(hidden), logits[0][:, token_ids], atol=1e-4)


def test_a_draft_in_this_form_is_a_llamas_layer_whatever_its_target_is() -> None:
    target = tiny_decoder(family="qwen3", qk_norm=True, qkv_bias=True, mlp_bias=True)
    spec = draft_spec(target.spec, "conditioned", (0, 1), None, eagle3=True)
    start_from_target(spec, target, (0, 1), torch.arange(112))
    assert (spec.decoder.family, spec.decoder.qk_norm, spec.decoder.qkv_bias) == ("llama", False, False)


# --- there and back -------------------------------------------------------------------------------------------------


def round_trip(draft: Draft, target: Decoder, layout: Layout, folder: Path) -> Draft:
    config, tensors = exported(
        draft, layout, torch.float32, target_layers=target.spec.num_layers, verifier="v", architecture="A"
    )
    return loaded(Published(config, tensors), target, folder)


@any_form
def test_what_is_exported_for_vllm_comes_back(form: str, tmp_path: Path) -> None:
    target = target_for(form)
    draft = loaded(published("eagle3", **FORMS[form]), target, tmp_path / "one")
    assert_same(drafted(round_trip(draft, target, "speculators", tmp_path), target), drafted(draft, target), 1e-6)


@pytest.mark.parametrize("form", ["as in the paper", "norm of each tap", "normed output", "another width"])
def test_what_is_exported_for_sglang_comes_back(form: str, tmp_path: Path) -> None:
    target = target_for(form)
    draft = loaded(published("speculators", **FORMS[form]), target, tmp_path / "one")
    assert_same(drafted(round_trip(draft, target, "eagle3", tmp_path), target), drafted(draft, target), 1e-6)


@any_layout
def test_a_draft_of_ours_is_exported_with_its_tokens_in_order(layout: Layout, tmp_path: Path) -> None:
    target = target_for("as in the paper")
    draft = random_draft(target, "conditioned", eagle3=True, layers=(0, 6))
    assert draft.token_ids.tolist() != sorted(draft.token_ids.tolist())
    back = round_trip(draft, target, layout, tmp_path)
    assert back.token_ids.tolist() == sorted(draft.token_ids.tolist())
    (mine, token), (theirs, same) = drafted(draft, target)[0], drafted(back, target)[0]
    assert token == same and torch.allclose(mine[draft.token_ids.argsort()], theirs, atol=1e-4)


def test_what_the_readers_of_a_layout_find() -> None:
    """Names and shapes of vLLM's `Eagle3LlamaForCausalLM`, and SGLang's."""
    target = target_for("as in the paper")
    draft = random_draft(target, "conditioned", eagle3=True, layers=(1, 3, 4))
    facts: dict[str, Any] = {"target_layers": 8, "verifier": "org/model", "architecture": "LlamaForCausalLM"}
    config, tensors = exported(draft, "speculators", torch.bfloat16, **facts)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5] and config["draft_vocab_size"] == 48
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/model",
        "architectures": ["LlamaForCausalLM"],
    }
    assert "embed_tokens.weight" not in tensors  # vLLM shares the target's then
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (64, 128)
    assert tensors["fc.weight"].shape == (64, 192) and tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["d2t"].dtype == torch.int64 and (tensors["d2t"] >= 0).all() and int(tensors["t2d"].sum()) == 48
    flat, renamed = exported(draft, "eagle3", torch.bfloat16, **facts)
    assert flat["architectures"] == ["LlamaForCausalLMEagle3"] and "midlayer.hidden_norm.weight" in renamed
    # The default of all readers, so that none numbers layers in its own way.
    assert flat["eagle_config"] == {"use_aux_hidden_state": True}
    draft = random_draft(target, "conditioned", eagle3=True, layers=(1, 3, 5))
    assert exported(draft, "eagle3", torch.bfloat16, **facts)[0]["eagle_config"][
        "eagle_aux_hidden_state_layer_ids"
    ] == [1, 3, 5]


@pytest.mark.parametrize(
    ("draft", "layout", "named"),
    [
        (lambda t, _: random_draft(t, "conditioned"), "eagle3", "joins token and features before .*join: eagle3"),
        (lambda t, _: random_draft(t, "standalone"), "speculators", "the draft stands alone"),
        (lambda t, f: loaded(published("speculators", family="qwen3"), t, f), "speculators", "norms of query and key"),
        (
            lambda t, f: loaded(published("speculators", norm_before_residual=True), t, f),
            "eagle3",
            "norm_before_residual, which SGLang does not read .* export it as speculators",
        ),
        (lambda t, f: loaded(published("speculators", num_layers=2), t, f), "eagle3", "more than one layer"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(draft: Any, layout: Layout, named: str, tmp_path: Path) -> None:
    target = target_for("as in the paper")
    with pytest.raises(UserError, match=named):
        exported(draft(target, tmp_path), layout, torch.float32, target_layers=8, verifier="v", architecture="A")


# --- refused --------------------------------------------------------------------------------------------------------


def refused(head: Published, folder: Path, named: str, form: str = "as in the paper") -> None:
    with pytest.raises(CheckpointError, match=named):
        read_eagle3(head.write(folder), target_for(form))


@any_layout
@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("fc.weight", torch.zeros(64, 128), r"fc\.weight has shape \(64, 128\), expected \(hidden_size, 192\)"),
        ("lm_head.weight", torch.zeros(39, 64), r"weight lm_head\.weight has shape \(39, 64\), expected \(40, 64\)"),
        (
            "{}self_attn.k_proj.weight",
            torch.zeros(32, 64),
            r"k_proj\.weight has shape \(32, 64\), expected .* 128",
        ),
        ("{}mlp.up_proj.weight", None, r"weight layers\.0\.mlp\.up_proj\.weight is missing"),
        ("{}hidden_norm.weight", None, "is no EAGLE-3 head"),
        ("mask_hidden", torch.zeros(1, 192), r"weight mask_hidden of shape \(1, 192\) is unknown"),
        ("norm.weight", torch.full((64,), torch.nan), r"norm\.weight holds NaN"),
        ("norm.weight", torch.ones(64, dtype=torch.int8), r"norm\.weight is int8, quantized"),
        ("d2t", None, "weight d2t is missing"),
        ("d2t", torch.zeros(41, dtype=torch.long), r"weight d2t has shape \(41,\) of int64, expected \(40,\)"),
        ("d2t", torch.full((40,), 73), "d2t names tokens outside the vocabulary of 112"),
        ("d2t", torch.tensor([1, 0] + [50] * 38), "d2t names a token twice"),
        ("t2d", torch.ones(112, dtype=torch.bool), "t2d marks other tokens than d2t"),
        ("t2d", torch.ones(111, dtype=torch.bool), r"weight t2d has shape \(111,\), expected \(112,\)"),
    ],
)
def test_wrong_tensors(layout: str, name: str, tensor: torch.Tensor | None, named: str, tmp_path: Path) -> None:
    head = published(layout)
    name = name.format("midlayer." if layout == "eagle3" else "layers.0.")
    if tensor is None:
        del head.tensors[name]
    else:
        head.tensors[name] = tensor
    refused(head, tmp_path, named)


@pytest.mark.parametrize(
    ("layout", "config", "named"),
    [
        ("speculators", {"speculators_model_type": "dflash"}, "'dflash' is not supported, only 'eagle3'"),
        ("speculators", {"norm_before_residual": None}, "lacks norm_before_residual, for which vLLM takes true"),
        ("speculators", {"fc_norm": True, "norm_before_fc": True}, "exclude each other"),
        ("speculators", {"norm_output": "yes"}, "norm_output is 'yes', must be true or false"),
        ("speculators", {"draft_vocab_size": 113}, "draft_vocab_size 113 must lie between 1 and 112"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [0, 4, 5]}, "not its embedding"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "must be different layers of the target's 8"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [4, 2, 5]}, "ascending"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [2, 4]}, r"expected \(hidden_size, 128\): 2 tapped"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "vLLM counts layers .* put it into `eagle_config`"),
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "last hidden state is not supported"),
        ("eagle3", {"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' .* not supported; supported: llama, qwen3"),
        ("eagle3", {"vocab_size": 128}, "draft vocab_size 128 != target vocab_size 112"),
        (
            "eagle3",
            {"target_hidden_size": 96},
            r"fc\.weight has shape \(64, 192\), expected .* 288",
        ),
        ("eagle3", {"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ("eagle3", {"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type 'yarn' is not supported"),
    ],
)
def test_wrong_settings(layout: str, config: dict[str, Any], named: str, tmp_path: Path) -> None:
    head = published(layout)
    head.config |= config
    refused(head, tmp_path, named)


def test_a_head_of_another_width_has_an_embedding_of_its_own(tmp_path: Path) -> None:
    head = published("eagle3", target_hidden=96)
    refused(head, tmp_path, "draft hidden_size 64 != target hidden_size 96: give one", "another width")


def test_a_target_too_small_for_the_default_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"target of 2 layers is outputs of \[1, 0, -2\]: must be different"):
        read_eagle3(published("eagle3").write(tmp_path), tiny_decoder())


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = published("eagle3").write(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=rf"pickle.*convert-heads {folder}/pytorch_model\.bin --out"):
            read_eagle3(path, target_for("as in the paper"))
