"""Checkpoints against transformers' own models, and everything that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_weight, relative_error, tiny_ids, tiny_spec, whole_window
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ssv.builder.checkpoint import (
    CheckpointError,
    DecoderSpec,
    RopeScaling,
    hf_config,
    load_checkpoint,
    spec_from_hf_config,
)
from ssv.builder.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,  # large enough to be seen in the logits
}
# Wavelengths of the 8 pairs reach from 6 to 20,000 positions: some kept, two blended, the others stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama2": lambda: LlamaForCausalLM(
        LlamaConfig(**(SIZES | {"num_key_value_heads": 4}), rope_parameters=rope(10000.0))
    ),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=None, head_dim=24, rope_parameters=rope(1e6))
    ),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=rope(1e6))),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, rope_parameters=rope(1e6))),
    "qwen3-biases": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, attention_bias=True)),
    "smollm2": lambda: LlamaForCausalLM(
        LlamaConfig(
            **(SIZES | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
            tie_word_embeddings=True,
            rope_parameters=rope(100000.0),
        )
    ),
}


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(random_weight(parameter_name, tuple(parameter.shape)))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(tiny_ids(2, 24)).logits


def loaded_logits(path: Path) -> Tensor:
    return whole_window(Decoder.from_weights(*load_checkpoint(path)), tiny_ids(2, 24))[1]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A good checkpoint, for the tests to damage."""
    make_model("llama2").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# --- Hugging Face folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


def test_every_model_reads_its_own_settings(tmp_path: Path) -> None:
    specs = {}
    for name in MODELS:
        make_model(name).save_pretrained(tmp_path / name)
        specs[name] = load_checkpoint(tmp_path / name)[0]
    assert specs["llama3"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert (specs["llama-biases"].qkv_bias, specs["llama-biases"].output_bias, specs["llama-biases"].mlp_bias) == (
        True,
        True,
        True,
    )
    assert (specs["qwen2-tied"].qkv_bias, specs["qwen2-tied"].output_bias) == (True, False)
    assert specs["mistral"].head_dim == 24 and specs["mistral"].rope_theta == 1e6
    assert specs["qwen3"].qk_norm and specs["qwen3"].head_dim == 32 and not specs["qwen3"].tie_embeddings
    assert specs["smollm2"].tie_embeddings and specs["smollm2"].rope_theta == 100000.0


def test_rope_settings_of_transformers_4(tmp_path: Path) -> None:
    model = make_model("llama3")
    model.save_pretrained(tmp_path)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    change_config(tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


def test_bf16_weights_stay_bf16(tmp_path: Path) -> None:
    model = make_model("llama2")
    model.bfloat16().save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_checkpoint(tmp_path)[1].values()} == {torch.bfloat16}


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path: Path) -> None:
    model = make_model("smollm2")
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


def test_weights_beside_those_of_the_index(tmp_path: Path) -> None:
    """Mistral's own repositories hold the same weights a second time, under other names."""
    model = make_model("mistral")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    save_file({"layers.0.attention.wq.weight": torch.zeros(96, 64)}, tmp_path / "consolidated.safetensors")
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


def test_weights_beside_a_single_file(llama: Path) -> None:
    expected = loaded_logits(llama)
    save_file({"lora_A.weight": torch.zeros(4, 64)}, llama / "adapter_model.safetensors")
    assert torch.equal(loaded_logits(llama), expected)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_damaged_index(llama: Path, content: str) -> None:
    (llama / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
        load_checkpoint(llama)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_config_that_we_write(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    spec = load_checkpoint(tmp_path)[0]
    config = hf_config(spec, [2, 7], torch.bfloat16)
    assert spec_from_hf_config(config) == spec
    assert config["torch_dtype"] == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    reread = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert reread.config.eos_token_id == [2, 7]
    assert relative_error(logits_of(reread), logits_of(model)) < 1e-5


@pytest.mark.parametrize("spec", [tiny_spec(), tiny_spec(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))])
def test_spec_survives_json(spec: DecoderSpec) -> None:
    assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_spec_names_unknown_and_missing_fields() -> None:
    data = tiny_spec().to_dict()
    with pytest.raises(CheckpointError, match=r"unknown field .*: colour"):
        DecoderSpec.from_dict(data | {"colour": "red"})
    del data["head_dim"]
    with pytest.raises(CheckpointError, match="lacks: head_dim"):
        DecoderSpec.from_dict(data)


def test_heads_must_be_a_multiple_of_key_value_heads() -> None:
    with pytest.raises(CheckpointError, match=r"num_attention_heads 4 .* num_key_value_heads 3"):
        replace(tiny_spec(), num_kv_heads=3)


# --- What is refused ------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "moe": ({"num_experts": 8}, "num_experts"),
    "moe of Mixtral": ({"num_local_experts": 8}, "num_local_experts"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "wrong type": ({"hidden_size": "large"}, "wrong type"),
    "a list for a number": ({"rope_theta": [1], "rope_parameters": None}, "wrong type"),
    "rope by layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer type"),
    "partial rotary of transformers 5": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "mistral window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window 4096"),
    "qwen2 window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4096},
        "sliding_window 4096",
    ),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "yarn": ({"rope_parameters": YARN}, "rope_type 'yarn'"),
    "yarn of transformers 4": ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
    "llama3 without factor": ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architectures .*GPT2LMHeadModel"),
    "no architecture": ({"architectures": None}, "architectures"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "other vocabulary": ({"vocab_size": 113}, "model.embed_tokens.weight has shape"),
    "more layers": ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
    "fewer layers": ({"num_hidden_layers": 1}, "unknown weight model.layers.1"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED)
def test_refused_config(llama: Path, changes: dict[str, object], named: str) -> None:
    change_config(llama, **changes)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(llama)


def test_qwen_window_that_is_switched_off(tmp_path: Path) -> None:
    model = make_model("qwen2-tied")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, use_sliding_window=False, sliding_window=4)
    assert relative_error(loaded_logits(tmp_path), logits_of(model)) < 1e-4


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_missing_field_is_named(llama: Path, field: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config[field]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        load_checkpoint(llama)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_unread(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(llama / "exploded")))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled .* convert it to safetensors"):
        load_checkpoint(llama)
    assert not (llama / "exploded").exists()


def test_folder_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors$"):
        load_checkpoint(llama)


def test_missing_shard(tmp_path: Path) -> None:
    make_model("llama2").save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-.*is a shard"):
        load_checkpoint(tmp_path)


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda w: w.pop(UP), f"weight {UP} is missing"),
    "misshapen": (
        lambda w: w.update({UP: w[UP][:-1].clone()}),
        rf"weight {UP} has shape \(95, 64\), expected \(96, 64\)",
    ),
    "transposed": (lambda w: w.update({UP: w[UP].T.contiguous()}), f"weight {UP} has shape"),
    "extra bias": (
        lambda w: w.update({UP.replace("weight", "bias"): torch.zeros(96)}),
        "unknown weight .*up_proj.bias",
    ),
    "extra module": (lambda w: w.update({"score.weight": torch.zeros(1, 64)}), "unknown weight score.weight"),
    "no head": (lambda w: w.pop("lm_head.weight"), "weight lm_head.weight is missing"),
}


@pytest.mark.parametrize(("change", "named"), DAMAGE.values(), ids=DAMAGE)
def test_refused_weights(llama: Path, change: Callable[[dict[str, Tensor]], object], named: str) -> None:
    change_weights(llama, change)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(llama)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors(llama: Path, kept: float) -> None:
    truncate(llama / "model.safetensors", kept)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* truncated"):
        load_checkpoint(llama)


def truncate(path: Path, kept: float) -> None:
    """Keeps so many bytes, or that share of them."""
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])


def test_missing_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_checkpoint(llama)


@pytest.mark.parametrize("content", [b"", b"{", b"model: llama", b"\xff\xfe\x00"])
def test_config_that_is_not_json(llama: Path, content: bytes) -> None:
    (llama / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_checkpoint(llama)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_config_that_is_no_object(llama: Path, content: str) -> None:
    (llama / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(llama)


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt is neither"):
        load_checkpoint(tmp_path / "notes.txt")


# --- GGUF -----------------------------------------------------------------------------------------------------------


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the q and k rows of Llama models."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: PreTrainedModel, path: Path, quantized: tuple[str, ...] = (), metadata: dict[str, object] | None = None
) -> Path:
    """Writes a model as llama.cpp's converter does; tensors whose name contains one of `quantized` as Q8_0."""
    config = model.config
    arch = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH[config.model_type.upper()]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # leaves a tied LM head out
        weight = parameter.detach().numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            weight = permute(weight, config.num_attention_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            weight = permute(weight, config.num_key_value_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        if any(part in name for part in quantized):
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama2", "smollm2", "qwen2-tied", "qwen3"])
def test_gguf_equals_safetensors(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    from_folder, from_gguf = load_checkpoint(tmp_path), load_checkpoint(write_gguf(model, tmp_path / "model.gguf"))
    # GGUF keeps the epsilon in fp32.
    assert replace(from_gguf[0], rms_norm_eps=1e-2) == from_folder[0]
    assert from_gguf[0].rms_norm_eps == pytest.approx(1e-2)
    assert from_gguf[1].keys() == from_folder[1].keys()
    assert all(torch.equal(from_gguf[1][key], weight) for key, weight in from_folder[1].items())
    assert relative_error(loaded_logits(tmp_path / "model.gguf"), logits_of(model)) < 1e-4


def test_gguf_with_biases(tmp_path: Path) -> None:
    model = make_model("llama-biases")
    path = write_gguf(model, tmp_path / "model.gguf")
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4


@pytest.mark.parametrize("name", ["llama2", "qwen2-tied"])
def test_gguf_with_quantized_tensors(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    quantized = ("embed_tokens", "q_proj.weight", "up_proj")
    path = write_gguf(model, tmp_path / "model.gguf", quantized)
    q8 = gguf.GGMLQuantizationType.Q8_0
    # Rounding works along rows, so it does not matter that the file's q rows are in another order.
    rounded = {
        key: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), q8), q8))
        for key, weight in model.named_parameters()
        if any(part in key for part in quantized)
    }
    model.load_state_dict(rounded, strict=False)
    weights = load_checkpoint(path)[1]
    for key, weight in rounded.items():
        assert torch.equal(weights[key], weight.half())
    assert weights["model.norm.weight"].dtype == torch.float32
    # fp16 keeps 11 bits of the product of an 8-bit value and an fp16 scale.
    assert relative_error(loaded_logits(path), logits_of(model)) < 2e-3


GGUF_REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "experts": ("llama2", {"llama.expert_count": 8}, "expert_count"),
    "rope scaling": ("llama2", {"llama.rope.scaling.type": "yarn"}, "rope.scaling"),
    "window": ("llama2", {"llama.attention.sliding_window": 64}, "attention.sliding_window"),
    "partial rotary": ("llama2", {"llama.rope.dimension_count": 4}, "rope.dimension_count 4"),
    "own scale": ("llama2", {"llama.attention.scale": 64}, "attention.scale"),
}


@pytest.mark.parametrize(("name", "metadata", "named"), GGUF_REFUSED.values(), ids=GGUF_REFUSED)
def test_refused_gguf(tmp_path: Path, name: str, metadata: dict[str, object], named: str) -> None:
    path = write_gguf(make_model(name), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.architecture 'gemma3'"):
        load_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 20, 0.005, 0.01, 0.5, 0.9999])
def test_truncated_gguf(tmp_path: Path, kept: float) -> None:
    path = write_gguf(make_model("llama2"), tmp_path / "model.gguf")
    truncate(path, kept)
    with pytest.raises(CheckpointError, match=r"model\.gguf .*truncated"):
        load_checkpoint(path)


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model at all, whatever it is called" * 10)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_checkpoint(tmp_path / "model.gguf")
