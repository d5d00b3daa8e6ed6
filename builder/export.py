"""Writes a bundle's draft as other engines load it."""

from __future__ import annotations

from pathlib import Path

import torch

from ssv.bundle.manifest import read_manifest
from ssv.model.checkpoint import hf_config, load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft
from ssv.model.eagle3 import Layout, published
from ssv.support.errors import UserError
from ssv.support.files import save_whole, whole, write_json


def export_draft(bundle: Path, layout: Layout, out: Path, verifier: str | None = None) -> None:
    """Writes config.json and model.safetensors into a new folder.

    Args:
        verifier: name or path of the target, for who starts from the head; None for the bundle's.

    Raises:
        BundleError, CheckpointError: the bundle is damaged.
        UserError: `out` exists, or the draft has something that the layout cannot say.
        OSError: it cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists", "choose another folder")
    manifest = read_manifest(bundle)
    spec, weights = load_checkpoint(bundle / "target")
    draft = load_draft(bundle / "draft" / "draft.safetensors", Decoder.from_weights(spec, weights, None), None)
    dtype = draft.decoder.norm.weight.dtype
    config, tensors = published(
        draft,
        layout,
        dtype if dtype != torch.float32 else torch.bfloat16,
        target_layers=spec.num_layers,
        verifier=verifier or str((bundle / "target").resolve()),
        architecture=hf_config(spec, manifest.eos_token_ids, dtype)["architectures"][0],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        part.mkdir()
        write_json(part / "config.json", config)
        save_whole(tensors, part / "model.safetensors", metadata={"format": "pt"})
