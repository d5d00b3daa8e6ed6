"""`ssv-build quantize`: what ModelOpt makes of our networks, and that it is written as ModelOpt writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_heads import FORMS, loaded, published, target_for
from safetensors import safe_open
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, whole_window
from tiny_bundle import write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from ssv.builder.cli import main
from ssv.builder.config import QuantizeConfig, RecipeError, checked
from ssv.builder.training.corpus import ChatPieces, write_conversations
from ssv.builder.training.passes import CausalAttend
from ssv.builder.training.quantize import (
    QuantizeError,
    quantize_draft,
    quantize_target,
    save_quantized_draft,
    save_quantized_target,
)
from ssv.builder.training.recover import Recovery, _loss, recover
from ssv.model.checkpoint import CheckpointError
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear, precision_of
from ssv.model.unified import load_any, quantization_of
from ssv.support.progress import silent

TEXT = tiny_ids(4, 32)
any_precision = pytest.mark.parametrize("precision", ["fp8", "int4"])
# Of logits, for weights of normal noise, where four bits do worst.
TOLERANCE = {"fp8": 0.2, "int4": 0.45}


def logits(decoder: Decoder) -> torch.Tensor:
    return whole_window(decoder, tiny_ids(2, 20, seed=3))[1]


def saved(student: Decoder, folder: Path) -> Path:
    save_quantized_target(student, folder, [1], torch.float32, lambda path: None)
    return folder


@any_precision
def test_target_says_nearly_the_same(precision: Any) -> None:
    decoder = tiny_decoder(qkv_bias=True, mlp_bias=True, output_bias=True)
    before = logits(decoder)
    student = quantize_target(decoder, TEXT, precision)
    assert precision_of(student) == precision
    assert 1e-4 < relative_error(logits(student), before) < TOLERANCE[precision]
    assert torch.equal(logits(decoder), before)  # the original is left as it is
    assert not isinstance(student.lm_head, QuantizedLinear)


@any_precision
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"family": "qwen3", "qk_norm": True}])
def test_what_is_written_is_read_back(precision: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    student = quantize_target(tiny_decoder(**changes), TEXT, precision)
    folder = saved(student, tmp_path / "out")
    assert quantization_of(folder) == precision
    spec, weights = load_any(folder)
    assert relative_error(logits(Decoder.from_weights(spec, weights)), logits(student)) < 1e-5


@any_precision
def test_lm_head_is_quantized_when_asked(precision: Any, tmp_path: Path) -> None:
    student = quantize_target(tiny_decoder(tie_embeddings=True), TEXT, precision, lm_head=True)
    assert isinstance(student.lm_head, QuantizedLinear)
    spec, weights = load_any(saved(student, tmp_path / "out"))
    assert relative_error(logits(Decoder.from_weights(spec, weights)), logits(student)) < 1e-5


def test_awq_finds_the_channels_that_matter() -> None:
    # One channel of the MLP's input is forty times as large: rounding to the nearest does not know that.
    decoder = tiny_decoder()
    for layer in decoder.blocks():
        layer.mlp_norm.weight[7] = 40.0
    expected = logits(decoder)
    student = quantize_target(decoder, TEXT, "int4")
    plain = tiny_decoder()
    for mine, layer in zip(plain.blocks(), decoder.blocks(), strict=True):
        mine.mlp_norm.weight[7] = 40.0
        for name in ("qkv", "o", "gate_up", "down"):
            weight = getattr(layer, name).weight
            scale = weight.view(len(weight), -1, 32).abs().amax(dim=2, keepdim=True) / 7
            getattr(mine, name).weight.copy_(
                ((weight.view(len(weight), -1, 32) / scale).round() * scale).view_as(weight)
            )
    assert relative_error(logits(student), expected) < 0.95 * relative_error(logits(plain), expected)


@any_precision
@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_draft_is_quantized_but_for_what_is_the_targets(kind: Any, precision: Any, tmp_path: Path) -> None:
    target = tiny_decoder()
    draft = random_draft(target, kind)
    student = quantize_draft(draft, target, TEXT, precision)
    expected_kind = {"fp8": Fp8Linear, "int4": AwqLinear}[precision]
    assert isinstance(student.decoder.blocks()[0].down, expected_kind)
    assert not isinstance(student.decoder.lm_head, QuantizedLinear)
    save_quantized_draft(student, tmp_path / "draft.safetensors", torch.float32)
    again = load_draft(tmp_path / "draft.safetensors", target)
    ids, position = tiny_ids(12), torch.arange(12)
    features = torch.randn(12, 64) if kind == "conditioned" else None
    found, expected, original = (
        d.logits(d.run_layers(ids, features, position, CausalAttend(1))) for d in (again, student, draft)
    )
    assert relative_error(found, expected) < 1e-5
    assert 1e-4 < relative_error(found, original) < TOLERANCE[precision]


@any_precision
@pytest.mark.parametrize("form", ["as in the paper", "EAGLE 3.1", "own embedding", "another width"])
def test_a_published_head_keeps_what_is_its_own(form: str, precision: Any, tmp_path: Path) -> None:
    """A norm whose output is the residual stream too takes no factor of the weights."""
    target = target_for(form)
    draft = loaded(published("eagle3", **FORMS[form]), target, tmp_path)
    student = quantize_draft(draft, target, TEXT, precision)
    save_quantized_draft(student, tmp_path / "quantized.safetensors", torch.float32)
    again = load_draft(tmp_path / "quantized.safetensors", target)
    assert isinstance(again.decoder.blocks()[0].qkv, QuantizedLinear)
    ids, position = tiny_ids(12), torch.arange(12)
    features = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
    hidden = [d.run_layers(ids, features, position, CausalAttend(1)) for d in (again, student, draft)]
    found, expected, original = (d.logits(h) for d, h in zip((again, student, draft), hidden, strict=True))
    assert relative_error(found, expected) < 1e-5
    assert 1e-4 < relative_error(found, original) < TOLERANCE[precision]
    assert relative_error(again.carried(hidden[0]), draft.carried(hidden[2])) < TOLERANCE[precision]


@any_precision
def test_the_checkpoint_has_the_tensors_that_modelopt_exports(precision: Any, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    settings = mtq.FP8_DEFAULT_CFG if precision == "fp8" else mtq.INT4_AWQ_CFG
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=112, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    mtq.quantize(model, settings, lambda m: m(TEXT))
    export_hf_checkpoint(model, export_dir=tmp_path / "theirs", dtype=torch.float32)
    decoder = Decoder.from_weights(*load_any(tmp_path / "plain"))
    saved(quantize_target(decoder, TEXT, precision, group_size=None), tmp_path / "ours")

    def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}

    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / "hf_quant_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    key = "quantization_config"
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text())[key] for who in ("ours", "theirs"))
    assert ours == theirs


def test_training_brings_a_quantized_target_nearer_to_the_original() -> None:
    original = tiny_decoder(tie_embeddings=True)
    student = quantize_target(original, TEXT, "int4")
    pieces = ChatPieces(before=[3, 4], to_assistant=[1, 5], to_user=[1, 6], end_of_turn=1)
    config = Recovery(tokens=32 * 32 * 40, learning_rate=1e-3, rows=64, window=32, batch_rows=32)
    trained = recover(original, student, pieces, [[7], [8]], config, silent)
    assert precision_of(trained) == "int4"
    held_out = write_conversations(original, pieces, [[7], [8]], rows=32, window=32, seed=77).tokens.long()
    with torch.no_grad():
        before, after = (float(_loss(original, each, held_out)) for each in (student, trained))
    assert after < 0.7 * before


def test_groups_that_do_not_divide_a_layer() -> None:
    with pytest.raises(QuantizeError, match=r"group size 64 does not divide the 96 inputs of layers\.0\.down: choose"):
        quantize_target(tiny_decoder(), TEXT, "int4", group_size=64)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match="group_size is for int4"):
        checked(QuantizeConfig, role="target", precision="fp8", group_size=64)
    with pytest.raises(RecipeError, match="are for the target"):
        checked(QuantizeConfig, role="draft", precision="fp8", lm_head=True)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    command = ["quantize", str(tmp_path / "target"), "--role", "target", "--precision", "int4", "--tokens", "256"]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert quantization_of(tmp_path / "out") == "int4"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(command) == 2
    assert "out exists" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_plain_checkpoint_has_no_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    command = [
        "quantize",
        str(tmp_path / "target"),
        "--role",
        "draft",
        "--precision",
        "fp8",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(command) == 2
    assert "give a bundle" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    student = quantize_target(tiny_decoder(), TEXT, "fp8")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists: choose another"):
        saved(student, tmp_path / "out")
