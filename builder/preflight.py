"""Checks of a recipe before anything is built: its files, its sizes against the model, the machine and its GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssv.builder.calibrate import check_num_prompts
from ssv.builder.config import CalibrationConfig, HeadsPart, Recipe, RecipeError
from ssv.builder.given import check_given, made_as
from ssv.builder.target import Target, openings_of
from ssv.builder.tensorrt.engine import check_length, tensorrt_for
from ssv.builder.training.corpus import chat_pieces
from ssv.builder.training.distill import spec_to_distill
from ssv.builder.training.quantize import QuantizeError
from ssv.bundle.manifest import BundleError, CalibrationEntry, TierEntry, file_entry
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.bundle.survival import Survival
from ssv.model.draft import grow_draft, load_draft
from ssv.model.heads import heads_spec, load_heads
from ssv.model.scorer import load_scorer
from ssv.runtime.methods import OF_BUNDLES, policy_for, with_options
from ssv.runtime.request import RequestError
from ssv.support.errors import UserError
from ssv.support.json_text import parse_json
from ssv.support.precisions import QUANTIZED_PRECISIONS
from ssv.support.prompts import read_prompts


def check_settings(recipe: Recipe) -> None:
    """Checks what needs no target: files of the recipe, and whether its engines can be built on this machine.

    Raises:
        UserError: naming what is wrong.
    """
    given = {
        "draft.file": recipe.draft.file,
        "heads.file": recipe.heads.file if recipe.heads is not None else None,
        "scorer.file": recipe.scorer.file if recipe.scorer is not None else None,
        "calibration.file": recipe.calibration.file,
    }
    if not recipe.draft.is_given:
        given["draft.distill.start_from"] = recipe.draft.distilled().start_from
    for key, path in given.items():
        if path is not None and not path.is_file():
            raise RecipeError(
                f"{key}: {path} is not there", "give a file that exists, or leave the key out to have it made"
            )
    if (folder := recipe.draft.folder) is not None and not folder.is_dir():
        raise RecipeError(f"draft.folder: {folder} is not there", "give the folder of a published head")
    for index, engine in enumerate(recipe.engines):
        if engine.checkpoint is not None and not engine.checkpoint.exists():
            raise RecipeError(f"engines.{index}.checkpoint: {engine.checkpoint} is not there", "give one that exists")
        tensorrt_for(engine)
        if engine.checkpoint is None and engine.precision in QUANTIZED_PRECISIONS:
            _require_modelopt()
    policies_of(recipe)
    if recipe.calibration.file is not None:
        read_prompts(recipe.calibration.make.prompts_file)  # activation ranges are measured on them
        read_calibration(recipe.calibration.file)
    else:
        check_prompts(recipe.calibration.make)


def policies_of(recipe: Recipe) -> dict[str, Policy]:
    """The policies of methods that a recipe has otherwise than published.

    Raises:
        RecipeError: no bundle can have such a method of its own, or the method no such options.
    """
    found = {}
    for method, options in recipe.methods.items():
        if method not in OF_BUNDLES:
            raise RecipeError(f"methods.{method}: a recipe has options of {', '.join(OF_BUNDLES)}", "leave it out")
        try:
            found[method] = with_options(method, policy_for(method, {}), options)
        except RequestError as error:
            raise RecipeError(f"methods.{method}: {error.what}", error.cure) from error
    return found


def check_prompts(config: CalibrationConfig) -> None:
    """Checks that there are the prompts asked for, and that they can show what is asked of them.

    Raises:
        UserError: naming what is wrong.
    """
    found = len(read_prompts(config.prompts_file))
    if config.num_prompts is not None and config.num_prompts > found:
        raise RecipeError(
            f"calibration.make.num_prompts: {config.num_prompts} are asked for and {config.prompts_file} holds {found}",
            "add prompts, or give a smaller number",
        )
    check_num_prompts(config.num_prompts or found, config)


def check_recipe(recipe: Recipe, target: Target) -> None:
    """Checks a recipe against its target.

    Raises:
        UserError: naming what is wrong.
    """
    draft = target.spec
    if recipe.draft.is_given:
        draft = check_given(recipe.draft, target).decoder
    else:
        check_distillation(recipe, target)
    positions = min(target.spec.max_positions, draft.max_positions)
    if recipe.heads is not None:
        check_heads(recipe.heads, target)
    if recipe.scorer is None:
        pass
    elif recipe.scorer.file is not None:
        load_scorer(recipe.scorer.file, draft.hidden_size)
    else:
        check_openings(recipe.scorer_openings, target)
        _require_positions("scorer.fit.window", recipe.scorer.fit.window, positions)
        chat_pieces(target.tokenizer)
    if recipe.calibration.file is None:
        check_lengths(recipe.calibration.make, target, positions)
    else:
        _check_made_for(recipe, target)
    for engine in recipe.engines:
        check_length(engine, target.spec.max_positions if engine.role == "target" else draft.max_positions)


def check_distillation(recipe: Recipe, target: Target) -> None:
    """Checks how a draft is to be distilled against the target.

    Raises:
        UserError: naming what is wrong.
    """
    config = recipe.draft.distilled()
    spec = spec_to_distill(target.spec, config)
    _require_positions("draft.distill.window", config.window, target.spec.max_positions)
    check_openings(config.openings_file, target)
    chat_pieces(target.tokenizer)
    if config.start_from is not None:
        found = load_draft(config.start_from, target.decoder, for_training=True)
        if found.spec != spec:
            try:
                grow_draft(found, spec, target.decoder)
            except UserError as error:
                raise RecipeError(f"draft.distill.start_from: {config.start_from}: {error.what}", error.cure) from error


def check_heads(part: HeadsPart, target: Target) -> None:
    """Checks given heads, or how heads are to be distilled, against the target.

    Raises:
        RecipeError, CheckpointError, ValueError: naming what is wrong.
    """
    if part.file is not None:
        load_heads(part.file, target.decoder)
        return
    config = part.distill
    heads_spec(target.spec, config.num_heads, config.num_layers, config.head_size)
    _require_positions("heads.distill.window", config.window, target.spec.max_positions)
    check_openings(config.openings_file, target)
    chat_pieces(target.tokenizer)


def check_openings(file: Path | None, target: Target) -> None:
    """Checks that a file of openings holds some.

    Raises:
        RecipeError: it cannot be read, or holds none.
    """
    try:
        empty = file is not None and not openings_of(file, target)
    except UserError as error:
        raise RecipeError(f"openings_file: {error.what}", error.cure) from error
    if empty:
        raise RecipeError(f"openings_file: {file} holds no openings", "give one a line, or leave the key out")


def check_lengths(config: CalibrationConfig, target: Target, positions: int | None = None) -> None:
    """Checks that every calibration prompt and its output fit the model.

    Args:
        positions: of target and draft; None for the target's.

    Raises:
        RecipeError: naming the first that does not.
    """
    room = (positions or target.spec.max_positions) - RESERVED_LENGTH
    encoder = target.conversation_encoder()
    for number, prompt in enumerate(read_prompts(config.prompts_file)[: config.num_prompts], start=1):
        length = len(encoder.chat_ids([{"role": "user", "content": prompt}]))
        if length + config.max_tokens > room:
            raise RecipeError(
                f"{config.prompts_file}: prompt {number} has {length} tokens, with max_tokens {config.max_tokens} that "
                f"is more than the {room} the model has room for",
                "shorten it, or give a smaller max_tokens",
            )


@dataclass(frozen=True, slots=True)
class ReadCalibration:
    """What a bundle takes from a calibration's file.

    Attributes:
        survival: how far the draft's shares are to be trusted; None where it does not say so.
    """

    tiers: dict[str, TierEntry]
    facts: CalibrationEntry
    survival: Survival | None


def read_calibration(path: Path) -> ReadCalibration:
    """Reads what `ssv-build calibrate` wrote.

    Raises:
        BundleError: it is none.
    """
    try:
        document = parse_json(path.read_text())
        settings, bound, prompts = document["settings"], document["bound"], document["prompts"]
        facts = CalibrationEntry(
            prompts=prompts["name"],
            prompts_sha256=prompts["sha256"],
            num_prompts=prompts.get("count") or settings["num_prompts"],
            max_tokens=settings["max_tokens"],
            confidence=settings["confidence"],
            bound_kind=bound["kind"],
            bound_method=bound["method"],
            date=document.get("date"),
        )
        limits = settings["limits"]
        tiers = {name: _tier(trial, limits.get(name), facts) for name, trial in document["tiers"].items()}
        if "premium" not in tiers or not isinstance(document["made_for"], dict):
            raise KeyError("tiers.premium")
        found = document.get("survival")
        survival = None if found is None else Survival(greedy=found["greedy"], sampled=found["sampled"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a calibration ({error})", "make one with `ssv-build calibrate`") from error
    return ReadCalibration(tiers, facts, survival)


def _tier(trial: dict[str, Any], limit: float | None, facts: CalibrationEntry) -> TierEntry:
    policy = Policy.model_validate(trial["policy"])
    if policy.lossless:
        return TierEntry(policy=policy, lossless=True)
    if limit is None:
        raise KeyError("settings.limits")
    return TierEntry(
        policy=policy,
        lossless=False,
        divergence=limit,
        divergence_bound=trial["divergence_bound"],
        bound_kind=facts.bound_kind,
    )


def _check_made_for(recipe: Recipe, target: Target) -> None:
    """Refuses a calibration that was made for other files than those that the recipe gives."""
    assert recipe.calibration.file is not None
    mine: dict[str, str | None] = {"target": target.sha256}
    if (draft := made_as(recipe.draft)) is not None:
        mine["draft"] = file_entry(draft).sha256
    if recipe.scorer is None:
        mine["scorer"] = None
    elif recipe.scorer.file is not None:
        mine["scorer"] = file_entry(recipe.scorer.file).sha256
    refuse_other(recipe.calibration.file, mine)


def refuse_other(calibration: Path, mine: Mapping[str, str | None]) -> None:
    """Refuses a calibration that was made for something else.

    Args:
        mine: SHA-256 of target, draft and scorer, None for a scorer that is not there.

    Raises:
        BundleError: naming what differs.
    """
    theirs = parse_json(calibration.read_text())["made_for"]
    if wrong := sorted(key for key in mine if mine[key] != theirs.get(key)):
        raise BundleError(
            f"{calibration} was made for another {' and '.join(wrong)}",
            "run `ssv-build calibrate`, or leave `calibration.file` out of the recipe to have it made",
        )


def _require_positions(key: str, window: int, positions: int) -> None:
    if window > positions:
        raise RecipeError(f"{key}: {window} exceeds the model's {positions} positions", "choose a shorter one")


def _require_modelopt() -> None:
    if importlib.util.find_spec("modelopt") is None:
        raise QuantizeError("NVIDIA ModelOpt, which quantizes, is not installed", "pip install nvidia-modelopt==0.47.0")
