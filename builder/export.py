"""Writes a bundle's models as other engines load them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ssv.builder.export_arms import Host, HostSettings, arm_files
from ssv.builder.pad_heads import pad_config, pad_weights, padded_spec
from ssv.bundle.manifest import Manifest, read_manifest
from ssv.model.checkpoint import (
    DecoderSpec,
    Weights,
    checkpoint_files,
    hf_config,
    load_checkpoint,
    read_hf_config,
    read_safetensors,
)
from ssv.model.decoder import Decoder, hf_names, hf_tensors
from ssv.model.draft import Draft, load_draft
from ssv.model.eagle3 import Layout, published
from ssv.model.quantized import QuantizedLinear
from ssv.model.unified import CONFIG_NAME, load_any, quantization_of
from ssv.runtime.trtllm.install import VERSIONS
from ssv.support.errors import UserError
from ssv.support.files import save_whole, whole, write_json

HOSTS: tuple[Host, ...] = get_args(Host)
_LAYOUTS: dict[Host, Layout] = {"trtllm": "eagle3", "vllm": "speculators", "sglang": "eagle3"}
_NAMES: dict[Host, str] = {"trtllm": f"TensorRT-LLM {VERSIONS}", "vllm": "vLLM", "sglang": "SGLang"}


def export_draft(bundle: Path, layout: Layout, out: Path, verifier: str | None = None) -> None:
    """Writes config.json and model.safetensors into a new folder.

    Args:
        verifier: name or path of the target, for who starts from the head; None for the bundle's.

    Raises:
        BundleError, CheckpointError: the bundle is damaged.
        UserError: `out` exists, or the draft has something that the layout cannot say.
        OSError: it cannot be written.
    """
    _refuse_existing(out)
    manifest = read_manifest(bundle)
    target, draft = _read(bundle)
    config, tensors = _head(draft, target, manifest, layout, verifier or str((bundle / "target").resolve()))
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        _write_model(part, config, tensors)


def export_for(
    host: Host,
    bundle: Path,
    out: Path,
    *,
    tensor_parallel: int,
    num_draft_tokens: int = 5,
    max_rows: int = 8,
    max_length: int = 4096,
    memory_share: float = 0.85,
    checkpoint: Path | None = None,
    place: Path | None = None,
    pad_heads: bool = False,
) -> list[str]:
    """Writes a new folder that another engine serves from: target, draft, settings, and scripts of three arms.

    Args:
        tensor_parallel, num_draft_tokens, max_rows, memory_share: see `HostSettings`.
        max_length: cut to what target and draft have positions for.
        checkpoint: what `ssv-build quantize` wrote of the target; None for the bundle's own weights.
        place: where the folder will lie on the machine that serves; None for where it is written.
        pad_heads: whether target and draft get heads of zeros where so many GPUs cannot share theirs; for vLLM.

    Returns:
        What of the bundle is not in it, and why.

    Raises:
        BundleError, CheckpointError: the bundle or the checkpoint is damaged.
        UserError: `out` exists, the models cannot be shared by so many GPUs, or the draft has something that the engine
            would leave out.
        OSError: it cannot be written.
    """
    _refuse_existing(out)
    if not 0 < memory_share < 1:
        raise UserError(f"a share of memory of {memory_share}", "give one between 0 and 1")
    manifest = read_manifest(bundle)
    target, draft = _read(bundle)
    spec = draft.spec
    can_pad = host == "vllm" and checkpoint is None
    if pad_heads and not can_pad:
        what = "a quantized target" if host == "vllm" else _NAMES[host]
        raise UserError(f"--pad-heads is not for {what}", "leave it out, and choose --tp by the model's heads")
    shared = _shared("target", target, tensor_parallel, pad_heads, can_pad)
    if not pad_heads:
        _shared("draft", spec.decoder, tensor_parallel, pad_heads, can_pad)
    # Links of this machine say nothing about the one that serves.
    place = out.resolve() if place is None else Path(os.path.abspath(place))
    positions = min(target.max_positions, spec.decoder.max_positions) - num_draft_tokens - 1
    if positions < 1:
        raise UserError(
            f"target and draft have positions for fewer than {num_draft_tokens} drafted tokens and a request",
            f"give fewer than {num_draft_tokens + positions} with --num-draft-tokens",
        )
    settings = HostSettings(
        host=host,
        place=place,
        bundle=bundle.resolve(),
        name=manifest.name,
        taps=spec.feature_layers,
        tensor_parallel=tensor_parallel,
        num_draft_tokens=num_draft_tokens,
        max_rows=max_rows,
        max_length=min(max_length, positions),
        memory_share=memory_share,
    )
    if draft.conditioned:
        if host == "trtllm":
            _refuse_what_trtllm_leaves_out(draft, target)
        reader = "TensorRT-LLM" if host == "trtllm" else None  # the layouts are named after the others
        model = _head(draft, target, manifest, _LAYOUTS[host], settings.target, reader)
    else:
        model = _language_model(draft, manifest)
    if pad_heads:
        model = _padded_draft(*model, spec.decoder, tensor_parallel)
    source = _target_folder(bundle, target, checkpoint)
    left_out = _left_out(manifest, settings, quantization_of(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        part.mkdir()
        _copy_target(source, bundle / "tokenizer", part / "target")
        if shared != target:
            _pad_target(part / "target", shared)
        _write_model(part / "draft", *model)
        for name, text in arm_files(settings).items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if path.suffix == ".sh" else 0o644)
        facts = {"engine": _NAMES[host], "bundle": manifest.name, "tensor_parallel": tensor_parallel}
        write_json(part / "export.json", {**facts, "arms": list(settings.arms), "left_out": left_out})
    return left_out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists", "choose another folder")


def _read(bundle: Path) -> tuple[DecoderSpec, Draft]:
    spec, weights = load_checkpoint(bundle / "target")
    return spec, load_draft(bundle / "draft" / "draft.safetensors", Decoder.from_weights(spec, weights, None), None)


def _stored_type(draft: Draft) -> torch.dtype:
    dtype = draft.decoder.norm.weight.dtype
    return dtype if dtype != torch.float32 else torch.bfloat16


def _write_model(folder: Path, config: dict[str, Any], tensors: Weights) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_whole(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- drafts ---------------------------------------------------------------------------------------------------------


def _head(
    draft: Draft, target: DecoderSpec, manifest: Manifest, layout: Layout, verifier: str, reader: str | None = None
) -> tuple[dict[str, Any], Weights]:
    dtype = _stored_type(draft)
    return published(
        draft,
        layout,
        dtype,
        target_layers=target.num_layers,
        verifier=verifier,
        architecture=hf_config(target, manifest.eos_token_ids, dtype)["architectures"][0],
        reader=reader,
    )


def _refuse_what_trtllm_leaves_out(draft: Draft, target: DecoderSpec) -> None:
    """What TensorRT-LLM passes over in silence, beside what nobody reads of the layout: `Eagle3DraftModel` in
    tensorrt_llm/_torch/models/modeling_speculative.py, commit 00679c6."""
    spec = draft.spec
    found = ""
    if len(spec.feature_layers) == 1:
        found = "a product of a single tapped layer"  # it makes one of two or more
    elif spec.own_embedding and spec.decoder.hidden_size == target.hidden_size:
        found = "an embedding of its own"  # it takes the target's, where both have one width
    if found:
        raise UserError(f"the draft has {found}, which TensorRT-LLM leaves out", "serve it with another engine")


def _language_model(draft: Draft, manifest: Manifest) -> tuple[dict[str, Any], Weights]:
    """A standalone draft as a Hugging Face folder has it.

    Raises:
        UserError: its LM head does not cover the vocabulary, or it is quantized.
    """
    spec, decoder = draft.spec, draft.decoder
    if any(isinstance(part, QuantizedLinear) for part in draft.modules()):
        raise UserError("the draft is quantized, and is exported as it was before", "export the original draft")
    if spec.head_size < spec.decoder.vocab_size:
        raise UserError(
            f"the draft's LM head covers {spec.head_size} of {spec.decoder.vocab_size} tokens, and a language model's "
            "covers all",
            "distill one with `head_size: null`",
        )
    dtype = _stored_type(draft)
    order = draft.token_ids.argsort()
    is_tied = torch.equal(decoder.lm_head.weight[order], decoder.embed.weight)
    shape = replace(spec.decoder, tie_embeddings=is_tied)
    weights: Weights = {"model.embed_tokens.weight": decoder.embed.weight}
    for module, parts in hf_names(shape).items():
        if module != "lm_head":
            weights |= hf_tensors(decoder.get_submodule(module), parts)
    if not is_tied:
        weights["lm_head.weight"] = decoder.lm_head.weight[order]
    found = {name: weight.detach().to("cpu", dtype, copy=True).contiguous() for name, weight in weights.items()}
    return hf_config(shape, manifest.eos_token_ids, dtype), found


def _padded_draft(
    config: dict[str, Any], tensors: Weights, spec: DecoderSpec, gpus: int
) -> tuple[dict[str, Any], Weights]:
    """An exported draft with the heads that so many GPUs can share.

    Args:
        spec: of its layers but for their heads, of which an exported join makes its own.
    """
    layers = config.get("transformer_layer_config", config)
    num_heads, num_kv_heads = layers["num_attention_heads"], layers["num_key_value_heads"]
    own = replace(spec, num_heads=num_heads, num_kv_heads=num_kv_heads)
    wider = _shared("draft", own, gpus, pads=True, can_pad=True)
    layers.update(pad_config(layers, wider))
    return config, pad_weights(tensors, wider)


# --- the target -----------------------------------------------------------------------------------------------------


def _shared(role: str, spec: DecoderSpec, gpus: int, pads: bool, can_pad: bool) -> DecoderSpec:
    """What so many GPUs can share: the model's own shape, or with `pads` one with more heads.

    Raises:
        UserError: there is none; naming the option that pads if that `can_pad`.
    """
    if spec.is_shared_evenly(gpus):
        return spec
    wider = padded_spec(spec, gpus) if can_pad else None
    if pads and wider is not None:
        return wider
    sizes = range(1, spec.num_heads + 1)
    fit = ", ".join(str(n) for n in sizes if spec.is_shared_evenly(n) or (pads and padded_spec(spec, n) is not None))
    raise UserError(
        f"{gpus} GPUs cannot share the {role} evenly: it has {spec.num_heads} attention heads, "
        f"{spec.num_kv_heads} of keys and values, and {spec.intermediate_size} rows of its MLP",
        f"choose --tp from {fit}" + (", or add heads of zeros with --pad-heads" if wider is not None else ""),
    )


def _target_folder(bundle: Path, spec: DecoderSpec, checkpoint: Path | None) -> Path:
    """Where the target is taken from.

    Raises:
        UserError, CheckpointError: the checkpoint is damaged, not quantized, or another model's.
    """
    if checkpoint is None:
        return bundle / "target"
    if quantization_of(checkpoint) is None:
        raise UserError(f"{checkpoint} is not quantized", "leave --checkpoint out for the bundle's own weights")
    found = load_any(checkpoint)[0]
    if replace(found, tie_embeddings=spec.tie_embeddings) != spec:
        raise UserError(f"{checkpoint} is another model than the bundle's target", "quantize the bundle's target")
    return checkpoint


def _copy_target(source: Path, tokenizer: Path, folder: Path) -> None:
    """The checkpoint with its tokenizer beside it, as a Hugging Face folder has both."""
    folder.mkdir()
    files = [*checkpoint_files(source), *(source / name for name in (CONFIG_NAME, "generation_config.json"))]
    for file in dict.fromkeys([*files, *sorted(tokenizer.iterdir())]):
        if file.is_file():
            _place(file, folder / file.name)


def _pad_target(folder: Path, spec: DecoderSpec) -> None:
    """Gives an exported target the heads of a padded spec: in new files, as its own may be the bundle's."""
    for file in sorted(folder.glob("*.safetensors")):
        save_whole(pad_weights(read_safetensors(file), spec), file, metadata={"format": "pt"})
    write_json(folder / "config.json", pad_config(read_hf_config(folder), spec))


def _place(file: Path, path: Path) -> None:
    """Puts a file in a second place: weights, which nobody edits, without a copy where the file system can."""
    if file.suffix == ".safetensors":
        try:
            os.link(file, path)
            return
        except OSError:
            pass  # another file system, or one without links
    shutil.copyfile(file, path)


def _left_out(manifest: Manifest, settings: HostSettings, precision: str | None) -> list[str]:
    found = []
    if manifest.has_scorer:
        found.append("the scorer: the engine judges every drafted token, and drafts as many each time")
    if lossy := sorted(name for name, tier in manifest.tiers.items() if not tier.lossless):
        found.append(f"the tiers {' and '.join(lossy)}: the engine has nothing that trusts a token")
    if manifest.heads is not None:
        found.append("Medusa's heads: the exported draft is the other one")
    if settings.without_ssv is not None:
        found.append(f"the arm ssv: {settings.without_ssv}")
    elif precision is not None:
        found.append(f"the {precision} weights, in the arm ssv alone: it serves the bundle's own")
    return found
