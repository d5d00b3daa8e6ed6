"""Checkpoints against transformers' own models, and everything that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import LLAMA3_ROPE, MODELS, SIZES, loaded_logits, logits_of, make_model, truncate
from safetensors.torch import load_file, save_file
from tiny import relative_error, tiny_spec
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssv.model.checkpoint import (
    CheckpointError,
    DecoderSpec,
    RopeDivisors,
    RopeScaling,
    checkpoint_files,
    hf_config,
    load_checkpoint,
    spec_from_hf_config,
)


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


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
# Settings of config.json and the model, one a row; an absent key is None here.
AS_TRANSFORMERS: dict[str, tuple[str, dict[str, object]]] = {
    "rope_scaling beside rope_parameters": ("llama2", {"rope_scaling": LINEAR}),
    "rope_scaling of the old form beside rope_parameters": (
        "llama2",
        {"rope_scaling": {"type": "linear", "factor": 3}},
    ),
    "llama3 beside rope_parameters": ("llama2", {"rope_scaling": LLAMA3}),
    "llama3 in rope_scaling beside linear": ("llama-linear", {"rope_scaling": LLAMA3}),
    "an empty rope_scaling": ("llama-linear", {"rope_scaling": {}}),
    "rope_parameters over the top level's theta": ("llama2", {"rope_theta": 500000.0}),
    "theta of rope_scaling": (
        "llama2",
        {"rope_parameters": None, "rope_theta": 77.0, "rope_scaling": {**LINEAR, "rope_theta": 5e5}},
    ),
    "no theta": ("llama2", {"rope_parameters": None}),
    "llama3 without its original length": (
        "llama2",
        {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"}},
    ),
    "llama3 with its original length at the top": ("llama3", {"original_max_position_embeddings": 128}),
    "a factor of 1 without a type": ("llama2", {"rope_parameters": {"rope_theta": 1e4, "factor": 1.0}}),
    "no max_position_embeddings": ("llama3", {"max_position_embeddings": None}),
    "no rms_norm_eps": ("llama2", {"rms_norm_eps": None}),
    "no num_key_value_heads": ("llama2", {"num_key_value_heads": None}),
    "no head_dim": ("llama3", {"head_dim": None}),
    "a window of another family": ("qwen2-tied", {"use_sliding_window": False, "sliding_window": 4}),
}


@pytest.mark.parametrize(("name", "changes"), AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS)
def test_settings_mean_what_they_mean_in_transformers(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(loaded_logits(tmp_path), logits_of(expected)) < 1e-4
    assert load_checkpoint(tmp_path)[0].max_positions == expected.config.max_position_embeddings


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2-tied", "qwen3"])
def test_absent_settings_have_the_defaults_of_their_family(name: str, tmp_path: Path) -> None:
    config = make_model(name).config.to_dict()
    architecture = config["architectures"] or [type(make_model(name)).__name__]
    needed = {key: config[key] for key in (*SIZES, "model_type") if key not in ("max_position_embeddings",)}
    needed |= {
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_size": 256,
        "architectures": architecture,
    }
    del needed["num_key_value_heads"]
    window = {"sliding_window": None} if name == "mistral" else {}
    spec = spec_from_hf_config(needed | window)
    theirs = type(make_model(name).config)(**needed)
    assert spec.max_positions == theirs.max_position_embeddings
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 8)


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


@pytest.mark.parametrize("shards", ["kept", "removed"])
def test_a_newer_single_file_counts_and_not_an_older_index(tmp_path: Path, shards: str) -> None:
    make_model("llama2").save_pretrained(tmp_path, max_shard_size="40KB")
    new = make_model("llama2")
    with torch.no_grad():
        new.lm_head.weight.mul_(-1)
    if shards == "removed":
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
    save_file(new.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(loaded_logits(tmp_path), logits_of(theirs)) < 1e-4
    assert relative_error(loaded_logits(tmp_path), logits_of(new)) < 1e-4


def sharded(folder: Path) -> tuple[dict[str, str], Path]:
    """A checkpoint of several files: its weight map, and its index."""
    make_model("llama2").save_pretrained(folder, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    return json.loads(index.read_text())["weight_map"], index


def change_shard(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_counts(tmp_path: Path) -> None:
    weight_map, _ = sharded(tmp_path)
    for shard in set(weight_map.values()) - {weight_map[UP]}:
        change_shard(tmp_path / shard, lambda w: w.update({UP: torch.zeros(96, 64)}))
    assert relative_error(loaded_logits(tmp_path), logits_of(make_model("llama2"))) < 1e-4


def test_a_tensor_that_the_index_does_not_name_is_found_in_its_shard(tmp_path: Path) -> None:
    weight_map, index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != UP}}))
    assert relative_error(loaded_logits(tmp_path), logits_of(make_model("llama2"))) < 1e-4


def test_the_files_of_a_checkpoint_are_those_that_are_loaded(tmp_path: Path) -> None:
    weight_map, index = sharded(tmp_path)
    shards = {tmp_path / name for name in weight_map.values()}
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    (tmp_path / "generation_config.json").write_text("{}")
    assert set(checkpoint_files(tmp_path)) == {tmp_path / "config.json", index, *shards}
    load_checkpoint(tmp_path)
    save_file(make_model("llama2").state_dict(), tmp_path / "model.safetensors")  # newer than index and shards
    assert set(checkpoint_files(tmp_path)) == {tmp_path / "config.json", tmp_path / "model.safetensors"}
    for path in (index, tmp_path / "model.safetensors", tmp_path / "adapter.safetensors"):
        path.unlink()
    assert set(checkpoint_files(tmp_path)) == {tmp_path / "config.json", *shards}
    assert checkpoint_files(tmp_path / "config.json") == [tmp_path / "config.json"]  # a file, such as a GGUF


def test_a_tensor_in_two_files_that_no_index_names_is_refused(tmp_path: Path) -> None:
    weight_map, index = sharded(tmp_path)
    other = next(shard for shard in weight_map.values() if shard != weight_map[UP])
    change_shard(tmp_path / other, lambda w: w.update({UP: torch.zeros(96, 64)}))
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != UP}}))
    with pytest.raises(CheckpointError, match=f"{UP} is in model-.* and in model-.*, and no index"):
        load_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=f"{UP} is in model-.* and in model-.*, and no index"):
        load_checkpoint(tmp_path)


def test_a_shard_without_what_the_index_says_is_in_it(tmp_path: Path) -> None:
    weight_map, _ = sharded(tmp_path)
    change_shard(tmp_path / weight_map[UP], lambda w: w.pop(UP) is None or w.update({"x.inv_freq": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"{weight_map[UP]} lacks {UP}, which the index says"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_an_index_that_names_files_elsewhere(tmp_path: Path, file: str) -> None:
    weight_map, index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {UP: file}}))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: it names something else"):
        load_checkpoint(tmp_path)


def test_weights_that_the_config_names(llama: Path) -> None:
    change_config(llama, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers_weights 'other\.safetensors'"):
        load_checkpoint(llama)


def test_a_tied_config_with_a_head_that_differs(tmp_path: Path) -> None:
    """transformers unties the two, whatever the config says; a bundle made from them says so."""
    make_model("llama2").save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(loaded_logits(tmp_path), logits_of(theirs)) < 1e-4
    assert not hf_config(load_checkpoint(tmp_path)[0], [1], torch.float32)["tie_word_embeddings"]


def test_a_tied_config_with_only_a_head(tmp_path: Path) -> None:
    model = make_model("smollm2")
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(loaded_logits(tmp_path), logits_of(theirs)) < 1e-4
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


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(8.0, 1.0, 4.0, 64), RopeDivisors((1.0,) * 4 + (1.5, 4.0, 4.0, 4.0))]
)
def test_spec_survives_json(scaling: RopeScaling | RopeDivisors | None) -> None:
    spec = tiny_spec(rope_scaling=scaling)
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
    "factor without a type": ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "factor 4.0 and no rope_type"),
    "factor alone": ({"rope_parameters": None, "rope_scaling": {"factor": 4.0}}, "factor 4.0 and no rope_type"),
    "factor of the default type": ({"rope_scaling": {"type": "default", "factor": 2}}, "factor 2 and no rope_type"),
    "yarn beside rope_parameters": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    "dynamic beside rope_parameters": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
    "longrope of two lengths": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 512,
            }
        },
        "rope_type 'longrope'",
    ),
    "two types": ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, "contradict"),
    "theta lost beside rope_scaling": (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": LINEAR},
        "rope_theta 1000000.0, with rope_scaling beside it 10000.0 counts",
    ),
    "unknown setting of rope": ({"rope_scaling": {**LINEAR, "attention_factor": 1.2}}, "attention_factor 1.2"),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    "factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "llama3 upside down": (
        {"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
        "high_freq_factor 1.0 must be greater",
    ),
    "rope as text": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    "theta 0": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    "theta 0 beside rope_parameters": ({"rope_theta": 0}, "rope_theta is 0.0, must be a number above 0"),
    "negative theta beside rope_parameters": ({"rope_theta": -1.0}, "rope_theta is -1.0, must be a number above 0"),
    "theta 0 beside rope_scaling": (
        {"rope_theta": 0, "rope_parameters": None, "rope_scaling": {**LINEAR, "rope_theta": 1e4}},
        "rope_theta is 0.0",
    ),
    "rope_parameters as a list": ({"rope_parameters": []}, r"rope_parameters is \[\], must be an object or null"),
    "rope_parameters as a text": ({"rope_parameters": ""}, "rope_parameters is '', must be an object or null"),
    "rope_scaling as a list": ({"rope_scaling": []}, r"rope_scaling is \[\], must be an object or null"),
    "rope_scaling false": ({"rope_scaling": False}, "rope_scaling is False, must be an object or null"),
    "epsilon 0": ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, must be a number above 0"),
    "negative theta": ({"rope_parameters": None, "rope_theta": -1e4}, "rope_theta is -10000"),
    "theta as text": ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta is '10000'"),
    "theta NaN": ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
    "infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    "negative epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, must be a whole number"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "layers as truth": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads is -4"),
    "no key-value heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "odd heads": ({"head_dim": 15}, "head_dim is 15, must be even"),
    "uneven heads": ({"hidden_size": 66, "head_dim": None}, "hidden_size 66 is not a multiple"),
    "tied as text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', must be true or false"),
    "biases as text": ({"attention_bias": "false"}, "attention_bias is 'false'"),
    "MLP biases as a number": ({"mlp_bias": 0}, "mlp_bias is 0"),
    "window as text": ({"use_sliding_window": "false"}, "use_sliding_window is 'false'"),
    "architectures as text": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    "window of a Llama": ({"sliding_window": 64}, "sliding_window 64"),
    "Mistral's default window": ({"architectures": ["MistralForCausalLM"]}, "sliding_window 4096 .the default"),
    "Mistral's window, not Qwen's switch": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "use_sliding_window": False},
        "sliding_window 64",
    ),
    "Qwen's default window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        "sliding_window 4096 .the default",
    ),
    "scaled logits": ({"logit_scale": 0.0625}, "logit_scale 0.0625 is not supported, only 1"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "scaled embedding": ({"scale_emb": 12}, "scale_emb 12"),
    "norms of queries": ({"use_qk_norm": True}, "use_qk_norm True"),
    "a number for layer types": ({"layer_types": 5}, "layer_types: only full_attention"),
    "no number of experts": ({"num_experts": "8"}, "num_experts: mixture"),
    "another model type": ({"model_type": "granite"}, "model_type 'granite'"),
    "a method of quantization": ({"quantization_config": {"quant_method": "quark"}}, "quantized by quark"),
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
    "one NaN": (lambda w: w[UP].view(-1)[-1:].fill_(float("nan")), f"weight {UP} holds NaN"),
    "one infinity": (lambda w: w[UP].view(-1)[:1].fill_(float("inf")), f"weight {UP} holds NaN or infinite"),
    "NaN in bf16": (
        lambda w: w.update({UP: w[UP].bfloat16().index_fill(0, torch.tensor([7]), float("nan"))}),
        f"weight {UP} holds NaN",
    ),
    "-infinity in fp16": (
        lambda w: w.update({UP: w[UP].half().index_fill(0, torch.tensor([7]), -float("inf"))}),
        f"weight {UP} holds NaN or infinite",
    ),
    "NaN in a norm": (
        lambda w: w["model.norm.weight"][3:4].fill_(float("nan")),
        "weight model.norm.weight holds NaN",
    ),
    "adapter": (lambda w: w.update({"base.q_proj.lora_A.weight": torch.ones(4, 64)}), "is a LoRA adapter"),
}


@pytest.mark.parametrize(("change", "named"), DAMAGE.values(), ids=DAMAGE)
def test_refused_weights(llama: Path, change: Callable[[dict[str, Tensor]], object], named: str) -> None:
    change_weights(llama, change)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(llama)


def packed_as(*parts: str, weight: torch.dtype | None = None) -> Callable[[dict[str, Tensor]], object]:
    """Puts other tensors beside every projection's weight, or in its place where no type is given for it."""

    def change(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            layer = name.removesuffix(".weight")
            old = weights.pop(name)
            if weight is not None:
                weights[name] = old.to(weight)
            weights.update({f"{layer}.{part}": torch.ones(1) for part in parts})

    return change


QUANTIZED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "GPTQ": (packed_as("qweight", "qzeros", "scales", "g_idx"), "tensor of GPTQ"),
    "AWQ": (packed_as("qweight", "qzeros", "scales"), "tensor of GPTQ or AWQ"),
    "bitsandbytes, 8 bits": (packed_as("SCB", weight=torch.int8), "tensor of bitsandbytes"),
    "bitsandbytes, 4 bits": (
        packed_as("weight.absmax", "weight.quant_map", weight=torch.uint8),
        "tensor of bitsandbytes",
    ),
    "compressed-tensors": (packed_as("weight_packed", "weight_scale", "weight_shape"), "tensor of compressed-tensors"),
    "NVFP4": (packed_as("weight_scale", "weight_scale_2", weight=torch.uint8), "tensor of NVFP4"),
    "FP8 in blocks": (packed_as("weight_scale_inv", weight=torch.float8_e4m3fn), "tensor of FP8 in blocks"),
    "FP8": (packed_as("weight_scale", weight=torch.float8_e4m3fn), "tensor of ModelOpt, llm-compressor or Quark"),
    "scales of a KV cache": (packed_as("k_scale", weight=torch.float32), "tensor of ModelOpt"),
    "MXFP4": (packed_as("gate_up_proj_blocks", "gate_up_proj_scales"), "quantized to MXFP4"),
    "FP8 without scales": (packed_as(weight=torch.float8_e4m3fn), "is float8_e4m3fn, quantized, and has no scale"),
    "FP8 E5M2 without scales": (packed_as(weight=torch.float8_e5m2), "is float8_e5m2, quantized"),
    "int8 without scales": (packed_as(weight=torch.int8), "is int8, quantized, and has no scale"),
    "bytes without scales": (packed_as(weight=torch.uint8), "is uint8, quantized, and has no scale"),
    "int32 without scales": (packed_as(weight=torch.int32), "is int32, quantized, and has no scale"),
}


@pytest.mark.parametrize(("change", "named"), QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_weights_without_their_config(
    llama: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    change_weights(llama, change)
    with pytest.raises(CheckpointError, match=f"{named}.*give the original weights"):
        load_checkpoint(llama)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors(llama: Path, kept: float) -> None:
    truncate(llama / "model.safetensors", kept)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* truncated"):
        load_checkpoint(llama)


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
