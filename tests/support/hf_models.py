"""Tiny models of transformers, one for each family and setting that is supported, with weights that all matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import random_weight, tiny_ids, whole_window
from torch import Tensor
from transformers import (
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

from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder

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
    "llama-linear": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    ),
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


def truncate(path: Path, kept: float) -> None:
    """Keeps so many bytes, or that share of them."""
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
