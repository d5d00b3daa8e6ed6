"""What steps of a pair would cost, by its shapes and a GPU's published figures alone, without weights.

A step reads all weights that it multiplies with and the cache of its rows, and computes for each of its tokens: its
seconds are taken to be those of both, one after the other. Launching kernels, and what several GPUs tell one another,
comes on top and is not reckoned: of a small model it is most of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ssv.builder.advice.gpus import Gpu
from ssv.bundle.profile import Costs, Curve
from ssv.model.checkpoint import DecoderSpec, spec_from_hf_config
from ssv.support.errors import UserError
from ssv.support.json_text import read_json_object

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DEGREES = (1, 2, 4, 8)
"""GPUs that may share a target."""

USABLE = 0.9
"""Of a GPU's memory: the rest is for activations and the libraries, as vLLM leaves it by default."""

CACHE_BYTES = 2
"""Of a number in the cache, whatever the weights are."""

BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
"""Of a weight: of INT4 in groups of 128 with a scale of 16 bits."""

PADDING = 1024
"""Rows that embeddings of the same tokens may differ by: they are padded to whole blocks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A network by its sizes.

    Attributes:
        spec: of its layers.
        multiplied: weights that a token is multiplied with.
        stored: weights in memory.
        is_head: whether it is an EAGLE-3 head, which has the target's tokens by its make.
    """

    spec: DecoderSpec
    multiplied: int
    stored: int
    is_head: bool = False

    def cache_bytes(self, context: int) -> int:
        """Bytes of the cache that one row of so many tokens takes."""
        spec = self.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * CACHE_BYTES

    def flops(self, context: int) -> int:
        """Floating-point operations of one token behind so many."""
        spec = self.spec
        return 2 * self.multiplied + 4 * spec.num_layers * spec.num_heads * spec.head_dim * context


def has_shape_alone(path: Path) -> bool:
    """Whether a path names a config.json, or a folder that has one and no weights."""
    if path.is_dir():
        return (path / "config.json").is_file() and not any(
            each.suffix in (".safetensors", ".bin", ".pt") for each in path.iterdir()
        )
    return path.suffix == ".json"


def read_shape(path: Path) -> Shape:
    """The shape in a config.json, given by its path or its folder: a language model's, or an EAGLE-3 head's (one with
    `draft_vocab_size`).

    Raises:
        UserError: it cannot be read, or is not supported.
    """
    config = read_json_object(path / "config.json" if path.is_dir() else path, UserError)
    return _head_shape(config) if "draft_vocab_size" in config else _model_shape(config)


def _model_shape(config: Mapping[str, Any]) -> Shape:
    spec = spec_from_hf_config(config)
    sizes = {name: prod(shape) for name, shape in spec.weight_shapes().items()}
    stored = sum(sizes.values())
    # With tied embeddings the LM head reads them; else a token takes one row of them.
    return Shape(spec, stored - (0 if spec.tie_embeddings else sizes["model.embed_tokens.weight"]), stored)


def _head_shape(config: Mapping[str, Any]) -> Shape:
    rows = config["draft_vocab_size"]
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"config.json: draft_vocab_size is {rows!r}, must be a whole number of at least 1")
    spec = spec_from_hf_config({**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    h = spec.hidden_size
    target_hidden = config.get("target_hidden_size") or h
    layers = sum(prod(shape) for name, shape in spec.weight_shapes().items() if name.startswith("model.layers."))
    # Its products of attention see the embedding beside the features, which are three states of the target's.
    beside = h * spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    weights = layers + beside + 3 * target_hidden * h + rows * h
    return Shape(replace(spec, tie_embeddings=False), weights, weights, is_head=True)


@dataclass(frozen=True, slots=True)
class Placed:
    """A pair on GPUs.

    Attributes:
        degree: GPUs that share the target; the draft is on each of them.
        bytes_per_gpu: weights and caches.
        fits: whether each has memory for that.
        costs: of steps.
    """

    degree: int
    bytes_per_gpu: float
    fits: bool
    costs: Costs


def place_pair(
    target: Shape, draft: Shape, gpu: Gpu, precision: str, *, degree: int | None, context: int, rows: int
) -> Placed:
    """A pair on so many GPUs.

    Args:
        degree: None for the fewest that have the memory.
        context: tokens of each row.
        rows: that are decoded side by side: all their caches are in memory, and a step reads them.

    Raises:
        UserError: a precision that the GPU lacks, or a degree that cannot share the target evenly.
    """
    if precision not in BYTES:
        raise UserError(f"--precision {precision} is not one for shapes", f"choose one of: {', '.join(BYTES)}")
    if precision == "fp8" and gpu.fp8_tflops is None:
        raise UserError("this GPU has no FP8 units", "choose bf16 or int4, or another GPU")
    per_weight = BYTES[precision]
    spec = target.spec
    possible = [n for n in DEGREES if spec.is_shared_evenly(n)]
    if degree is not None and (degree < 1 or not spec.is_shared_evenly(degree)):
        raise UserError(
            f"{degree} GPUs cannot share {spec.num_heads} heads, {spec.num_kv_heads} of keys and values, and "
            f"{spec.intermediate_size} rows of an MLP evenly",
            f"choose one of {possible}",
        )

    def on_each(n: int) -> float:
        shared = (target.stored * per_weight + rows * target.cache_bytes(context)) / n
        return shared + draft.stored * per_weight + rows * draft.cache_bytes(context)

    fitting = [n for n in possible if on_each(n) <= USABLE * gpu.gb * 1e9]
    chosen = degree or (fitting[0] if fitting else possible[-1])
    flops_per_s = 1e12 * (gpu.fp8_tflops if precision == "fp8" and gpu.fp8_tflops else gpu.bf16_tflops)
    costs = Costs(
        target=_curve(target, gpu, flops_per_s, gpus=chosen, per_weight=per_weight, context=context, rows=rows),
        draft=_curve(draft, gpu, flops_per_s, gpus=1, per_weight=per_weight, context=context, rows=rows),
    )
    return Placed(chosen, on_each(chosen), on_each(chosen) <= USABLE * gpu.gb * 1e9, costs)


def _curve(
    shape: Shape, gpu: Gpu, flops_per_s: float, *, gpus: int, per_weight: float, context: int, rows: int
) -> Curve:
    read = (shape.multiplied * per_weight + rows * shape.cache_bytes(context)) / (gpu.gb_per_s * 1e9)
    computed = shape.flops(context) / flops_per_s
    return Curve(tokens=SIZES, seconds=tuple((read + n * computed) / gpus for n in SIZES))


def vocabulary_differs(target: Shape, draft: Shape) -> bool:
    """Whether the sizes say that the tokens are not the same."""
    return not draft.is_head and abs(target.spec.vocab_size - draft.spec.vocab_size) >= PADDING
