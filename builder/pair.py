"""Builds a bundle from a recipe: target, draft, scorer, activation ranges, calibration, manifest.

The bundle is built beside its place and moved there when it is whole. A part whose sources have not changed since the bundle
that is there was built is taken over from it.

May import: everything of ssv.builder but the command line. Decoding, for the calibration, is handed in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssv.builder.calibrate import BOUND_KIND, Calibration
from ssv.builder.checkpoint import hf_config
from ssv.builder.config import (
    CalibrationConfig,
    DistillConfig,
    EngineConfig,
    QuantizeConfig,
    Recipe,
    ScorerConfig,
    checked,
)
from ssv.builder.corpus import chat_pieces, write_conversations
from ssv.builder.distill import DistillResult, distill, draft_passes, view_target
from ssv.builder.draft import Draft, load_draft, save_draft
from ssv.builder.engine import checkpoint_digest, engine_name
from ssv.builder.environment import versions
from ssv.builder.manifest import (
    MANIFEST_NAME,
    BundleError,
    EngineEntry,
    FileEntry,
    Manifest,
    TierEntry,
    digest,
    engine_source,
    file_entry,
    read_manifest,
    write_manifest,
)
from ssv.builder.progress import Report
from ssv.builder.prompts import read_prompts
from ssv.builder.quantize_job import quantize
from ssv.builder.scorer import Scorer, load_scorer, save_scorer
from ssv.builder.scorer_fit import ScorerReport, collect_samples, fit_scorer
from ssv.builder.smoothing import activation_ranges
from ssv.builder.target import Target, load_target, openings_of, prompt_tokens
from ssv.builder.tensorrt_api import EngineBuildError, load_tensorrt
from ssv.builder.tiers import Policy

MakeCalibration = Callable[[Path, CalibrationConfig, Report], Calibration]
"""Calibrates the bundle in a folder, which has no tiers yet."""

# Before it is calibrated a bundle can decode losslessly with these.
UNCALIBRATED = Policy(accept_below=0.0, verify_above=0.6, risk_budget=0.8, max_pending=8)

_PART_FILES = {
    "target": ("target/config.json", "target/model.safetensors", "tokenizer/"),
    "draft": ("draft/draft.safetensors",),
    "scorer": ("scorer.safetensors", "scorer.json"),
    "ranges": ("activation_ranges.safetensors",),
    "calibration": ("calibration.json",),
}


def make_draft(target: Target, config: DistillConfig, work: Path, device: str, report: Report) -> DistillResult:
    """Distils a draft for a target (see `distill`)."""
    pieces = chat_pieces(target.tokenizer)
    return distill(target.on(device), pieces, openings_of(config.openings_file, target.tokenizer), config, work, report)


def make_scorer(
    target: Target, draft_path: Path, config: ScorerConfig, distilled: DistillConfig, device: str, report: Report
) -> tuple[Scorer, ScorerReport]:
    """Lets the target write conversations greedily and fits a scorer to the draft's proposals along them."""
    decoder = target.on(device)
    draft = load_draft(draft_path, target.decoder).to(device)
    draft.share_target(decoder, draft.token_ids)
    report("scorer", 0, 2, "the target writes")
    conversations = write_conversations(
        decoder,
        chat_pieces(target.tokenizer),
        openings_of(distilled.openings_file, target.tokenizer),
        rows=config.rows,
        window=config.window,
        seed=config.seed,
        greedy=True,
    )
    report("scorer", 1, 2, "collecting and fitting")
    samples = collect_samples(decoder, draft, conversations, config)
    result = fit_scorer(samples, config)
    report("scorer", 2, 2, "done")
    return result


def build_pair(
    recipe: Recipe, out: Path, *, device: str, make_calibration: MakeCalibration, report: Report
) -> Manifest:
    """Builds the bundle of a recipe at `out`.

    Args:
        device: where to distil, fit and calibrate: "cpu" or "cuda".
        make_calibration: called if the recipe names no calibration file.

    Raises:
        BundleError: `out` holds something else than a bundle, or a given part was made for another one.
        CheckpointError: the target, or a given draft or scorer, cannot be read.
    """
    old = _existing(out)
    target = load_target(recipe.target.locate())
    with _staging(out) as stage:
        parts = _Parts(stage, out, old)
        _write_target(parts, target)
        draft = _write_draft(parts, recipe, target, out, device, report)
        _write_scorer(parts, recipe, target, device, draft.spec.decoder.hidden_size, report)
        _write_ranges(parts, recipe, target, draft)
        _write_calibration(parts, recipe, target, draft, make_calibration, report)
        tiers = _tiers(json.loads((stage / "calibration.json").read_text()))
        write_manifest(stage, _manifest(recipe, target, draft, parts, tiers))
        for engine in recipe.engines:
            _write_engine(parts, recipe, engine, target, device, report)
        return read_manifest(stage, verify=False)


def calibration_document(
    calibration: Calibration, made_for: dict[str, str], config: CalibrationConfig
) -> dict[str, Any]:
    """What calibration.json holds.

    Args:
        made_for: SHA-256 of the target, draft and scorer it holds for.
    """
    return {
        "schema_version": 1,
        "made_for": made_for,
        "settings": config.model_dump(mode="json", exclude={"prompts_file"}),
        "prompts": {"name": config.prompts_file.name, "sha256": file_entry(config.prompts_file).sha256},
        "bound": {"kind": BOUND_KIND, "method": "bootstrap over prompts, at least the Poisson bound"},
        "trials": [trial.to_dict() for trial in calibration.trials],
        "tiers": {name: trial.to_dict() for name, trial in calibration.tiers.items()},
    }


def made_for(bundle: Path, target_sha256: str) -> dict[str, str]:
    """SHA-256 of what a calibration depends on."""
    return {
        "target": target_sha256,
        "draft": file_entry(bundle / "draft" / "draft.safetensors").sha256,
        "scorer": file_entry(bundle / "scorer.safetensors").sha256,
    }


# --- parts ----------------------------------------------------------------------------------------------------------


class _Parts:
    """Parts of the bundle in the making, and those of the bundle that is there already."""

    def __init__(self, stage: Path, out: Path, old: Manifest | None) -> None:
        self.stage, self._out, self._old = stage, out, old
        self.sources: dict[str, str] = {}

    def reuse(self, part: str, *sources: object) -> bool:
        """Notes what a part is made from; takes it over from the old bundle if that was made from the same."""
        old = self._unchanged(part, sources)
        if old is None:
            return False
        for name in old.files:
            if name.startswith(_PART_FILES[part]):
                self._link(name)
        return True

    def reuse_engine(self, name: str, *sources: object) -> tuple[EngineEntry, FileEntry] | None:
        """The same for an engine; its entry and its plan's are returned if it is taken over."""
        old = self._unchanged(f"engine {name}", sources)
        if old is None or name not in old.engines:
            return None
        entry = old.engines[name]
        self._link(entry.file)
        return entry, old.files[entry.file]

    def _unchanged(self, part: str, sources: Sequence[object]) -> Manifest | None:
        """Notes what a part is made from; the old bundle's manifest if it was made from the same there."""
        self.sources[part] = digest(json.dumps(source, sort_keys=True, default=str) for source in sources)
        same = self._old is not None and self._old.sources.get(part) == self.sources[part]
        return self._old if same else None

    def _link(self, name: str) -> None:
        dest = self.stage / name
        dest.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._out / name, dest)


def _write_target(parts: _Parts, target: Target) -> None:
    if parts.reuse("target", target.sha256):
        return
    folder = parts.stage / "target"
    folder.mkdir()
    config = hf_config(target.spec, target.eos_token_ids, target.weights["model.embed_tokens.weight"].dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {name: weight.contiguous() for name, weight in target.weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    target.tokenizer.save_pretrained(parts.stage / "tokenizer")


def _write_draft(parts: _Parts, recipe: Recipe, target: Target, out: Path, device: str, report: Report) -> Draft:
    path = parts.stage / "draft" / "draft.safetensors"
    given = recipe.draft.file
    source: Any = file_entry(given).sha256 if given is not None else recipe.draft.distill.model_dump(mode="json")
    if given is None and recipe.draft.distill.start_from is not None:
        source["start_from"] = file_entry(recipe.draft.distill.start_from).sha256
    if not parts.reuse("draft", target.sha256, source):
        path.parent.mkdir()
        if given is not None:
            shutil.copyfile(given, path)
        else:
            work = out.parent / f"{out.name}.work"
            save_draft(make_draft(target, recipe.draft.distill, work, device, report).draft, path)
    return load_draft(path, target.decoder)


def _write_scorer(parts: _Parts, recipe: Recipe, target: Target, device: str, hidden_size: int, report: Report) -> None:
    path = parts.stage / "scorer.safetensors"
    given = recipe.scorer.file
    source = file_entry(given).sha256 if given is not None else recipe.scorer.fit.model_dump(mode="json")
    if not parts.reuse("scorer", parts.sources["draft"], source):
        if given is not None:
            shutil.copyfile(given, path)
        else:
            draft_path = parts.stage / "draft" / "draft.safetensors"
            scorer, fitted = make_scorer(target, draft_path, recipe.scorer.fit, recipe.draft.distill, device, report)
            save_scorer(scorer, path)
            (parts.stage / "scorer.json").write_text(json.dumps(fitted.to_dict(), indent=1) + "\n")
    load_scorer(path, hidden_size)


def _write_ranges(parts: _Parts, recipe: Recipe, target: Target, draft: Draft) -> None:
    prompts_file = recipe.calibration.make.prompts_file
    if parts.reuse("ranges", parts.sources["draft"], file_entry(prompts_file).sha256):
        return
    ranges = measure_ranges(target, draft, read_prompts(prompts_file))
    save_file(ranges, parts.stage / "activation_ranges.safetensors")


def _write_calibration(
    parts: _Parts, recipe: Recipe, target: Target, draft: Draft, make: MakeCalibration, report: Report
) -> None:
    path = parts.stage / "calibration.json"
    given, config = recipe.calibration.file, recipe.calibration.make
    source = file_entry(given).sha256 if given is not None else config.model_dump(mode="json")
    if parts.reuse("calibration", parts.sources["scorer"], source):
        return
    mine = made_for(parts.stage, target.sha256)
    if given is not None:
        theirs = json.loads(given.read_text()).get("made_for", {})
        if wrong := sorted(key for key in mine if mine[key] != theirs.get(key)):
            raise BundleError(
                f"{given} was made for another {' and '.join(wrong)}: run `ssv-build calibrate`, or leave "
                "`calibration.file` out of the recipe to have it made"
            )
        shutil.copyfile(given, path)
        return
    tiers = {"premium": TierEntry(policy=UNCALIBRATED, lossless=True)}
    write_manifest(parts.stage, _manifest(recipe, target, draft, parts, tiers))
    document = calibration_document(make(parts.stage, config, report), mine, config)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _write_engine(
    parts: _Parts, recipe: Recipe, config: EngineConfig, target: Target, device: str, report: Report
) -> None:
    """Compiles an engine into the stage, from a checkpoint that is quantized for it if none is given."""
    stage = parts.stage
    manifest = read_manifest(stage, verify=False)
    name = engine_name(config)
    prompts_file = recipe.calibration.make.prompts_file
    made_from = (
        config.model_dump(mode="json", exclude={"checkpoint"}),
        checkpoint_digest(config.checkpoint) if config.checkpoint is not None else file_entry(prompts_file).sha256,
        engine_source(manifest, config.role),
        load_tensorrt(config.flavor).__version__,
    )
    reused = parts.reuse_engine(name, *made_from)
    if reused is not None:
        entry, plan = reused
        engines, files = {**manifest.engines, name: entry}, {**manifest.files, entry.file: plan}
        manifest = manifest.model_copy(update={"engines": engines, "files": files})
    else:
        with tempfile.TemporaryDirectory(dir=stage.parent, prefix=".quantized-") as work:
            if config.checkpoint is None and config.precision in ("fp8", "int4"):
                made = Path(work) / f"{config.role}"
                settings = checked(
                    QuantizeConfig, role=config.role, precision=config.precision, prompts_file=prompts_file
                )
                draft_file = stage / "draft" / "draft.safetensors"
                quantize(target, draft_file, settings, made, device, report)
                config = config.model_copy(update={"checkpoint": made})
            _compile_apart(stage, config)
        manifest = read_manifest(stage, verify=False)
    write_manifest(stage, manifest.model_copy(update={"sources": parts.sources}))


def _compile_apart(stage: Path, config: EngineConfig) -> None:
    """Compiles in a process of its own, which has none of this one's weights in memory; it shows its progress itself."""
    options = {
        "role": config.role,
        "precision": config.precision,
        "checkpoint": config.checkpoint,
        "flavor": config.flavor,
        "compute-capability": ",".join(config.compute_capability),
        "max-batch": config.max_batch,
        "max-length": config.max_length,
        "max-pending": config.max_pending,
        "prefill-chunk": config.prefill_chunk,
        "plugins": config.plugins,
        "out": stage,
    }
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "ssv.builder.cli", "compile", *words]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:  # noqa: S603
        raise EngineBuildError(
            f"the {config.role} engine in {config.precision} was not compiled, its error stands above"
        )


def _tiers(calibration: dict[str, Any]) -> dict[str, TierEntry]:
    tiers = {}
    for name, trial in calibration["tiers"].items():
        policy = Policy.model_validate(trial["policy"])
        limits = {} if policy.lossless else {
            "divergence": calibration["settings"]["limits"][name],
            "divergence_bound": trial["divergence_bound"],
            "bound_kind": BOUND_KIND,
        }  # fmt: skip
        tiers[name] = TierEntry(policy=policy, lossless=policy.lossless, **limits)
    return tiers


def _manifest(recipe: Recipe, target: Target, draft: Draft, parts: _Parts, tiers: dict[str, TierEntry]) -> Manifest:
    stage = parts.stage
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    return Manifest(
        name=recipe.name,
        target=target.spec.to_dict(),
        draft=draft.spec.to_dict(),
        eos_token_ids=target.eos_token_ids,
        default_precision=recipe.precision,
        tiers=tiers,
        files={name: file_entry(stage / name) for name in names if name != MANIFEST_NAME},
        sources=parts.sources,
        versions=versions("ssv", "torch", "transformers", "safetensors"),
    )


def measure_ranges(target: Target, draft: Draft, prompts: list[str], num_tokens: int = 2048) -> dict[str, Tensor]:
    """Activation ranges of target ("target." and, for the tap, "target.tap.project") and draft ("draft."), on chat-formatted prompts."""
    tokens_BT = prompt_tokens(target, prompts, num_tokens)

    def run() -> None:
        for step in draft_passes(draft, tokens_BT, view_target(target.decoder, draft, tokens_BT), depth=3):
            draft.logits(step.hidden_BTH.flatten(0, 1))

    module = torch.nn.ModuleDict({"target": target.decoder, "draft": draft})
    ranges = activation_ranges(module, run)
    if "draft.tap.project" in ranges:
        ranges["target.tap.project"] = ranges.pop("draft.tap.project")
    return ranges


# --- files ----------------------------------------------------------------------------------------------------------


def _existing(out: Path) -> Manifest | None:
    if not out.exists():
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} exists and is not a bundle: choose another folder")
    try:
        return read_manifest(out)
    except BundleError:
        return None  # damaged or of another version: everything is built again


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block succeeds and vanishes when it does not."""
    stage, retired = out.parent / f".{out.name}.building", out.parent / f".{out.name}.retired"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left_over in (stage, retired):
            shutil.rmtree(left_over, ignore_errors=True)
        stage.mkdir()
    except OSError as error:
        raise BundleError(f"{out.parent} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield stage
        for path in stage.rglob("*"):
            # Some files come from libraries that write them for their owner alone; a server runs as another user.
            path.chmod(path.stat().st_mode | 0o444 & ~_umask())
        if out.exists():
            out.rename(retired)
        stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
