"""Reads a decoder-only checkpoint into a `DecoderSpec` and named weights.

Sources: a Hugging Face folder (config.json and safetensors) or a GGUF file. Nothing from the checkpoint is
executed: JSON, safetensors and GGUF are data, and pickled weights (*.bin, *.pt) are refused.

What a checkpoint is made of is defined in `ssv.model.spec` and `ssv.model.hf_config`, and can be had from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssv.model.gguf import load_gguf
from ssv.model.hf_config import hf_config, spec_from_hf_config
from ssv.model.spec import CheckpointError, DecoderSpec, RopeDivisors, RopeScaling, Weights
from ssv.support.json_text import parse_json, read_json_object

__all__ = [
    "FLOATS",
    "PICKLES",
    "CheckpointError",
    "DecoderSpec",
    "RopeDivisors",
    "RopeScaling",
    "Weights",
    "check_finite",
    "check_shapes",
    "check_weights",
    "checkpoint_files",
    "hf_config",
    "load_checkpoint",
    "read_hf_config",
    "read_hf_folder",
    "read_safetensors",
    "refuse_pickle",
    "safetensors_metadata",
    "settle_head",
    "spec_from_hf_config",
]

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that torch pickles."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of weights that are not quantized."""


def load_checkpoint(path: Path | str) -> tuple[DecoderSpec, Weights]:
    """Reads a Hugging Face folder or a GGUF file.

    Args:
        path: folder with config.json and *.safetensors, or a .gguf file.

    Returns:
        The spec, and the weights in the dtype they are stored in (GGUF's quantized ones as fp16, the precision of its
        scales).

    Raises:
        CheckpointError: missing, truncated, quantized, of an unsupported architecture, or with weights that do not fit
            the spec or are not finite.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        spec, weights = load_gguf(path)
    elif path.is_dir():
        config, weights = read_hf_folder(path)
        spec = spec_from_hf_config(config)
        _refuse_quantized(weights, path)
    elif not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    else:
        raise CheckpointError(f"{path} is neither a Hugging Face folder nor a .gguf file")
    spec, weights = settle_head(spec, weights)
    return spec, check_weights(spec, weights, path)


def settle_head(spec: DecoderSpec, weights: Weights) -> tuple[DecoderSpec, Weights]:
    """Settles what it means that a config ties the LM head and the checkpoint has a head of its own.

    As in transformers, they are tied if the two are equal or if there is only one of them.
    """
    if not spec.tie_embeddings or (head := weights.get("lm_head.weight")) is None or head.dtype not in FLOATS:
        return spec, weights
    embedding = weights.get("model.embed_tokens.weight")
    if embedding is None:
        return spec, {**weights, "model.embed_tokens.weight": head}
    if head.shape == embedding.shape and torch.equal(head, embedding):
        return spec, weights
    return replace(spec, tie_embeddings=False), weights


def check_weights(spec: DecoderSpec, weights: Weights, source: Path | str) -> Weights:
    """Weights restricted to what the spec asks for, each of the shape it asks for, all numbers finite.

    Raises:
        CheckpointError: naming the first missing, misshapen or not finite weight, or biases that the spec does not
            know.
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
    kept = {name: weights[name] for name in expected}
    check_finite(kept, source)
    return kept


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises CheckpointError naming the first weight that is missing, unknown or has another shape."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{source}: weight {name} is missing")
        shape = tuple(found[name].shape)
        if name not in expected:
            raise CheckpointError(f"{source}: weight {name} of shape {shape} is unknown")
        if shape != tuple(expected[name]):
            raise CheckpointError(f"{source}: weight {name} has shape {shape}, expected {tuple(expected[name])}")


def check_finite(weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises CheckpointError naming the first weight that holds NaN or infinity."""
    for name, weight in weights.items():
        if not _all_finite(weight):
            raise CheckpointError(
                f"{source}: weight {name} holds NaN or infinite numbers: the checkpoint is damaged, or its training "
                "diverged"
            )


def refuse_pickle(path: Path, out: str | None = None) -> None:
    """Refuses a file of heads that torch pickled.

    Args:
        out: what to call the safetensors file; None for the same name.

    Raises:
        CheckpointError: with the command that converts it.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which may hold programs",
            f"convert it with `ssv-build convert-heads {path} --out {out or path.with_suffix('.safetensors').name}`",
        )


def _all_finite(weight: Tensor) -> bool:
    if weight.is_meta or weight.dtype == torch.uint8:
        return True
    if weight.dtype == torch.float8_e4m3fn:  # has no infinity
        return not bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any())
    # One pass without a copy, a twentieth of isfinite's time: the extremes are NaN if one number is.
    return all(bool(extreme.isfinite()) for extreme in weight.aminmax())


# --- Quantized checkpoints ------------------------------------------------------------------------------------------

# The last part of the names of tensors that quantized checkpoints have beside their weights, or in place of them.
_TENSORS_OF = {
    "bitsandbytes": ("SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight_format"),
    "GPTQ": ("g_idx",),
    "GPTQ or AWQ": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "input_global_scale",
    ),
    "NVFP4": ("weight_scale_2",),
    "FP8 in blocks": ("weight_scale_inv", "activation_scale"),
    "ModelOpt, llm-compressor or Quark": (
        "weight_scale",
        "input_scale",
        "pre_quant_scale",
        "output_scale",
        "k_scale",
        "v_scale",
        "q_scale",
    ),
    "EETQ": ("weight_scales",),
    "ExLlama": ("q_weight", "q_groups", "q_invperm", "q_scale_max", "trellis", "suh", "svh"),
    "HQQ": ("W_q",),
    "AQLM": ("codes", "codebooks"),
    "Quanto": ("_data", "_scale"),
}


def _refuse_quantized(weights: Weights, source: Path) -> None:
    """Refuses weights that are quantized, whether or not a config says so."""
    found = {name.rpartition(".")[2] for name in weights}
    for method, parts in _TENSORS_OF.items():
        if present := found & set(parts):
            example = next(name for name in weights if name.rpartition(".")[2] in present)
            raise CheckpointError(
                f"{source} is quantized ({example} is a tensor of {method})", "give the original weights"
            )
    for name, weight in weights.items():
        if name.endswith(("_blocks", "_scales")):
            raise CheckpointError(f"{source} is quantized to MXFP4 ({name})", "give the original weights")
        if "bitsandbytes__" in name:
            raise CheckpointError(f"{source} is quantized by bitsandbytes ({name})", "give the original weights")
        if ".lora_" in name:
            raise CheckpointError(f"{source} is a LoRA adapter ({name})", "merge it into its model and give the result")
        if weight.dtype not in FLOATS and not name.endswith("rotary_emb.inv_freq"):
            kind = str(weight.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: weight {name} is {kind}, quantized, and has no scale", "give the original weights"
            )


# --- Hugging Face folders -------------------------------------------------------------------------------------------

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_hf_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all weights of a Hugging Face folder, as they are.

    Of several files the one counts that transformers takes: model.safetensors, then the shards of the index. Without
    either, all files together.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are pickled; the index and its shards do not fit.
    """
    config = read_hf_config(folder)
    files, weight_map = _weight_files(folder, config)
    return config, _read_shards(folder, weight_map) if weight_map is not None else _joined(files, {})


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: not there, or not JSON.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    return read_json_object(config_path, CheckpointError)


def checkpoint_files(path: Path) -> list[Path]:
    """The files that `load_checkpoint` makes a model of.

    Of a folder they are its config.json, the weights that count, and the index if those are its shards.

    Raises:
        CheckpointError: see `read_hf_folder`.
    """
    if path.is_file():
        return [path]
    files, weight_map = _weight_files(path, read_hf_config(path))
    return sorted([path / "config.json", *files, *([path / _INDEX] if weight_map is not None else [])])


def _weight_files(folder: Path, config: Mapping[str, Any]) -> tuple[list[Path], dict[str, str] | None]:
    """The files of weights that count, and the index's map if they are its shards."""
    if (chosen := config.get("transformers_weights")) not in (None, _SINGLE):
        raise CheckpointError(
            f"{folder}: config.json names its weights, transformers_weights {chosen!r}",
            f"rename them to {_SINGLE} and remove the setting",
        )
    # Read even if it does not count: damaged, it says that something happened to this folder.
    weight_map = _read_index(folder / _INDEX)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], None
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder} lacks {missing[0]}, which its index names: is a shard of the checkpoint absent?"
            )
        return [folder / name for name in names], weight_map
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is pickled and is never loaded, convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder} has no *.safetensors{hint}")
    return files, None


def _read_index(index: Path) -> dict[str, str] | None:
    """The file that each tensor is in.

    Others, such as a consolidated copy or an adapter, may lie beside those files.
    """
    if not index.is_file():
        return None
    try:
        weight_map = dict(parse_json(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged") from error
    if not all(isinstance(file, str) and file and Path(file).name == file for file in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: it names something else than files beside it")
    return weight_map


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> Weights:
    names = sorted(set(weight_map.values()))
    weights = _joined([folder / name for name in names], weight_map)
    if absent := sorted(set(weight_map) - set(weights)):
        raise CheckpointError(
            f"{folder}: {weight_map[absent[0]]} lacks {absent[0]}, which the index says is in it: shards of different "
            "checkpoints?"
        )
    return weights


def _joined(files: Iterable[Path], weight_map: Mapping[str, str]) -> Weights:
    """Tensors of several files, each from the file that a map names, if it names one."""
    weights: Weights = {}
    owner: dict[str, Path] = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in weights:
                raise CheckpointError(
                    f"{file.parent}: {name} is in {owner[name].name} and in {file.name}, and no index says which one "
                    "counts",
                    "remove one",
                )
            weights[name], owner[name] = tensor, file
    return weights


def read_safetensors(path: Path) -> Weights:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: the file is not there, damaged or truncated.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file.

    Raises:
        CheckpointError: see `read_safetensors`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not a safetensors file") from error
