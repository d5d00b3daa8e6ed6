"""GGUF files against the models that they were written from, and everything that must be refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hf_models import LLAMA3_ROPE, SIZES, loaded_logits, logits_of, make_model, truncate
from tiny import relative_error
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ssv.model.checkpoint import CheckpointError, RopeDivisors, RopeScaling, hf_config, load_checkpoint


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the q and k rows of Llama models."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    quantized: tuple[str, ...] = (),
    metadata: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Writes a model as llama.cpp's converter does.

    Tensors whose name contains one of `quantized` are Q8_0, and `metadata` takes the place of the model's own.
    """
    config = model.config
    arch = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH[config.model_type.upper()]
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, prefix, endianess=endianess)
    known: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if config.model_type == "qwen3":
        known["attention.key_length"] = config.head_dim
    for key, value in ({f"{prefix}.{key}": value for key, value in known.items()} | (metadata or {})).items():
        if value is not None:
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
        if gguf_name in without:
            continue
        if any(part in name for part in quantized):
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(weight))
    for gguf_name, values in (tensors or {}).items():
        writer.add_tensor(gguf_name, values)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
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


# --- Rope -----------------------------------------------------------------------------------------------------------


def llama_of(rope: dict[str, object], **sizes: object) -> PreTrainedModel:
    """A model of transformers with the weights of any other of its sizes."""
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | sizes), rope_parameters=rope)).eval()
    model.load_state_dict(make_model("llama3").state_dict(), strict=True)
    return model


def llama3_divisors(model: PreTrainedModel) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight."""
    head_dim, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


LLAMA31 = LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        (LLAMA31, RopeScaling(8.0, 1.0, 4.0, 8192)),
        (LLAMA31 | {"factor": 32.0}, RopeScaling(32.0, 1.0, 4.0, 8192)),
        (LLAMA3_ROPE, None),  # of no published model: kept as they are
    ],
    ids=["Llama 3.1", "Llama 3.2", "another"],
)
def test_the_rope_of_llama_3_in_a_gguf(tmp_path: Path, rope: dict[str, object], scaling: RopeScaling | None) -> None:
    model = llama_of(rope)
    divisors = llama3_divisors(model)
    assert divisors.max() == pytest.approx(float(str(rope["factor"]))) and divisors.min() == pytest.approx(1)
    path = write_gguf(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": divisors})
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4
    spec = load_checkpoint(path)[0]
    assert spec.rope_scaling == (scaling or RopeDivisors(tuple(divisors.tolist())))


def test_rope_of_divisors_is_what_llama_cpp_computes_and_transformers_reads_it_back(tmp_path: Path) -> None:
    """Each pair's angle is divided by its own number, on top of linear scaling."""
    divisors = np.array([1, 1, 1.5, 2, 3, 4.5, 5, 6], dtype=np.float32)
    model = llama_of({"rope_type": "default", "rope_theta": 10000.0})
    scaled = {"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.type": "linear"}
    path = write_gguf(model, tmp_path / "model.gguf", metadata=scaled, tensors={"rope_freqs.weight": divisors})
    unscaled = logits_of(model)
    model.model.rotary_emb.inv_freq /= torch.from_numpy(divisors) * 2
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4
    assert relative_error(unscaled, logits_of(model)) > 0.1
    spec = load_checkpoint(path)[0]
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(hf_config(spec, [1], torch.float32)))
    assert load_checkpoint(tmp_path / "folder")[0] == spec
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    assert relative_error(logits_of(reread), logits_of(model)) < 1e-4


def test_rope_freqs_of_ones_scale_nothing(tmp_path: Path) -> None:
    model = make_model("llama2")
    path = write_gguf(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4
    assert load_checkpoint(path)[0].rope_scaling is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 8.0},
    ],
)
def test_linear_rope_scaling_under_its_names(tmp_path: Path, metadata: dict[str, object]) -> None:
    """As in llama.cpp a factor without a type is a linear one, and the new name counts before the old."""
    model = llama_of({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    path = write_gguf(model, tmp_path / "model.gguf", metadata=metadata)
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.attn_factor": 1.0},
        {"llama.rope.scale_linear": 0.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.scaling.original_context_length": 64},
        {"llama.rope.freq_base": None},
        {"llama.attention.head_count_kv": [2, 2], "llama.expert_count": 0, "llama.attention.value_length": 16},
    ],
)
def test_metadata_that_changes_nothing(tmp_path: Path, metadata: dict[str, object]) -> None:
    model = llama_of({"rope_type": "default", "rope_theta": 10000.0})
    path = write_gguf(model, tmp_path / "model.gguf", metadata=metadata)
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4


# --- What is refused ------------------------------------------------------------------------------------------------

GGUF_REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "experts": ("llama2", {"llama.expert_count": 8}, "expert_count"),
    "rope scaling": ("llama2", {"llama.rope.scaling.type": "yarn"}, "rope.scaling"),
    "window": ("llama2", {"llama.attention.sliding_window": 64}, "attention.sliding_window"),
    "partial rotary": ("llama2", {"llama.rope.dimension_count": 4}, "rope.dimension_count 4"),
    "own scale": ("llama2", {"llama.attention.scale": 64}, "attention.scale"),
    "longrope": ("llama2", {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
    "scaling of another architecture": ("qwen3", {"qwen3.rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn'"),
    "attention factor": ("llama2", {"llama.rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor = 1.2"),
    "yarn's attention factor": ("llama2", {"llama.rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor = 1.5"),
    "yarn's extrapolation": ("llama2", {"llama.rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor = 1.0"),
    "yarn's logarithm": ("llama2", {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
    "factor of no type": (
        "llama2",
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        "contradicts the factor 4.0",
    ),
    "negative factor": ("llama2", {"llama.rope.scaling.factor": -4.0}, "factor -4.0, must be above 0"),
    "theta 0": ("llama2", {"llama.rope.freq_base": 0.0}, "llama.rope.freq_base is 0.0, must be above 0"),
    "NaN": ("llama2", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    "unknown setting": (
        "llama2",
        {"llama.attention.temperature_scale": 0.1},
        "llama.attention.temperature_scale = 0.1",
    ),
    "scaled logits": ("llama2", {"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
    "sees what follows": ("llama2", {"llama.attention.causal": False}, "llama.attention.causal = False"),
    "no heads": ("llama2", {"llama.attention.head_count": 0}, "llama.attention.head_count is 0, must be at least 1"),
    "no key-value heads": ("llama2", {"llama.attention.head_count_kv": 0}, "head_count_kv is 0"),
    "no layers": ("llama2", {"llama.block_count": 0}, "llama.block_count is 0"),
    "no positions": ("llama2", {"llama.context_length": 0}, "llama.context_length is 0"),
    "no hidden size": ("llama2", {"llama.embedding_length": 0}, "llama.embedding_length is 0"),
    "layers that differ": (
        "llama2",
        {"llama.attention.head_count_kv": [2, 4]},
        r"is \[2, 4\], must be one whole number",
    ),
    "half a layer": ("llama2", {"llama.block_count": 2.5}, "llama.block_count is 2.5, must be one whole number"),
    "text": ("llama2", {"llama.block_count": "2"}, "llama.block_count is '2'"),
    "no count of layers": ("llama2", {"llama.block_count": None}, "lacks llama.block_count"),
    "other values": ("llama2", {"llama.attention.value_length": 8}, "attention.value_length"),
    "first of two": (
        "llama2",
        {"split.no": 0, "split.count": 2, "split.tensors.count": 21},
        "part 1 of a model in 2 files: merge them",
    ),
    "second of two": ("llama2", {"split.no": 1, "split.count": 2}, "part 2 of a model in 2 files"),
    "adapter": ("llama2", {"general.type": "adapter"}, "no model but of general.type 'adapter'"),
}


@pytest.mark.parametrize(("name", "metadata", "named"), GGUF_REFUSED.values(), ids=GGUF_REFUSED)
def test_refused_gguf(tmp_path: Path, name: str, metadata: dict[str, object], named: str) -> None:
    path = write_gguf(make_model(name), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    finish(writer, tmp_path / "model.gguf")
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


def test_a_part_is_known_by_its_name(tmp_path: Path) -> None:
    path = write_gguf(make_model("llama2"), tmp_path / "model-00002-of-00003.gguf", without=("output.weight",))
    with pytest.raises(CheckpointError, match="part 2 of a model in 3 files"):
        load_checkpoint(path)


def test_a_part_without_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "")
    for key, value in (("split.no", 1), ("split.count", 2)):
        writer.add_uint16(key, value)
    writer.add_tensor("output.weight", np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(CheckpointError, match="part 2 of a model in 2 files"):
        load_checkpoint(finish(writer, tmp_path / "b.gguf"))


def test_a_whole_model_that_was_split_into_one(tmp_path: Path) -> None:
    model = make_model("llama2")
    path = write_gguf(model, tmp_path / "model-00001-of-00001.gguf", metadata={"split.no": 0, "split.count": 1})
    assert relative_error(loaded_logits(path), logits_of(model)) < 1e-4


@pytest.mark.parametrize(
    ("name", "tensors", "without", "named"),
    [
        ("llama2", {}, ("token_embd.weight",), "no tensor token_embd.weight"),
        ("llama2", {}, ("blk.1.ffn_up.weight",), "weight model.layers.1.mlp.up_proj.weight is missing"),
        ("llama2", {"blk.2.ffn_up.weight": np.ones((96, 64), np.float32)}, (), "unknown weight blk.2.ffn_up.weight"),
        ("llama2", {"rope_freqs.weight": np.ones(4, np.float32)}, (), "rope_freqs.weight has 4 values"),
        ("llama2", {"rope_freqs.weight": np.zeros(8, np.float32)}, (), "a frequency is divided by 0"),
        ("qwen3", {"rope_freqs.weight": np.full(16, 2, np.float32)}, (), "architecture qwen3 have none"),
        ("llama2", {"rope_factors_long.weight": np.ones(8, np.float32)}, (), "rope_factors_long.weight"),
        ("llama2", {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, (), "not a plain llama model"),
        ("qwen3", {}, ("blk.0.attn_q_norm.weight",), "blk.0.attn_q_norm.weight is missing"),
        ("qwen2-tied", {}, ("blk.0.attn_q.bias",), "blk.0.attn_q.bias is missing"),
    ],
)
def test_tensors_of_another_model(
    tmp_path: Path, name: str, tensors: dict[str, np.ndarray], without: tuple[str, ...], named: str
) -> None:
    path = write_gguf(make_model(name), tmp_path / "model.gguf", tensors=tensors, without=without)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = make_model("llama2")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(CheckpointError, match=r"weight model\.norm\.weight holds NaN or infinite"):
        load_checkpoint(write_gguf(model, tmp_path / "model.gguf"))


def test_big_endian(tmp_path: Path) -> None:
    path = write_gguf(make_model("llama2"), tmp_path / "model.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="is a big-endian GGUF file: convert it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"GGUF" + struct.pack("<I", 1), "is of GGUF version 1, supported are 2 and 3"),
        (b"GGUF" + struct.pack("<I", 4), "is of GGUF version 4"),
        (b"tjgg" + struct.pack("<I", 3), "before GGUF"),
        (b"lmgg" + struct.pack("<I", 112), "before GGUF"),
    ],
)
def test_another_version(tmp_path: Path, head: bytes, named: str) -> None:
    path = write_gguf(make_model("llama2"), tmp_path / "model.gguf")
    path.write_bytes(head + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path)


@pytest.mark.parametrize(("code", "named"), [(99, "unknown type 99"), (9, "is of type Q8_1")])
def test_a_type_that_cannot_be_read(tmp_path: Path, code: int, named: str) -> None:
    path = write_gguf(make_model("llama2"), tmp_path / "model.gguf")
    content = path.read_bytes()
    # In a tensor's entry its name is followed by its number of axes, their lengths, and its type.
    at = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", code) + content[at + 4 :])
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path)
