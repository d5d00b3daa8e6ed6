"""Builds a bundle from a recipe: target, draft, scorer, activation ranges, calibration, engines, manifest.

The bundle is built beside its place and takes it when it is whole (`ssv.builder.staging`); a part whose sources have
not changed is taken over (`ssv.builder.parts`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssv.builder.calibrate import BOUND_KIND, BOUND_METHOD, Calibration
from ssv.builder.config import (
    CalibrationConfig,
    DistillConfig,
    EngineConfig,
    HeadsConfig,
    QuantizeConfig,
    Recipe,
    ScorerConfig,
    checked,
)
from ssv.builder.given import given_files, write_given
from ssv.builder.parts import Parts
from ssv.builder.place import bundle_at
from ssv.builder.preflight import (
    ReadCalibration,
    check_recipe,
    check_settings,
    policies_of,
    read_calibration,
    refuse_other,
)
from ssv.builder.staging import staging
from ssv.builder.target import Target, load_target, openings_of, prompt_tokens
from ssv.builder.tensorrt.compile_job import compile_apart
from ssv.builder.tensorrt.engine import checkpoint_digest, limits_of, uses_plugins
from ssv.builder.training.corpus import chat_pieces, write_conversations
from ssv.builder.training.distill import DistillResult, distill
from ssv.builder.training.heads import HeadsResult, distill_heads
from ssv.builder.training.passes import draft_passes, view_target
from ssv.builder.training.quantize_job import quantize
from ssv.builder.training.scorer_fit import ScorerReport, collect_samples, fit_scorer
from ssv.builder.training.turns import turns_of
from ssv.builder.training.work import training_source
from ssv.bundle.manifest import (
    SCORER,
    Manifest,
    TierEntry,
    digest,
    engine_source,
    file_entry,
    manifest_lock,
    read_manifest,
    write_manifest,
)
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs
from ssv.bundle.tensorrt_api import PACKAGES, load_tensorrt
from ssv.model.checkpoint import hf_config
from ssv.model.draft import Draft, DraftSpec, load_draft, save_draft
from ssv.model.heads import Heads, load_heads, save_heads
from ssv.model.scorer import Scorer, load_scorer, save_scorer
from ssv.model.smoothing import activation_ranges
from ssv.support.environment import versions
from ssv.support.files import save_whole, write_json
from ssv.support.precisions import QUANTIZED_PRECISIONS
from ssv.support.progress import Report
from ssv.support.prompts import read_prompts

MakeCalibration = Callable[[Path, CalibrationConfig, Report], Calibration]
"""Calibrates the bundle in a folder, which has no tiers yet."""

# Before it is calibrated a bundle can decode losslessly with these.
UNCALIBRATED = Policy(accept_below=0.0, verify_above=0.6, risk_budget=0.8, max_pending=8)


def make_draft(
    target: Target,
    config: DistillConfig,
    work: Path,
    device: str,
    report: Report,
    *,
    minutes: float | None = None,
    compiled: bool = True,
) -> DistillResult:
    """Distils a draft for a target (see `distill`)."""
    pieces, (turns, kept) = chat_pieces(target.tokenizer), turns_of(config, target, config.kept_rows)
    return distill(
        target.on(device),
        pieces,
        turns,
        config,
        work,
        report,
        weights_sha256=target.sha256,
        kept=kept,
        minutes=minutes,
        compiled=compiled,
    )


def make_heads(target: Target, config: HeadsConfig, work: Path, device: str, report: Report) -> HeadsResult:
    """Trains Medusa's heads for a target (see `distill_heads`)."""
    pieces, (turns, _) = chat_pieces(target.tokenizer), turns_of(config, target)
    return distill_heads(target.on(device), pieces, turns, config, work, report, weights_sha256=target.sha256)


def make_scorer(
    target: Target, draft_path: Path, config: ScorerConfig, openings: Path | None, device: str, report: Report
) -> tuple[Scorer, ScorerReport]:
    """Lets the target write conversations greedily and fits a scorer to the draft's proposals along them.

    Args:
        openings: file of those that users' turns begin with.
    """
    decoder = target.on(device)
    draft = load_draft(draft_path, target.decoder).to(device)
    draft.share_target(decoder, draft.token_ids)
    report("scorer", 0, 2, "the target writes")
    conversations = write_conversations(
        decoder,
        chat_pieces(target.tokenizer),
        openings_of(openings, target),
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

    What can be checked is checked before the first step that takes long. A run that fails leaves what is at `out` as it
    is, and its finished parts for the next run.

    Args:
        device: where to distil, fit and calibrate: "cpu" or "cuda".
        make_calibration: called if the recipe names no calibration file.

    Raises:
        BundleError: `out` holds something else than a bundle, or a given part was made for another one.
        RecipeError: the recipe asks for what this target or this machine cannot have.
        CheckpointError: the target, or a given draft or scorer, cannot be read.
    """
    out = out.resolve()
    bundle_at(out)
    check_settings(recipe)
    target = load_target(recipe.target.locate())
    check_recipe(recipe, target)
    with ExitStack() as held, staging(out) as stage:
        parts = Parts(stage, bundle_at(out))
        _write_target(parts, target)
        draft = _write_draft(parts, recipe, target, device, report)
        heads = _write_heads(parts, recipe, target, device, report)
        _write_scorer(parts, recipe, target, device, draft.spec.decoder.hidden_size, report)
        _write_ranges(parts, recipe, target, draft)
        _write_calibration(parts, recipe, target, draft, make_calibration, report)
        calibration = read_calibration(stage.bundle / "calibration.json")
        manifest = _manifest(recipe, target, draft, parts, calibration, heads)
        for engine in recipe.engines:
            write_manifest(stage.bundle, manifest)
            _write_engine(parts, recipe, engine, target, device, report)
            manifest = _manifest(recipe, target, draft, parts, calibration, heads)
        parts.drop_unused()
        if out.is_dir():  # an engine that another process adds must not come between here and the exchange
            held.enter_context(manifest_lock(out))
        parts.carry_over_engines(manifest, bundle_at(out))  # with those that came while this was building
        manifest = _manifest(recipe, target, draft, parts, calibration, heads)
        write_manifest(stage.bundle, manifest)
    for part in ("draft", "heads"):
        if part in parts.sources and (work := _work_folder(parts, part)).exists():
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # another distillation's state is there
                work.parent.rmdir()
    return manifest


def calibration_document(
    calibration: Calibration, made_for: dict[str, str | None], config: CalibrationConfig
) -> dict[str, Any]:
    """What calibration.json holds.

    Args:
        made_for: SHA-256 of the target, draft and scorer it holds for.
    """
    return {
        "schema_version": 1,
        "made_for": made_for,
        "settings": config.model_dump(mode="json", exclude={"prompts_file"}),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "prompts": {
            "name": config.prompts_file.name,
            "sha256": file_entry(config.prompts_file).sha256,
            "count": len(read_prompts(config.prompts_file)[: config.num_prompts]),
        },
        "bound": {"kind": BOUND_KIND, "method": BOUND_METHOD},
        "trials": [trial.to_dict() for trial in calibration.trials],
        "tiers": {name: trial.to_dict() for name, trial in calibration.tiers.items()},
        "costs": calibration.costs.model_dump(mode="json"),
        "survival": calibration.survival.to_dict() if calibration.survival is not None else None,
    }


def made_for(bundle: Path, target_sha256: str) -> dict[str, str | None]:
    """SHA-256 of what a calibration depends on; None for a scorer that is not there."""
    scorer = bundle / SCORER
    return {
        "target": target_sha256,
        "draft": file_entry(bundle / "draft" / "draft.safetensors").sha256,
        "scorer": file_entry(scorer).sha256 if scorer.is_file() else None,
    }


# --- parts ----------------------------------------------------------------------------------------------------------


def _write_target(parts: Parts, target: Target) -> None:
    if parts.reuse("target", target.sha256, target.text_sha256):
        return
    folder = parts.stage.bundle / "target"
    folder.mkdir(exist_ok=True)
    config = hf_config(target.spec, target.eos_token_ids, target.weights["model.embed_tokens.weight"].dtype)
    write_json(folder / "config.json", config)
    tensors = {name: weight.contiguous() for name, weight in target.weights.items()}
    save_whole(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    target.tokenizer.save_pretrained(parts.stage.bundle / "tokenizer")
    parts.finish("target")


def _write_draft(parts: Parts, recipe: Recipe, target: Target, device: str, report: Report) -> Draft:
    path = parts.stage.bundle / "draft" / "draft.safetensors"
    config = recipe.draft
    source: tuple[object, ...]
    if config.is_given:
        source = tuple(file_entry(file).sha256 for file in given_files(config))
    else:
        source = (training_source(config.distilled()), target.text_sha256)
    if not parts.reuse("draft", target.sha256, *source):
        path.parent.mkdir(exist_ok=True)
        if config.is_given:
            write_given(config, target, path)
        else:
            work = _work_folder(parts)
            draft = make_draft(target, config.distilled(), work, device, report).draft
            save_draft(draft, path, storage=config.distilled().storage)
        parts.finish("draft")
    return load_draft(path, target.decoder)


def _write_heads(parts: Parts, recipe: Recipe, target: Target, device: str, report: Report) -> Heads | None:
    """Medusa's heads, if the recipe has them."""
    if recipe.heads is None:
        return None
    path, given, config = parts.stage.bundle / "heads.safetensors", recipe.heads.file, recipe.heads.distill
    source: tuple[object, ...]
    source = (file_entry(given).sha256,) if given is not None else (training_source(config), target.text_sha256)
    if not parts.reuse("heads", target.sha256, *source):
        if given is not None:
            shutil.copyfile(given, path)
        else:
            save_heads(make_heads(target, config, _work_folder(parts, "heads"), device, report).heads, path)
        parts.finish("heads")
    return load_heads(path, target.decoder)


def _work_folder(parts: Parts, part: str = "draft") -> Path:
    """The folder where a distillation keeps its state.

    Each recipe has one of its own, so that another recipe neither takes the state for its own nor stumbles over it.
    """
    return parts.stage.out.with_name(f"{parts.stage.out.name}.work") / parts.sources[part][:12]


def _write_scorer(parts: Parts, recipe: Recipe, target: Target, device: str, hidden_size: int, report: Report) -> None:
    """The scorer, if the recipe has one."""
    if recipe.scorer is None:
        return
    path = parts.stage.bundle / SCORER
    given, openings = recipe.scorer.file, recipe.scorer_openings
    source: tuple[object, ...]
    if given is not None:
        source = (file_entry(given).sha256,)
    else:
        settings = recipe.scorer.fit.model_dump(mode="json", exclude={"openings_file"})
        source = (settings, _content(openings), target.text_sha256)
    if not parts.reuse("scorer", parts.sources["draft"], *source):
        if given is not None:
            shutil.copyfile(given, path)
        else:
            draft_path = parts.stage.bundle / "draft" / "draft.safetensors"
            scorer, fitted = make_scorer(target, draft_path, recipe.scorer.fit, openings, device, report)
            save_scorer(scorer, path)
            write_json(parts.stage.bundle / "scorer.json", fitted.to_dict())
        parts.finish("scorer")
    load_scorer(path, hidden_size)


def _write_ranges(parts: Parts, recipe: Recipe, target: Target, draft: Draft) -> None:
    prompts_file = recipe.calibration.make.prompts_file
    if parts.reuse("ranges", parts.sources["draft"], _content(prompts_file), target.text_sha256):
        return
    ranges = measure_ranges(target, draft, read_prompts(prompts_file))
    save_whole(ranges, parts.stage.bundle / "activation_ranges.safetensors")
    parts.finish("ranges")


def _write_calibration(
    parts: Parts, recipe: Recipe, target: Target, draft: Draft, make: MakeCalibration, report: Report
) -> None:
    bundle = parts.stage.bundle
    path = bundle / "calibration.json"
    given, config = recipe.calibration.file, recipe.calibration.make
    source: tuple[object, ...]
    if given is not None:
        source = (file_entry(given).sha256,)
    else:
        settings = config.model_dump(mode="json", exclude={"prompts_file"})
        source = (
            settings,
            _content(config.prompts_file),
            target.text_sha256,
            parts.sources["ranges"],
            recipe.precision,
        )
    if parts.reuse("calibration", parts.sources.get("scorer", parts.sources["draft"]), *source):
        return
    mine = made_for(bundle, target.sha256)
    if given is not None:
        refuse_other(given, mine)
        shutil.copyfile(given, path)
    else:
        write_manifest(bundle, _manifest(recipe, target, draft, parts, None))
        document = calibration_document(make(bundle, config, report), mine, config)
        write_json(path, document)
    parts.finish("calibration")


def _write_engine(
    parts: Parts, recipe: Recipe, config: EngineConfig, target: Target, device: str, report: Report
) -> None:
    """Compiles an engine into the stage, from a checkpoint that is quantized for it if none is given."""
    bundle = parts.stage.bundle
    manifest = read_manifest(bundle, verify=False)
    name = config.name
    prompts_file = recipe.calibration.make.prompts_file
    weights: tuple[object, ...] = ()
    if config.checkpoint is not None:
        weights = (checkpoint_digest(config.checkpoint),)
    elif config.precision in QUANTIZED_PRECISIONS:
        weights = (target.sha256, _content(prompts_file), target.text_sha256)
    made_from = (
        config.model_dump(mode="json", include={"role", "precision", "flavor", "compute_capability"}),
        str(limits_of(config, manifest)),
        uses_plugins(config),
        engine_source(manifest, config.role),
        load_tensorrt(config.flavor).__version__,
        *weights,
    )
    if parts.reuse_engine(name, *made_from):
        return
    if config.checkpoint is None and weights:
        draft_file = bundle / "draft" / "draft.safetensors"
        key = digest([json.dumps(weights), file_entry(draft_file).sha256])
        made = parts.stage.quantized(f"{config.role}-{config.precision}-{key[:12]}")
        if not made.exists():
            settings = checked(QuantizeConfig, role=config.role, precision=config.precision, prompts_file=prompts_file)
            quantize(target, draft_file, settings, made, device, report)
        config = config.model_copy(update={"checkpoint": made})
    compile_apart(bundle, config)
    parts.finish_engine(name, read_manifest(bundle, verify=False).engines[name])


def _manifest(
    recipe: Recipe,
    target: Target,
    draft: Draft,
    parts: Parts,
    calibration: ReadCalibration | None,
    heads: Heads | None = None,
) -> Manifest:
    """The manifest of a bundle whose files are written.

    Args:
        calibration: None of a bundle that is to be calibrated, which decodes losslessly.
    """
    uncalibrated = {"premium": TierEntry(policy=UNCALIBRATED, lossless=True)}
    of_engines = {PACKAGES[engine.flavor]: engine.tensorrt for engine in parts.engines.values()}
    return Manifest(
        name=recipe.name,
        target=target.spec.to_dict(),
        draft=draft.spec.to_dict(),
        heads=heads.spec.to_dict() if heads is not None else None,
        eos_token_ids=target.eos_token_ids,
        default_precision=recipe.precision,
        tiers=calibration.tiers if calibration is not None else uncalibrated,
        methods=policies_of(recipe),
        files=dict(sorted(parts.files.items())),
        engines=parts.engines,
        calibration=calibration.facts if calibration is not None else None,
        survival=calibration.survival if calibration is not None else None,
        profiles=_profiles(parts.old, target, draft),
        sources=parts.sources,
        versions=versions("ssv", "torch", "transformers", "safetensors") | of_engines,
    )


def _profiles(old: Manifest | None, target: Target, draft: Draft) -> dict[str, Costs]:
    """What steps cost is the networks' shapes' and the machine's: profiles of a bundle with the same shapes stay
    true."""
    if old is None or old.target != target.spec.to_dict() or DraftSpec.from_dict(old.draft) != draft.spec:
        return {}
    return old.profiles


def _content(file: Path | None) -> str | None:
    return None if file is None else file_entry(file).sha256


def measure_ranges(target: Target, draft: Draft, prompts: list[str], num_tokens: int = 2048) -> dict[str, Tensor]:
    """Activation ranges of a target and a draft on chat-formatted prompts.

    Keys begin with "target." ("target.tap.project" for the tap) and with "draft.".
    """
    tokens_BT = prompt_tokens(target, prompts, num_tokens)

    def run() -> None:
        for step in draft_passes(draft, tokens_BT, view_target(target.decoder, draft, tokens_BT), depth=3):
            draft.logits(step.hidden_BTH.flatten(0, 1))

    module = torch.nn.ModuleDict({"target": target.decoder, "draft": draft})
    ranges = activation_ranges(module, run)
    if "draft.tap.project" in ranges:
        ranges["target.tap.project"] = ranges.pop("draft.tap.project")
    return ranges
