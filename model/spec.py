"""What a decoder-only transformer is, apart from its weights.

Weights carry Hugging Face names ("model.layers.0.self_attn.q_proj.weight") whatever their source, because that is
the vocabulary every neighbouring tool speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ssv.support.errors import UserError

Weights = dict[str, Tensor]


class CheckpointError(UserError):
    """A checkpoint that cannot be read or is not supported; the message names the field or file and the cure."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3 rope scaling (`rope_type: llama3`), as defined by Hugging Face's modeling_rope_utils."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor "
                f"{self.low_freq_factor}"
            )

    def scaled(self, frequency_P: Tensor) -> Tensor:
        """Frequencies after scaling.

        Long wavelengths are stretched by `factor`, short ones are kept, and those between are blended linearly.
        """
        wavelength = 2 * math.pi / frequency_P
        smooth = self.original_max_positions / wavelength - self.low_freq_factor
        smooth = (smooth / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - smooth) * frequency_P / self.factor + smooth * frequency_P


@dataclass(frozen=True, slots=True)
class RopeDivisors:
    """Rope scaling that divides each pair's frequency by a number of its own.

    Linear scaling is the case in which they are all the same; llama.cpp keeps Llama 3's in `rope_freqs.weight`.
    """

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        if bad := [d for d in self.divisors if not (math.isfinite(d) and d > 0)]:
            raise CheckpointError(f"rope scaling: a frequency is divided by {bad[0]}, must be a number above 0")

    def scaled(self, frequency_P: Tensor) -> Tensor:
        """Frequencies after scaling."""
        return frequency_P / torch.tensor(self.divisors, dtype=frequency_P.dtype, device=frequency_P.device)


_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_positions",
)


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
    rope_scaling: RopeScaling | RopeDivisors | None
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise CheckpointError(f"rope_theta is {self.rope_theta}, must be a number above 0")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):  # 0 makes NaN of a row of zeros
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps}, must be a number above 0")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, must be even: rope rotates pairs")
        if isinstance(self.rope_scaling, RopeDivisors) and len(self.rope_scaling.divisors) != self.head_dim // 2:
            raise CheckpointError(
                f"rope scaling has {len(self.rope_scaling.divisors)} divisors, the heads {self.head_dim // 2} pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON can have it, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderSpec:
        """Reads what `to_dict` gives.

        Raises:
            CheckpointError: a field is unknown, missing or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise CheckpointError(f"unknown field in decoder spec: {', '.join(sorted(unknown))}")
        if missing := known - set(data):
            raise CheckpointError(f"decoder spec lacks: {', '.join(sorted(missing))}")
        scaling: RopeScaling | RopeDivisors | None = None
        if given := data["rope_scaling"]:
            scaling = RopeDivisors(tuple(given["divisors"])) if "divisors" in given else RopeScaling(**given)
        return cls(**{**data, "rope_scaling": scaling})

    def rope_frequencies(self) -> Tensor:
        """Angular frequency of each rotated pair, radians per position.

        Returns:
            fp32 [head_dim / 2].
        """
        # On the CPU whatever the default device is: a network that is laid out on "meta" keeps them.
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        freq = 1.0 / (self.rope_theta**exponent)
        return freq if self.rope_scaling is None else self.rope_scaling.scaled(freq)

    def is_shared_evenly(self, gpus: int) -> bool:
        """Whether so many GPUs can share the model, as engines ask for: whole heads and whole rows of the MLP on each;
        heads of keys and values may be repeated."""
        whole_kv_heads = self.num_kv_heads % gpus == 0 or gpus % self.num_kv_heads == 0
        return whole_kv_heads and self.num_heads % gpus == 0 and self.intermediate_size % gpus == 0

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
