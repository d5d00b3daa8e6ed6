"""Attention heads that do nothing, for models whose heads so many GPUs cannot share.

A group of heads whose query, key and value are products of zeros attends to nothing and gives zeros, and the columns of
the output's product that take them are zeros, too. So a model with a group more computes the same, for the time and the
cache of the further heads. Names and shapes are those of Hugging Face's layers, as checkpoints and exported drafts have
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssv.model.checkpoint import DecoderSpec, Weights


def padded_spec(spec: DecoderSpec, gpus: int) -> DecoderSpec | None:
    """The spec with the fewest groups of heads that so many GPUs can share; None if there is none.

    The hidden size is a multiple of all heads, as that of the model's own: `LlamaConfig` of transformers, through which
    engines read a config.json, refuses others, whatever `head_dim` says.
    """
    group = spec.num_heads // spec.num_kv_heads
    for num_kv_heads in range(spec.num_kv_heads, spec.hidden_size // group + 1):
        wider = replace(spec, num_kv_heads=num_kv_heads, num_heads=group * num_kv_heads)
        if wider.is_shared_evenly(gpus) and spec.hidden_size % wider.num_heads == 0:
            return wider
    return None


def pad_config(config: Mapping[str, Any], spec: DecoderSpec) -> dict[str, Any]:
    """A config.json, or what one says of layers, with the heads of a padded spec.

    The width of a head is written out: it no longer follows from the hidden size.
    """
    heads = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    return {**config, **heads}


def pad_weights(weights: Mapping[str, Tensor], spec: DecoderSpec) -> Weights:
    """Weights with the heads of a padded spec; what is not of attention, or wide enough, as it is."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    found: Weights = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        if module in rows:
            weight = _with_zeros(weight, 0, rows[module])
        elif (module, kind) == ("o_proj", "weight"):
            weight = _with_zeros(weight, 1, q)
        found[name] = weight
    return found


def _with_zeros(weight: Tensor, dim: int, size: int) -> Tensor:
    lacking = [*weight.shape]
    lacking[dim] = size - weight.shape[dim]
    return torch.cat([weight, weight.new_zeros(lacking)], dim) if lacking[dim] else weight
