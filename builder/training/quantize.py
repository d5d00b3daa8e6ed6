"""Quantizes a target or a draft with NVIDIA ModelOpt, and writes the result as ModelOpt's unified checkpoint.

FP8 (`FP8_DEFAULT_CFG`) finds a scale for the inputs of each layer; INT4 (`INT4_AWQ_CFG`, Lin et al. 2023,
arXiv:2306.00978) finds the factor by which each input channel is multiplied before its weights are rounded. Factors of
inputs that a norm makes go into the norm, so only the attention's output and the MLP's inner product keep one
(`pre_quant_scale`), as in ModelOpt's own export.

What is quantized is our own network, of which query, key and value are one layer, and gate and up: layers that share an
input then share its scale or factor, where ModelOpt's export has to find a common one afterwards and loses by it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssv.builder.training.passes import CausalAttend, draft_passes, view_target
from ssv.model.checkpoint import CheckpointError, Weights, hf_config
from ssv.model.decoder import Decoder, hf_names, hf_tensors
from ssv.model.draft import Draft, write_draft
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear
from ssv.model.unified import CONFIG_NAME, quantization_document
from ssv.support.errors import UserError
from ssv.support.files import save_whole, write_json
from ssv.support.precisions import QuantizedPrecision


class QuantizeError(UserError):
    """A model that cannot be quantized as asked; the message says why and what to do."""


def quantize_target(
    target: Decoder,
    tokens_BT: Tensor,
    precision: QuantizedPrecision,
    *,
    group_size: int | None = None,
    lm_head: bool = False,
) -> Decoder:
    """A quantized copy of a target.

    Args:
        target: fp32; on CUDA this takes seconds, on a CPU INT4 takes some 50 ms a token of a model of 135 M.
        tokens_BT: int64, text to calibrate on.
        group_size: input channels that share an INT4 scale; None for the largest of 128, 64 and 32 that divides every
            layer's inputs.
        lm_head: quantize the LM head too.

    Raises:
        QuantizeError: ModelOpt is not installed, or the group size does not divide a layer's inputs.
    """
    student = copy.deepcopy(target)  # ModelOpt changes modules in place
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone(), requires_grad=False)
    batch, window = tokens_BT.shape
    tokens_M = tokens_BT.flatten().to(target.embed.weight.device)
    position_M = torch.arange(window, device=tokens_M.device).repeat(batch)

    def run(_: nn.Module) -> None:
        hidden_MH, _tapped = student.run_layers(student.embed(tokens_M), position_M, CausalAttend(batch))
        if lm_head:
            student.logits(hidden_MH)

    _replace(student, precision, group_size, run, skip=() if lm_head else ("lm_head",))
    _fold_layers(student)
    _fold(student, "lm_head", [student.norm])
    student.embed = target.embed
    if not lm_head:
        student.lm_head = target.lm_head
    return student


def quantize_draft(
    draft: Draft, target: Decoder, tokens_BT: Tensor, precision: QuantizedPrecision, *, group_size: int | None = None
) -> Draft:
    """A quantized copy of a draft; arguments as for `quantize_target`.

    Its LM head stays as it is, the target's or its own, and so does the tap, which runs with the target.
    """
    student = copy.deepcopy(draft)
    view = view_target(target, draft, tokens_BT.to(target.embed.weight.device))

    def run(_: nn.Module) -> None:
        for _step in draft_passes(student, tokens_BT.to(target.embed.weight.device), view, depth=3):
            pass

    _replace(student, precision, group_size, run, skip=("decoder.lm_head", "tap.project"))
    _fold_layers(student.decoder)
    if student.conditioned and not student.norms_residual:
        parent, _, name = student.join_name.rpartition(".")
        _fold(student.get_submodule(parent), name, [student.embed_norm, student.feature_norm])
    if not draft.spec.own_embedding:
        student.decoder.embed = target.embed
    student.share_target(target, draft.token_ids)
    return student


def save_quantized_target(
    student: Decoder,
    folder: Path,
    eos_token_ids: list[int],
    dtype: torch.dtype,
    save_tokenizer: Callable[[Path], object],
) -> None:
    """Writes the unified checkpoint of a quantized target into a new folder.

    Args:
        dtype: of what is not quantized.

    Raises:
        CheckpointError: the folder is there already, or cannot be written.
    """
    precision, group_size = _kind(student)
    weights = unified_weights(student, dtype)
    tied = "lm_head.weight" not in weights
    config = hf_config(student.spec, eos_token_ids, dtype) | {"tie_word_embeddings": tied}
    document = quantization_document(precision, group_size, lm_head=not _is_plain(student.lm_head))
    config["quantization_config"] = document.flat
    try:
        folder.mkdir(parents=True)
        save_tokenizer(folder)
        write_json(folder / CONFIG_NAME, document.nested)
        write_json(folder / "config.json", config)
        save_whole(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except FileExistsError as error:
        raise CheckpointError(f"{folder} exists", "choose another folder") from error


def save_quantized_draft(student: Draft, path: Path, dtype: torch.dtype) -> None:
    """Writes a quantized draft: one safetensors file, as `ssv.model.draft.save_draft` does.

    Quantized layers have ModelOpt's tensors in it.
    """
    layers = {name: part for name, part in student.named_modules() if isinstance(part, QuantizedLinear)}
    state = {
        name: value.to(dtype if value.is_floating_point() else torch.int32)
        for name, value in student.own_state().items()
        if name.rpartition(".")[0] not in layers
    }
    for name, layer in layers.items():
        (tensors,) = layer_tensors(layer, [layer.shape[0]], dtype)
        state |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    write_draft(student.spec, state, path)


def unified_weights(student: Decoder, dtype: torch.dtype) -> Weights:
    """All tensors of a quantized target under Hugging Face names.

    What is not quantized, and the factors of inputs, are in `dtype`.
    """
    weights = {"model.embed_tokens.weight": student.embed.weight.to(dtype)}
    for module, parts in hf_names(student.spec).items():
        if module == "lm_head" and _is_plain(student.lm_head) and student.spec.tie_embeddings:
            continue
        layer = student.get_submodule(module)
        sizes = [size for _, size in parts]
        if isinstance(layer, QuantizedLinear):
            for (name, _), tensors in zip(parts, layer_tensors(layer, sizes, dtype), strict=True):
                weights |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
            continue
        weights |= {name: tensor.to(dtype) for name, tensor in hf_tensors(layer, parts).items()}
    return {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}


def layer_tensors(layer: QuantizedLinear, sizes: list[int], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """ModelOpt's tensors of each of several layers that were quantized as one.

    Args:
        sizes: outputs of each.
    """
    if isinstance(layer, Fp8Linear):
        return [
            {"weight": values, "weight_scale": _common(scale_O), "input_scale": layer.input_scale} | _bias(bias, dtype)
            for values, scale_O, bias in zip(
                layer.values_OI.split(sizes), layer.scale_O.split(sizes), _split(layer.bias, sizes), strict=True
            )
        ]
    assert isinstance(layer, AwqLinear)
    factor = {"pre_quant_scale": layer.input_factor_I.to(dtype)} if layer.input_factor_I is not None else {}
    return [
        {"weight": packed, "weight_scale": scale_OG} | factor | _bias(bias, dtype)
        for packed, scale_OG, bias in zip(
            layer.packed_PI.split([size // 2 for size in sizes]),
            layer.scale_OG.split(sizes),
            _split(layer.bias, sizes),
            strict=True,
        )
    ]


# --- ModelOpt -------------------------------------------------------------------------------------------------------


def _replace(
    student: nn.Module,
    precision: QuantizedPrecision,
    group_size: int | None,
    run: Callable[[nn.Module], None],
    skip: tuple[str, ...],
) -> None:
    """Calibrates a network in place and puts quantized layers where its linear ones were."""
    linears = {name: part for name, part in student.named_modules() if isinstance(part, nn.Linear) and name not in skip}
    if precision == "int4":
        group_size = _group_size(group_size, linears)
    with _modelopt() as (mtq, tools):
        settings = _settings(mtq, precision, group_size, skip)
        mtq.quantize(student, settings, run)
        # ModelOpt changes a layer's class in place: it is the same object.
        found = {name: _taken(tools, linear, group_size) for name, linear in linears.items()}
    for name, layer in found.items():
        student.set_submodule(name, layer)
    modules = dict(student.named_modules())
    for name in skip:
        old = modules.get(name)  # a standalone draft has no tap
        if old is not None:
            assert isinstance(old, nn.Linear) and old.bias is None
            plain = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(old.weight.detach(), requires_grad=False)
            student.set_submodule(name, plain)


def _settings(
    mtq: ModuleType, precision: QuantizedPrecision, group_size: int | None, skip: tuple[str, ...]
) -> dict[str, Any]:
    settings = copy.deepcopy(mtq.FP8_DEFAULT_CFG if precision == "fp8" else mtq.INT4_AWQ_CFG)
    rules = settings["quant_cfg"]
    for rule in rules:
        if precision == "int4" and rule["quantizer_name"] == "*weight_quantizer":
            rule["cfg"]["block_sizes"] = {-1: group_size, "type": "static"}
    if not any(name.endswith("lm_head") for name in skip):  # ModelOpt leaves LM heads out by itself
        kinds = ("weight_quantizer", "input_quantizer") if precision == "fp8" else ("weight_quantizer",)
        for kind in kinds:
            usual = next(rule for rule in rules if rule["quantizer_name"] == f"*{kind}")
            rules.append({"quantizer_name": f"*lm_head*{kind}", "cfg": copy.deepcopy(usual["cfg"]), "enable": True})
    rules += [{"quantizer_name": f"*{name}*", "enable": False} for name in skip]
    return settings


def _taken(tools: ModuleType, linear: nn.Linear, group_size: int | None) -> QuantizedLinear:
    """A calibrated layer of ModelOpt as one of ours."""
    bias = linear.bias.detach() if linear.bias is not None else None
    format_ = tools.get_quantization_format(linear)
    scale = tools.get_weight_scaling_factor(linear).detach()
    weight = linear.weight.detach()
    if format_ == "fp8":
        scale = scale.reshape(())
        values = tools.to_quantized_weight(weight, scale, format_)
        input_scale = tools.get_activation_scaling_factor(linear).detach().reshape(()).float()
        return Fp8Linear(values, scale.float().expand(len(weight)).clone(), input_scale, bias)
    assert format_ == "int4_awq", format_
    scale_OG = scale.reshape(len(weight), -1)
    packed = tools.to_quantized_weight(weight, scale_OG, format_, block_size=group_size)
    factor = tools.get_prequant_scaling_factor(linear)
    return AwqLinear(packed, scale_OG.float(), factor.detach().float() if factor is not None else None, bias)


@contextlib.contextmanager
def _modelopt() -> Iterator[tuple[ModuleType, ModuleType]]:
    """ModelOpt, quiet: it reports on stdout, which is for data here."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import quant_utils

            yield mtq, quant_utils
    except ImportError as error:
        raise QuantizeError(
            f"NVIDIA ModelOpt is not installed ({error})", "pip install nvidia-modelopt==0.47.0"
        ) from error


def _group_size(wanted: int | None, linears: dict[str, nn.Linear]) -> int:
    sizes = {name: linear.in_features for name, linear in linears.items()}
    if wanted is None:
        wanted = next((size for size in (128, 64, 32) if all(n % size == 0 for n in sizes.values())), 0)
        if not wanted:
            raise QuantizeError(
                f"no group size of 128, 64 or 32 divides every layer's inputs {sorted(set(sizes.values()))}", "use fp8"
            )
    if bad := [name for name, n in sizes.items() if n % wanted]:
        raise QuantizeError(
            f"group size {wanted} does not divide the {sizes[bad[0]]} inputs of {bad[0]}", "choose a smaller one"
        )
    if odd := [name for name, linear in linears.items() if linear.out_features % 2]:
        raise QuantizeError(f"{odd[0]} has an odd number of outputs, INT4 packs them in pairs", "use fp8")
    return wanted


# --- layers ---------------------------------------------------------------------------------------------------------


def _fold_layers(decoder: Decoder) -> None:
    for layer in decoder.blocks():
        if layer.attn_norm is not None:
            _fold(layer, "qkv", [layer.attn_norm])
        _fold(layer, "gate_up", [layer.mlp_norm])


@torch.no_grad()
def _fold(parent: nn.Module, name: str, norms: list[nn.RMSNorm]) -> None:
    """Puts the factor of a layer's inputs into the norms that make them."""
    layer = getattr(parent, name)
    if not isinstance(layer, AwqLinear) or layer.input_factor_I is None:
        return
    pieces = layer.input_factor_I.split([len(norm.weight) for norm in norms])
    for norm, factor in zip(norms, pieces, strict=True):
        norm.weight = nn.Parameter(norm.weight * factor, requires_grad=False)
    layer.input_factor_I = None


def _kind(student: nn.Module) -> tuple[QuantizedPrecision, int | None]:
    first = next(part for part in student.modules() if isinstance(part, QuantizedLinear))
    return ("int4", first.group_size) if isinstance(first, AwqLinear) else ("fp8", None)


def _is_plain(layer: nn.Module) -> bool:
    return not isinstance(layer, QuantizedLinear)


def _common(scale_O: Tensor) -> Tensor:
    return scale_O[0] if bool((scale_O == scale_O[0]).all()) else scale_O


def _split(bias: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    return [None] * len(sizes) if bias is None else list(bias.split(sizes))


def _bias(bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    return {} if bias is None else {"bias": bias.to(dtype)}
