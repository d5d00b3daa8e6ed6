"""Reads ModelOpt's unified Hugging Face checkpoint: the usual folder, with quantized weights and their scales.

TensorRT-LLM, vLLM and SGLang read it too.

What was quantized, and how, stands in `hf_quant_config.json` (NVIDIA ModelOpt, modelopt.torch.export), of which there
are two shapes, or in config.json's `quantization_config`:

* nested: {"producer": ..., "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": null, "exclude_modules": [...],
  "group_size": ...}}
* flat, as compressed-tensors writes it: {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {...},
  "ignore": [...]}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssv.model.checkpoint import (
    FLOATS,
    CheckpointError,
    DecoderSpec,
    Weights,
    check_weights,
    load_checkpoint,
    read_hf_folder,
    settle_head,
    spec_from_hf_config,
)
from ssv.model.quantized import SCALES, is_quantized
from ssv.support.environment import versions
from ssv.support.json_text import read_json_object

CONFIG_NAME = "hf_quant_config.json"

_PRECISIONS = {"FP8": "fp8", "W4A16_AWQ": "int4"}


@dataclass(frozen=True, slots=True)
class QuantizationDocument:
    """The same facts in both shapes: `nested` for hf_quant_config.json, `flat` for config.json."""

    nested: dict[str, Any]
    flat: dict[str, Any]


def quantization_document(precision: str, group_size: int | None, lm_head: bool) -> QuantizationDocument:
    """What ModelOpt writes of a checkpoint whose linear layers are all quantized, the LM head if asked for."""
    algorithm = next(name for name, ours in _PRECISIONS.items() if ours == precision)
    left_out = ["model.embed_tokens"] if lm_head else ["lm_head", "model.embed_tokens"]
    nested: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": left_out}
    if precision == "fp8":
        kind = {"dynamic": False, "num_bits": 8, "type": "float"}
        group = {"input_activations": kind, "weights": kind, "targets": ["Linear"]}
        flat["config_groups"] = {"group_0": group}
    else:
        nested |= {"group_size": group_size, "has_zero_point": False, "pre_quant_scale": True}
    producer = {"name": "modelopt", "version": versions("nvidia-modelopt")["nvidia-modelopt"]}
    nested["exclude_modules"] = left_out
    return QuantizationDocument({"producer": producer, "quantization": nested}, {**flat, "producer": producer})


def load_any(path: Path) -> tuple[DecoderSpec, Weights]:
    """Reads a checkpoint, quantized by ModelOpt or not at all.

    Quantized layers keep their tensors, see `ssv.model.quantized`.

    Raises:
        CheckpointError: see `load_checkpoint`; or it is quantized in a way that is not supported.
    """
    if _read_facts(path) is None:
        return load_checkpoint(path)
    precision = quantization_of(path)
    config, weights = read_hf_folder(path)
    spec = spec_from_hf_config({key: value for key, value in config.items() if key != "quantization_config"})
    spec, weights = settle_head(spec, weights)
    return spec, _check(spec, weights, path, precision)


def quantization_of(path: Path) -> str | None:
    """What ModelOpt has quantized a folder to, "fp8" or "int4".

    Returns:
        None for a folder that is not quantized, or of which only the KV cache is.

    Raises:
        CheckpointError: quantized by something else, or to something that is not supported.
    """
    facts = _read_facts(path)
    if facts is None:
        return None
    algorithm = facts.get("quant_algo") or _algorithm_of_groups(facts)
    if algorithm is None and facts.get("kv_cache_quant_algo") and not facts.get("config_groups"):
        return None
    if not isinstance(algorithm, str) or algorithm not in _PRECISIONS:
        raise CheckpointError(
            f"{path} is quantized to {algorithm}, supported are {' and '.join(_PRECISIONS)}",
            "quantize the original again",
        )
    return _PRECISIONS[algorithm]


def _read_facts(path: Path) -> Mapping[str, Any] | None:
    """What says how a folder is quantized, in either shape."""
    found: list[dict[str, Any]] = []
    for file, key in ((path / CONFIG_NAME, None), (path / "config.json", "quantization_config")):
        if not file.is_file():
            continue
        document = read_json_object(file, CheckpointError)
        facts = document.get(key) if key is not None else document
        if facts is None:
            continue
        nested = facts.get("quantization", facts) if isinstance(facts, dict) else None
        if not isinstance(nested, dict):
            raise CheckpointError(f"{file}: its quantization is not an object")
        if (method := facts.get("quant_method", "modelopt")) != "modelopt":
            raise CheckpointError(
                f"quantization_config: {path} is quantized by {method}, only ModelOpt's checkpoints are supported"
            )
        found.append(nested)
    algorithms = [facts["quant_algo"] for facts in found if facts.get("quant_algo")]
    if len(algorithms) == 2 and algorithms[0] != algorithms[1]:
        raise CheckpointError(
            f"{path}: {CONFIG_NAME} says {algorithms[0]}, config.json {algorithms[1]}", "quantize the original again"
        )
    return found[0] if found else None


def _algorithm_of_groups(facts: Mapping[str, Any]) -> str | None:
    """The algorithm of a flat document that does not name it, if all its groups are of one kind."""
    groups = facts.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None
    found = set()
    for group in groups.values():
        if not isinstance(group, dict):
            return None
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict):
            return None
        kind = f"{weights.get('num_bits')}-bit {weights.get('type')}{'' if inputs is None else ' with inputs'}"
        found.add({"8-bit float with inputs": "FP8", "4-bit int": "W4A16_AWQ"}.get(kind, kind))
    return found.pop() if len(found) == 1 else None


def _check(spec: DecoderSpec, weights: Weights, path: Path, precision: str | None) -> Weights:
    """Weights restricted to the spec's and their scales, shapes checked.

    The scales of a quantized KV cache are left out: the cache is in the compute type here, which is the more exact.
    """
    scales = {name for name in weights if name.rpartition(".")[2] in SCALES}
    cache_scales = {name for name in weights if name.rpartition(".")[2] in ("k_scale", "v_scale")}
    plain = {name: weight for name, weight in weights.items() if name not in scales | cache_scales}
    layers = {name.rpartition(".")[0] for name in scales}
    packed = {name.rpartition(".")[0] for name, weight in plain.items() if weight.dtype not in FLOATS}
    if bare := sorted(packed - layers):
        raise CheckpointError(f"{path}: {bare[0]} is quantized and has no scale")
    if precision is not None and not layers:
        raise CheckpointError(
            f"{path} is said to be quantized to {precision}, and no layer of it is", "give the right weights"
        )
    if precision is None and layers:
        raise CheckpointError(f"{path} is said not to be quantized but for its KV cache, and {min(layers)} is")
    _check_scales(weights, scales, path)
    if strange := sorted(layer for layer in layers if not layer.endswith("_proj") and layer != "lm_head"):
        raise CheckpointError(f"{path}: {strange[0]} is quantized, supported are projections and the LM head")
    for layer in sorted(layers):
        if f"{layer}.weight" not in plain or not is_quantized(weights, layer):
            raise CheckpointError(f"{path}: {layer} has scales and lacks its weight or weight_scale")
    # Two rows of an INT4 weight are one row of bytes.
    unpacked = {
        name: torch.empty(2 * weight.shape[0], *weight.shape[1:], device="meta")
        if weight.dtype == torch.uint8
        else weight
        for name, weight in plain.items()
    }
    kept = check_weights(spec, unpacked, path)
    if "lm_head" in layers:  # of its own, though the spec may tie it
        kept["lm_head.weight"] = unpacked["lm_head.weight"]
    if unknown := sorted(layer for layer in layers if f"{layer}.weight" not in kept):
        raise CheckpointError(f"{path}: scales of an unknown layer {unknown[0]}")
    return {name: weights[name] for name in (*kept, *scales)}


def _check_scales(weights: Weights, scales: Iterable[str], path: Path) -> None:
    for name in scales:
        low, high = weights[name].float().aminmax() if weights[name].numel() else (torch.ones(()), torch.ones(()))
        # A group of weights that are all zero may have the scale zero; inputs are divided by theirs.
        divides = name.endswith(".input_scale")
        if not (low.isfinite() and high.isfinite()) or low < 0 or (divides and low == 0):
            raise CheckpointError(
                f"{path}: {name} holds {'0, ' if divides else ''}negative, NaN or infinite numbers: the checkpoint is "
                "damaged"
            )
