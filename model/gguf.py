"""Reads a GGUF file into a `DecoderSpec` and weights under Hugging Face names.

What metadata means, and what counts where it is absent, is as in llama.cpp's loader (`load_hparams`). Metadata of the
model's architecture that is not known here is refused by name: it may change what the model computes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ssv.model.spec import CheckpointError, DecoderSpec, RopeDivisors, RopeScaling, Weights

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FREQS = "rope_freqs.weight"
# Older files of the same family: their first four bytes, as they stand in the file.
_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg", b"algg")


def load_gguf(path: Path) -> tuple[DecoderSpec, Weights]:
    """Reads a GGUF file.

    Returns:
        The spec, and the weights: fp32 and bf16 as fp32, all others as fp16, the precision of their scales.

    Raises:
        CheckpointError: damaged, a part of a model, of an unsupported architecture, or with a setting or a type that is
            not supported.
    """
    import gguf  # only readers of GGUF need it

    _check_header(path)
    try:
        reader = gguf.GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    # UnicodeDecodeError is a ValueError.
    except (ValueError, KeyError, IndexError, OSError, OverflowError, struct.error) as error:
        if kind := re.search(r"(\d+) is not a valid GGMLQuantizationType", str(error)):
            raise CheckpointError(
                f"{path} has a tensor of the unknown type {kind.group(1)}",
                "convert the model to a common one, such as Q8_0",
            ) from error
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not a GGUF file") from error
    _refuse_parts(path, meta)
    # GGUFReader maps the file lazily: a cut tail shows only here.
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if path.stat().st_size < end:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, its tensors need {end}")
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    frequencies = next((t for t in reader.tensors if t.name == _ROPE_FREQS), None)
    divisors = tuple(_dequantized(frequencies, path).flatten().tolist()) if frequencies is not None else None
    spec = _spec(meta, shapes, divisors)
    weights: Weights = {}
    hf_names = _hf_names(spec)
    for tensor in reader.tensors:
        if tensor is frequencies:
            continue
        name = hf_names.get(tensor.name, tensor.name)  # no such model has another, and by its name it is refused
        values = _dequantized(tensor, path)
        quantized = tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16)
        weight = values.to(torch.float16) if quantized else values
        if spec.family == "llama" and ("q_proj." in name or "k_proj." in name):
            heads = spec.num_heads if "q_proj" in name else spec.num_kv_heads
            weight = _undo_llama_permutation(weight, heads)
        weights[name] = weight
    return spec, weights


def _dequantized(tensor: Any, path: Path) -> Tensor:
    """A tensor of the reader's in fp32."""
    import gguf

    try:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which is not supported",
            "convert the model to a common one, such as Q8_0",
        ) from error


def _check_header(path: Path) -> None:
    """Refuses a file that is not GGUF, of another byte order, or of a version that cannot be read."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] in _BEFORE_GGUF:
        raise CheckpointError(f"{path} is in a format before GGUF (GGML)", "convert the original weights anew")
    if len(head) < 8 or head[:4] != b"GGUF":
        raise CheckpointError(f"{path} cannot be read: truncated or not a GGUF file")
    little, big = struct.unpack("<I", head[4:])[0], struct.unpack(">I", head[4:])[0]
    if big < little and big < 1 << 16:
        raise CheckpointError(f"{path} is a big-endian GGUF file", "convert it with llama.cpp's gguf_convert_endian.py")
    if little not in (2, 3):
        raise CheckpointError(
            f"{path} is of GGUF version {little}, supported are 2 and 3", "convert the original weights anew"
        )


def _refuse_parts(path: Path, meta: Mapping[str, Any]) -> None:
    """Refuses files that hold no whole model."""
    count = meta.get("split.count", 0)
    part = meta.get("split.no", 0)
    if not count and (named := re.search(r"-(\d{5})-of-(\d{5})$", path.stem)):
        part, count = int(named.group(1)) - 1, int(named.group(2))
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{path} is part {part + 1} of a model in {count} files",
            "merge them with `llama-gguf-split --merge` and give the result",
        )
    if (kind := meta.get("general.type", "model")) != "model":
        raise CheckpointError(f"{path} is no model but of general.type {kind!r}", "give the model's own GGUF file")


# --- Metadata -------------------------------------------------------------------------------------------------------

# Of an architecture's metadata, what says nothing about the computation. The number of vocabulary entries is the
# embedding's.
_WITHOUT_EFFECT = {
    "vocab_size",
    "tensor_data_layout",
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
}
# What is not supported, with the value at which it changes nothing.
_NEUTRAL: dict[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 0,
    "rope.scaling.yarn_log_multiplier": 0,
    "use_parallel_residual": False,
}


class _Metadata:
    """The metadata of a file's architecture, read with names of the file in messages."""

    def __init__(self, meta: Mapping[str, Any], arch: str) -> None:
        prefix = f"{arch}."
        self._arch = arch
        self.values = {key.removeprefix(prefix): value for key, value in meta.items() if key.startswith(prefix)}

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        # Models whose layers differ have a list; a list of equal numbers is one number.
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            self._lacks_or_wrong(key, value, "one whole number")
        if value < 1:
            raise CheckpointError(f"GGUF metadata: {self._arch}.{key} is {value}, must be at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._lacks_or_wrong(key, value, "a number")
        if not math.isfinite(value):
            raise CheckpointError(f"GGUF metadata: {self._arch}.{key} is {value}, must be finite")
        return float(value)

    def _lacks_or_wrong(self, key: str, value: object, wanted: str) -> NoReturn:
        if value is None:
            raise CheckpointError(f"GGUF metadata lacks {self._arch}.{key}")
        raise CheckpointError(
            f"GGUF metadata has a value of the wrong type: {self._arch}.{key} is {value!r}, must be {wanted}"
        )

    def refuse_unknown(self) -> None:
        for key, value in self.values.items():
            if key in _READ | _WITHOUT_EFFECT or (key in _NEUTRAL and value == _NEUTRAL[key]):
                continue
            if key == "attention.value_length" and value == self.values.get("attention.key_length", value):
                continue
            # yarn's numbers count only with yarn, which is refused with its type.
            if key in ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"):
                continue
            if key == "expert_count":
                raise CheckpointError("expert_count: mixture-of-experts models are not supported")
            raise CheckpointError(
                f"GGUF metadata {self._arch}.{key} = {value!r} is not supported: it may change what the model computes"
            )


def _spec(
    meta: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], divisors: tuple[float, ...] | None
) -> DecoderSpec:
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise CheckpointError(f"general.architecture {arch!r} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    settings = _Metadata(meta, arch)
    settings.refuse_unknown()
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError("the GGUF file has no tensor token_embd.weight: it is no whole model")
    _refuse_other_layers(arch, shapes)
    heads, hidden = settings.count("attention.head_count"), settings.count("embedding_length")
    head_dim = settings.count("attention.key_length", hidden // heads)
    if settings.values.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{arch}.attention.value_length is not supported, only the head size {head_dim}")
    if (rotated := settings.count("rope.dimension_count", head_dim)) != head_dim:
        raise CheckpointError(f"rope.dimension_count {rotated} is not supported, only the head size {head_dim}")
    theta = settings.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise CheckpointError(f"GGUF metadata: {arch}.rope.freq_base is {theta}, must be above 0")
    return DecoderSpec(
        family=arch,
        hidden_size=hidden,
        intermediate_size=settings.count("feed_forward_length"),
        num_layers=settings.count("block_count"),
        num_heads=heads,
        num_kv_heads=settings.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=shapes["token_embd.weight"][1],
        max_positions=settings.count("context_length"),
        rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(settings, arch, head_dim, theta, divisors),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def _refuse_other_layers(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses layers that lack a part of their family, or have one of another."""
    query, output = "blk.0.attn_q.bias" in shapes, "blk.0.attn_output.bias" in shapes
    if arch == "qwen2" and not query:
        raise CheckpointError("blk.0.attn_q.bias is missing: a Qwen2 model has one")
    if arch != "qwen2" and query != output:
        raise CheckpointError(f"attn_q.bias without attn_output.bias, or the reverse: not a plain {arch} model")
    for name, family in (("blk.0.attn_q_norm.weight", "qwen3"), ("blk.0.ffn_gate.bias", "llama")):
        if name in shapes and arch != family:
            raise CheckpointError(f"tensor {name}: not a plain {arch} model")
    if "blk.0.attn_q_norm.weight" not in shapes and arch == "qwen3":
        raise CheckpointError("blk.0.attn_q_norm.weight is missing: a Qwen3 model has one")
    for name in ("rope_factors_long.weight", "rope_factors_short.weight", "blk.0.rope_freqs.weight"):
        if name in shapes:
            raise CheckpointError(f"tensor {name}: this rope scaling is not supported, use the safetensors folder")


# --- Rope -----------------------------------------------------------------------------------------------------------


def _rope_scaling(
    settings: _Metadata, arch: str, head_dim: int, theta: float, divisors: tuple[float, ...] | None
) -> RopeScaling | RopeDivisors | None:
    """Linear scaling of rope times the divisors in `rope_freqs.weight`.

    The factor is `rope.scaling.factor`, or `rope.scale_linear`, its old name.
    """
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 0.0))
    if factor < 0:
        raise CheckpointError(f"GGUF metadata: rope scaling factor {factor}, must be above 0")
    factor = factor or 1.0
    # Without a type a factor is a linear one.
    kind = settings.values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"rope.scaling.type {kind!r} is not supported, only 'none' and 'linear'",
            "use a file without it for contexts within the length the model was trained with",
        )
    if kind == "none" and factor != 1:
        raise CheckpointError(f"rope.scaling.type 'none' contradicts the factor {factor}", "remove one of them")
    if divisors is None:
        return RopeDivisors((factor,) * (head_dim // 2)) if factor != 1 else None
    if arch != "llama":
        raise CheckpointError(f"tensor {_ROPE_FREQS}: models of the architecture {arch} have none")
    combined = RopeDivisors(tuple(divisor * factor for divisor in divisors))
    if len(divisors) != head_dim // 2:
        raise CheckpointError(f"{_ROPE_FREQS} has {len(divisors)} values, the heads have {head_dim // 2} pairs")
    if all(divisor == 1 for divisor in combined.divisors):
        return None
    return _llama3(combined, head_dim, theta) or combined


def _llama3(given: RopeDivisors, head_dim: int, theta: float) -> RopeScaling | None:
    """The settings from which llama.cpp's converter makes these divisors, if Llama 3.1, 3.2 or 3.3 has them.

    A bundle's config.json can then say so, in the words that every other tool knows.
    """
    scaling = RopeScaling(max(given.divisors), 1.0, 4.0, 8192)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_P = 1.0 / theta**exponent
    return (
        scaling if torch.allclose(scaling.scaled(frequency_P), given.scaled(frequency_P), rtol=1e-5, atol=0) else None
    )


def _hf_names(spec: DecoderSpec) -> dict[str, str]:
    """What Hugging Face calls the tensors of a model, by their names in a GGUF file.

    It is the gguf package's own table, turned round.
    """
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == spec.family)
    table = gguf.get_tensor_name_map(arch, spec.num_layers)
    return {table.get_name(name, try_suffixes=(".weight", ".bias")) or name: name for name in spec.weight_shapes()}


def _undo_llama_permutation(weight: Tensor, num_heads: int) -> Tensor:
    # llama.cpp stores q/k of Llama models, weights and biases, with rotated pairs adjacent; Hugging Face keeps them
    # half a head apart.
    pairs = weight.view(num_heads, len(weight) // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
