"""config.json of a Hugging Face folder: to a `DecoderSpec` and back.

What a config leaves out gets the default of its family's class in transformers 5
(`transformers.models.*.configuration_*`), and where two settings contradict each other the one that transformers takes
counts, or the config is refused. A setting that would change what the model computes and is not supported is refused by
name; it is never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ssv.model.spec import CheckpointError, DecoderSpec, RopeDivisors, RopeScaling


@dataclass(frozen=True, slots=True)
class _Family:
    """What the configuration class of a family in transformers assumes of absent settings.

    Attributes:
        num_kv_heads: None: as many as query heads. So they are where the setting is null.
        head_dim: None: the hidden size over the number of heads.
    """

    name: str
    max_positions: int
    num_kv_heads: int | None
    head_dim: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, None),
    "MistralForCausalLM": _Family("mistral", 131072, 8),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, 32, 128),
}
_DEFAULT_THETA = 10000.0
_DEFAULT_WINDOW = 4096  # of Mistral and Qwen


def spec_from_hf_config(config: Mapping[str, Any]) -> DecoderSpec:
    """DecoderSpec of a parsed config.json.

    Raises:
        CheckpointError: architecture or setting that is not supported, or a value of a wrong type or range, naming the
            field.
    """
    family = _family(config)
    _refuse_other_models(config, family)
    _refuse_windows(config, family.name)
    num_heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    max_positions = _count(config, "max_position_embeddings", family.max_positions)
    head_dim = _head_dim(config, family, hidden_size, num_heads)
    attention_bias = _flag(config, "attention_bias")
    theta, scaling = _rope_settings(config, max_positions, head_dim)
    spec = DecoderSpec(
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, family, num_heads),
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size"),
        max_positions=max_positions,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=family.name == "qwen2" or (family.name != "mistral" and attention_bias),
        output_bias=family.name in ("llama", "qwen3") and attention_bias,
        mlp_bias=family.name == "llama" and _flag(config, "mlp_bias"),
        qk_norm=family.name == "qwen3",
    )
    _refuse_changed_computation(config, spec)
    return spec


def hf_config(spec: DecoderSpec, eos_token_ids: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a spec, so that a bundle's target is a Hugging Face folder that other tools load too.

    Args:
        dtype: that the weights beside it are stored in.
    """
    architecture = next(name for name, family in _FAMILIES.items() if family.name == spec.family)
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
        "rope_parameters": {"rope_theta": spec.rope_theta, **_rope_parameters(spec)},
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


def _rope_parameters(spec: DecoderSpec) -> dict[str, Any]:
    match spec.rope_scaling:
        case None:
            return {"rope_type": "default"}
        case RopeScaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case RopeDivisors(divisors) if len(set(divisors)) == 1:
            return {"rope_type": "linear", "factor": divisors[0]}
        case RopeDivisors(divisors):
            # LongRoPE with the same numbers before and after its original length is a division of each frequency.
            return {
                "rope_type": "longrope",
                "short_factor": list(divisors),
                "long_factor": list(divisors),
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": spec.max_positions,
            }


# --- Values ---------------------------------------------------------------------------------------------------------


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number of things, at least one; null is as good as absent."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has a value of the wrong type: {key} is {value!r}, must be a whole number")
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value}, must be a whole number of at least 1")
    return int(value)


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has a value of the wrong type: {key} is {value!r}, must be a number")
    if not math.isfinite(value):
        raise CheckpointError(f"config.json: {key} is {value}, must be finite")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json has a value of the wrong type: {key} is {value!r}, must be true or false")
    return bool(value)


def _head_dim(config: Mapping[str, Any], family: _Family, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and family.head_dim is None:
        if hidden_size % num_heads:
            raise CheckpointError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no "
                "head_dim"
            )
        return hidden_size // num_heads
    return _count(config, "head_dim", family.head_dim)


def _num_kv_heads(config: Mapping[str, Any], family: _Family, num_heads: int) -> int:
    absent = family.num_kv_heads if "num_key_value_heads" not in config else None
    return _count(config, "num_key_value_heads", absent or num_heads)


# --- What is refused ------------------------------------------------------------------------------------------------


def _family(config: Mapping[str, Any]) -> _Family:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"config.json has a value of the wrong type: architectures is {architectures!r}")
    family = next((_FAMILIES[a] for a in architectures if isinstance(a, str) and a in _FAMILIES), None)
    if family is None:
        raise CheckpointError(f"architectures {architectures} is not supported; supported: {', '.join(_FAMILIES)}")
    return family


def _refuse_other_models(config: Mapping[str, Any], family: _Family) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if config.get(key):
            raise CheckpointError(f"{key}: mixture-of-experts models are not supported")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        by = f" (it is quantized by {method})" if method else ""
        raise CheckpointError(
            f"quantization_config: this needs a checkpoint that is not quantized{by}, give the original weights"
        )


def _refuse_windows(config: Mapping[str, Any], family: str) -> None:
    """Refuses sliding-window attention, which each family switches on in its own way."""
    window = config.get("sliding_window", None if family == "llama" else _DEFAULT_WINDOW)
    # Qwen's window is off unless use_sliding_window is set; Mistral's is on when not null.
    switch = _flag(config, "use_sliding_window")
    if window and (switch or family in ("llama", "mistral")):
        default = "" if config.get("sliding_window") else f" (the default of {family}, as config.json does not say)"
        raise CheckpointError(
            f"sliding_window {window}{default}: sliding-window attention is not supported; if every token of this "
            "model "
            'sees all before it, set "sliding_window": null'
        )
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        raise CheckpointError("layer_types: only full_attention layers are supported")


# Settings that change what a model computes and that only other architectures have, with the value at which they change
# nothing. A class of transformers ignores those that it does not know; then the weights were made for another model
# than its own.
_NEUTRAL: dict[str, object] = {
    "alibi": False,
    "add_cross_attention": False,
    "altup_num_inputs": None,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attention_sink_size": None,
    "attn_logit_softcapping": None,
    "attn_scale": None,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "dim_model_base": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "global_rope_theta": None,
    "hidden_activation": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "local_rope_theta": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "logits_soft_cap": None,
    "mup_width_multiplier": None,
    "no_rope_layer_interval": None,
    "no_rope_layers": None,
    "normalize_embedding": False,
    "num_kv_shared_layers": 0,
    "parallel_attn": False,
    "parallel_residual": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "qk_layernorm": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rope_interleave": False,
    "rope_interleaved": False,
    "rope_local_base_freq": None,
    "rotary_dim": None,
    "rotary_pct": 1,
    "rotary_percent": 1,
    "scale_depth": None,
    "scale_emb": 1,
    "sliding_window_pattern": None,
    "use_bidirectional_attention": False,
    "use_parallel_residual": False,
}


def _refuse_changed_computation(config: Mapping[str, Any], spec: DecoderSpec) -> None:
    neutral = {
        **_NEUTRAL,
        "attention_multiplier": spec.head_dim**-0.5,
        "query_pre_attn_scalar": spec.head_dim,
        "rotary_dim": spec.head_dim,
        "qk_norm": spec.qk_norm,
        "use_qk_norm": spec.qk_norm,
    }
    for key, value in config.items():
        if key in neutral and value is not None and value != neutral[key]:
            wanted = "" if neutral[key] is None else f", only {neutral[key]!r}"
            raise CheckpointError(f"{key} {value!r} is not supported{wanted}: not a plain {spec.family} model")
    if (model_type := config.get("model_type", spec.family)) != spec.family:
        raise CheckpointError(f"model_type {model_type!r} does not go with architecture {config['architectures'][0]}")


# --- Rope -----------------------------------------------------------------------------------------------------------

# What a type needs, and what may stand beside it without an effect there.
_NEEDED = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}
_WITHOUT_EFFECT = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned"}
_NEUTRAL_ROPE: dict[str, object] = {"partial_rotary_factor": 1, "factor": 1, "attention_factor": 1, "mscale": 1}


def _rope_settings(
    config: Mapping[str, Any], max_positions: int, head_dim: int
) -> tuple[float, RopeScaling | RopeDivisors | None]:
    rope = _rope_object(config)
    holder = next((settings for settings in (rope, config) if settings.get("rope_theta") is not None), {})
    theta = _number(holder, "rope_theta", _DEFAULT_THETA)
    for settings in (rope, config):  # also where another one counts: a file that says this is not what somebody meant
        if settings.get("rope_theta") is not None and (given := _number(settings, "rope_theta")) <= 0:
            raise CheckpointError(f"config.json: rope_theta is {given}, must be a number above 0")
    kind = _rope_type(rope)
    if missing := sorted(_NEEDED[kind] - {key for key, value in rope.items() if value is not None}):
        raise CheckpointError(f"config.json lacks {missing[0]} of its rope_type {kind!r}")
    for key, value in rope.items():
        if key in _NEEDED[kind] | _WITHOUT_EFFECT or value is None or value == _NEUTRAL_ROPE.get(key):
            continue
        if key == "factor" and kind == "default":
            raise CheckpointError(
                f"rope scaling has factor {value} and no rope_type that uses it",
                "add rope_type ('linear', 'llama3'), or remove factor",
            )
        raise CheckpointError(f"{key} {value!r} is not supported with rope_type {kind!r}")
    if kind == "default":
        return theta, None
    if kind == "longrope":
        return theta, _divisors(config, rope, max_positions)
    if (factor := _number(rope, "factor")) <= 0:
        raise CheckpointError(f"config.json: rope factor is {factor}, must be above 0")
    if kind == "linear":
        return theta, RopeDivisors((factor,) * (head_dim // 2)) if factor != 1 else None
    # transformers takes the top level's over that of the rope settings.
    original = config if config.get("original_max_position_embeddings") else rope
    return theta, RopeScaling(
        factor=factor,
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_positions=_count(original, "original_max_position_embeddings", max_positions),
    )


def _rope_object(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of rope that transformers takes.

    Earlier versions wrote rope_theta beside rope_scaling, transformers 5 writes rope_parameters. Where both are there
    rope_scaling counts, since model cards tell people to add it by hand.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise CheckpointError(
                f"config.json has a value of the wrong type: {key} is {config[key]!r}, must be an object or null"
            )
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters") or {}
    rope: Mapping[str, Any] = scaling or parameters
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError("rope_parameters that differ by layer type are not supported")
    if scaling and parameters.get("rope_theta") is not None:
        taken = scaling.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
        if taken != parameters["rope_theta"]:
            raise CheckpointError(
                f"rope_parameters has rope_theta {parameters['rope_theta']}, with rope_scaling beside it {taken} "
                "counts",
                "write rope_theta into rope_scaling, or move all of it to rope_parameters",
            )
    return rope


def _rope_type(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise CheckpointError(f"rope_type {kind!r} and type {rope['type']!r} contradict each other", "remove one")
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise CheckpointError(
            f"rope_type {kind!r} is not supported, only 'default', 'linear' and 'llama3'; for contexts within the "
            "length the model was trained with, remove the scaling"
        )
    return kind


def _divisors(config: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> RopeDivisors:
    """LongRoPE as `hf_config` writes it: the same numbers for short and long texts, cosine and sine not scaled."""
    short, original = rope["short_factor"], _count(rope, "original_max_position_embeddings")
    if not isinstance(short, list) or not all(isinstance(d, int | float) and not isinstance(d, bool) for d in short):
        raise CheckpointError("config.json has a value of the wrong type: short_factor must be a list of numbers")
    factor = _number(rope, "factor", max_positions / original)
    if rope["long_factor"] != short or (rope.get("attention_factor") is None and factor > 1):
        raise CheckpointError(
            "rope_type 'longrope' is not supported where short_factor and long_factor differ or attention is scaled"
        )
    return RopeDivisors(tuple(float(d) for d in short))
