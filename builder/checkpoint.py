"""Reads a decoder-only checkpoint into a `DecoderSpec` and named weights.

Sources: a Hugging Face folder (config.json and safetensors) or a GGUF file. Nothing from the checkpoint is
executed: JSON, safetensors and GGUF are data, and pickled weights (*.bin, *.pt) are refused.

Weights carry Hugging Face names ("model.layers.0.self_attn.q_proj.weight") whatever their source, because that is
the vocabulary every neighbouring tool speaks.

May import: nothing else of ssv.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Weights = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or is not supported; the message names the field or file and the cure."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3 rope scaling (`rope_type: llama3`), as defined by Hugging Face's modeling_rope_utils."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything about a decoder-only transformer that its weights do not say.

    Covers Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3 and SmolLM2: pre-norm RMSNorm, rotary attention with grouped
    key/value heads, gated SiLU MLP.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderSpec:
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise CheckpointError(f"unknown field in decoder spec: {', '.join(sorted(unknown))}")
        if missing := known - set(data):
            raise CheckpointError(f"decoder spec lacks: {', '.join(sorted(missing))}")
        scaling = data["rope_scaling"]
        return cls(**{**data, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    def rope_frequencies(self) -> Tensor:
        """Angular frequency of each rotated pair, radians per position.

        Returns:
            fp32 [head_dim / 2].
        """
        # On the CPU whatever the default device is: a network that is laid out on "meta" keeps them.
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        freq = 1.0 / (self.rope_theta**exponent)
        if self.rope_scaling is None:
            return freq
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly.
        s = self.rope_scaling
        wavelength = 2 * math.pi / freq
        smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * freq / s.factor + smooth * freq

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that a checkpoint of this spec must hold."""
        h, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for layer in range(self.num_layers):
            p = f"model.layers.{layer}."
            shapes |= {
                p + "input_layernorm.weight": (h,),
                p + "self_attn.q_proj.weight": (q, h),
                p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h),
                p + "self_attn.o_proj.weight": (h, q),
                p + "post_attention_layernorm.weight": (h,),
                p + "mlp.gate_proj.weight": (i, h),
                p + "mlp.up_proj.weight": (i, h),
                p + "mlp.down_proj.weight": (h, i),
            }
            if self.qkv_bias:
                shapes |= {p + f"self_attn.{n}_proj.bias": (s,) for n, s in (("q", q), ("k", kv), ("v", kv))}
            if self.output_bias:
                shapes[p + "self_attn.o_proj.bias"] = (h,)
            if self.mlp_bias:
                shapes |= {p + f"mlp.{n}_proj.bias": (s,) for n, s in (("gate", i), ("up", i), ("down", h))}
            if self.qk_norm:
                shapes |= {p + f"self_attn.{n}_norm.weight": (d,) for n in "qk"}
        shapes["model.norm.weight"] = (h,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes


def load_checkpoint(path: Path | str) -> tuple[DecoderSpec, Weights]:
    """Reads a Hugging Face folder or a GGUF file.

    Args:
        path: folder with config.json and *.safetensors, or a .gguf file.

    Returns:
        The spec, and the weights in the dtype they are stored in (GGUF's quantized ones as fp16, the precision of its scales).

    Raises:
        CheckpointError: missing, truncated, of an unsupported architecture, or with weights that do not fit the spec.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        spec, weights = _load_gguf(path)
    elif path.is_dir():
        config, weights = read_hf_folder(path)
        spec = spec_from_hf_config(config)
    elif not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    else:
        raise CheckpointError(f"{path} is neither a Hugging Face folder nor a .gguf file")
    return spec, check_weights(spec, weights, path)


def check_weights(spec: DecoderSpec, weights: Weights, source: Path | str) -> Weights:
    """Weights restricted to what the spec asks for, each of the shape it asks for.

    Raises:
        CheckpointError: naming the first missing or misshapen weight, or biases that the spec does not know.
    """
    expected = spec.weight_shapes()
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{source}: weight {name} is missing; is a shard of the checkpoint absent?")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{source}: weight {name} has shape {tuple(weights[name].shape)}, expected {shape}")
    # A tied checkpoint may repeat its embedding as lm_head, and old ones store the rope buffer; anything else that
    # we do not know would change the logits.
    known = {*expected, "lm_head.weight"}
    if unknown := sorted(n for n in weights if n not in known and not n.endswith("rotary_emb.inv_freq")):
        raise CheckpointError(
            f"{source}: unknown weight {unknown[0]} ({len(unknown)} unknown in all): not a plain decoder"
        )
    return {name: weights[name] for name in expected}


# --- Hugging Face folders -------------------------------------------------------------------------------------------

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def spec_from_hf_config(config: Mapping[str, Any]) -> DecoderSpec:
    """DecoderSpec of a parsed config.json.

    Raises:
        CheckpointError: architecture or setting that is not supported, naming the field.
    """
    architectures = config.get("architectures") or []
    family = next((_FAMILIES[a] for a in architectures if a in _FAMILIES), None)
    if family is None:
        raise CheckpointError(f"architectures {architectures} is not supported; supported: {', '.join(_FAMILIES)}")
    _refuse_unsupported(config, family)
    try:
        num_heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        theta, scaling = _rope_settings(config)
        attention_bias = bool(config.get("attention_bias", False))
        return DecoderSpec(
            family=family,
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
            output_bias=family in ("llama", "qwen3") and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
        )
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json has a value of the wrong type ({error})") from error


def hf_config(spec: DecoderSpec, eos_token_ids: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a spec, so that a bundle's target is a Hugging Face folder that other tools load too.

    Args:
        dtype: that the weights beside it are stored in.
    """
    architecture = next(name for name, family in _FAMILIES.items() if family == spec.family)
    rope: dict[str, Any] = {"rope_theta": spec.rope_theta, "rope_type": "default"}
    if spec.rope_scaling is not None:
        s = spec.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": spec.family,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": eos_token_ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.family in ("llama", "qwen3"):
        config["attention_bias"] = spec.qkv_bias
    if spec.family == "llama":
        config["mlp_bias"] = spec.mlp_bias
    if spec.family == "mistral":
        config["sliding_window"] = None
    return config


def _refuse_unsupported(config: Mapping[str, Any], family: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise CheckpointError(f"{key}: mixture-of-experts models are not supported")
    if config.get("quantization_config"):
        raise CheckpointError(
            "quantization_config: this needs a checkpoint that is not quantized, give the original weights"
        )
    # Qwen's configs carry a sliding_window that is off unless use_sliding_window is set; Mistral's is on when not null.
    window_on = config.get("use_sliding_window", family == "mistral")
    if window_on and config.get("sliding_window"):
        raise CheckpointError(f"sliding_window {config['sliding_window']}: sliding-window attention is not supported")
    if any(t != "full_attention" for t in config.get("layer_types") or []):
        raise CheckpointError("layer_types: only full_attention layers are supported")
    for settings in (config, config.get("rope_parameters") or {}):
        if settings.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"partial_rotary_factor {settings['partial_rotary_factor']} is not supported, only 1.0"
            )


def _rope_settings(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; earlier ones rope_theta beside rope_scaling.
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError("rope_parameters that differ by layer type are not supported")
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def read_hf_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all weights of a Hugging Face folder, as they are.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are pickled.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config_path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path} is not a JSON object")
    files = _weight_files(folder)
    if not files:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is pickled and is never loaded, convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder} has no *.safetensors{hint}")
    weights: Weights = {}
    for file in files:
        weights |= read_safetensors(file)
    return config, weights


def _weight_files(folder: Path) -> list[Path]:
    # The index says which files are shards: others, such as a consolidated copy or an adapter, may lie beside them.
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder} lacks {missing[0]}, which its index names: is a shard of the checkpoint absent?"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def read_safetensors(path: Path) -> Weights:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: the file is not there, damaged or truncated.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not a safetensors file") from error


# --- GGUF -----------------------------------------------------------------------------------------------------------

_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _load_gguf(path: Path) -> tuple[DecoderSpec, Weights]:
    import gguf  # only readers of GGUF need it

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not a GGUF file") from error
    # GGUFReader maps the file lazily: a cut tail shows only here.
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if path.stat().st_size < end:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, its tensors need {end}")
    spec = _spec_from_gguf({name: field.contents() for name, field in reader.fields.items()}, reader)
    weights: Weights = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:  # rope_freqs.weight repeats what the spec says, in frequencies
            continue
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        quantized = tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16)
        weight = values.to(torch.float16) if quantized else values
        if spec.family == "llama" and ("q_proj." in name or "k_proj." in name):
            heads = spec.num_heads if "q_proj" in name else spec.num_kv_heads
            weight = _undo_llama_permutation(weight, heads)
        weights[name] = weight
    return spec, weights


def _spec_from_gguf(meta: Mapping[str, Any], reader: Any) -> DecoderSpec:
    arch = meta.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(f"general.architecture {arch!r} is not supported; supported: llama, qwen2, qwen3")
    names = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    if meta.get(f"{arch}.expert_count"):
        raise CheckpointError("expert_count: mixture-of-experts models are not supported")
    if meta.get(f"{arch}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise CheckpointError(
            "rope.scaling: GGUF files with rope scaling are not supported, use the safetensors folder"
        )
    if meta.get(f"{arch}.attention.sliding_window"):
        raise CheckpointError("attention.sliding_window: sliding-window attention is not supported")
    if meta.get(f"{arch}.attention.scale"):
        raise CheckpointError("attention.scale: only the usual 1 / sqrt(head size) is supported")
    if arch == "llama" and ("blk.0.attn_q.bias" in names) != ("blk.0.attn_output.bias" in names):
        raise CheckpointError("attn_q.bias without attn_output.bias, or the reverse: not a plain Llama")
    try:
        heads = int(meta[f"{arch}.attention.head_count"])
        hidden = int(meta[f"{arch}.embedding_length"])
        head_dim = int(meta.get(f"{arch}.attention.key_length", hidden // heads))
        if (rotated := int(meta.get(f"{arch}.rope.dimension_count", head_dim))) != head_dim:
            raise CheckpointError(f"rope.dimension_count {rotated} is not supported, only the head size {head_dim}")
        return DecoderSpec(
            family=arch,
            hidden_size=hidden,
            intermediate_size=int(meta[f"{arch}.feed_forward_length"]),
            num_layers=int(meta[f"{arch}.block_count"]),
            num_heads=heads,
            num_kv_heads=int(meta.get(f"{arch}.attention.head_count_kv", heads)),
            head_dim=head_dim,
            vocab_size=names["token_embd.weight"][1],
            max_positions=int(meta[f"{arch}.context_length"]),
            rms_norm_eps=float(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
            rope_theta=float(meta.get(f"{arch}.rope.freq_base", 10000.0)),
            rope_scaling=None,
            tie_embeddings="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            output_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_gate.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
        )
    except KeyError as error:
        raise CheckpointError(f"GGUF metadata lacks {error.args[0]}") from error
    except TypeError as error:
        raise CheckpointError(f"GGUF metadata has a value of the wrong type ({error})") from error


def _hf_name(gguf_name: str) -> str | None:
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.{suffix}"
    if stem.startswith("blk."):
        layer, _, part = stem.removeprefix("blk.").partition(".")
        if part in _GGUF_LAYER_NAMES:
            return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[part]}.{suffix}"
    return None if stem == "rope_freqs" else gguf_name


def _undo_llama_permutation(weight: Tensor, num_heads: int) -> Tensor:
    # llama.cpp stores q/k of Llama models, weights and biases, with rotated pairs adjacent; Hugging Face keeps them half
    # a head apart.
    pairs = weight.view(num_heads, len(weight) // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
