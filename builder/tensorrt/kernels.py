"""Compiles the kernels of a bundle's models ahead of time and writes them to files, as they would be put into engines.

`ssv-build compile` does this by itself where TensorRT has plugins. Here they can be looked at, profiled and launched by
other programs, and it is seen without a GPU that they assemble for it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ssv.builder.config import KernelsConfig
from ssv.builder.tensorrt.engine import scorer_of
from ssv.bundle.manifest import read_manifest
from ssv.bundle.tensorrt_api import EngineBuildError
from ssv.model.checkpoint import DecoderSpec
from ssv.model.draft import load_draft_head
from ssv.plugins.contract import NUM_CONFIDENCE, OpError
from ssv.support.progress import Report


def write_kernels(bundle: Path, config: KernelsConfig, out: Path, report: Report) -> list[Path]:
    """Writes `<role>/<op>-sm_<capability>.ptx`, with a JSON file beside each that says how it is launched.

    Nothing is written before all are compiled.

    Returns:
        The PTX files.

    Raises:
        EngineBuildError: Triton is missing, or a kernel cannot be compiled for a capability.
        BundleError, CheckpointError: the bundle is damaged.
        OSError: the folder cannot be written.
    """
    try:
        from ssv.plugins import aot
    except ModuleNotFoundError as error:
        raise EngineBuildError(str(error), "pip install triton, which compiles the kernels") from error
    manifest = read_manifest(bundle)
    target = DecoderSpec.from_dict(manifest.target)
    draft = load_draft_head(bundle / "draft" / "draft.safetensors").spec
    scorer = scorer_of(bundle, draft)
    num_features = len(scorer.weight_F) if scorer is not None else NUM_CONFIDENCE
    dtype = getattr(torch, config.dtype)
    specs = [
        ("target", aot.sparse_gather_spec(target.hidden_size, dtype, dtype, target.rms_norm_eps)),
        ("draft", aot.sparse_gather_spec(draft.decoder.hidden_size, dtype, dtype, draft.decoder.rms_norm_eps)),
        (
            "draft",
            aot.score_spec(draft.decoder.hidden_size, draft.head_size, dtype, dtype, num_features),
        ),
    ]
    jobs = [(role, spec, capability) for capability in config.compute_capability for role, spec in specs]
    compiled = []
    for done, (role, spec, capability) in enumerate(jobs):
        report("compile kernels", done, len(jobs), f"{role} {spec.name} {capability}")
        try:
            compiled.append((out / role, aot.compile_ahead(spec, capability)))
        except OpError as error:
            raise EngineBuildError(str(error)) from error
    written = [aot.write_artefact(artefact, folder) for folder, artefact in compiled]
    report("compile kernels", len(jobs), len(jobs), f"{len(written)} kernels")
    return written
