"""ssv-build: makes bundles and their parts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssv.builder import export_command
from ssv.builder.advice import command as advice
from ssv.builder.config import (
    CalibrationConfig,
    EngineConfig,
    KernelsConfig,
    QuantizeConfig,
    RecipeError,
    TargetConfig,
    checked,
    load_recipe,
)
from ssv.bundle.policy import RESERVED_LENGTH
from ssv.support.console import (
    add_device,
    add_engine,
    add_max_rows,
    add_precision,
    add_threads,
    add_version,
    ended_by_sigterm,
    positive_number,
    require_device,
    run_command,
)
from ssv.support.files import write_json, write_whole
from ssv.support.precisions import ENGINE_PRECISIONS, QUANTIZED_PRECISIONS
from ssv.support.waiting import waiting

if TYPE_CHECKING:
    from ssv.builder.calibrate import Calibration
    from ssv.builder.config import Recipe
    from ssv.builder.target import Target
    from ssv.bundle.policy import Policy
    from ssv.bundle.profile import Costs
    from ssv.support.progress import Report

PROFILE_REPEATS, PROFILE_SECONDS = 40, 10.0
"""As many repeats of each step as there is time for: on two CPU cores all of them take about as long."""

OPENINGS = Path(__file__).parent / "presets" / "openings.txt"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with ended_by_sigterm():
        return run_command(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssv-build", description="Make a draft, a scorer and a bundle for a target.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    def recipe_command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = command(name, run, help)
        sub.add_argument("recipe", type=Path, help="YAML recipe, see builder/presets/")
        sub.add_argument("--out", type=Path, required=True, help="what to write")
        sub.add_argument("--target", type=Path, help="checkpoint to use (default: the recipe's)")
        add_device(sub)
        return sub

    pair = recipe_command("pair", _pair, "build a whole bundle from a recipe")
    pair.add_argument("--draft", type=Path, help="what to take for the draft that the recipe names (default: that one)")
    add_max_rows(pair, "prompts decoded side by side while calibrating")
    add_threads(pair)
    distill = recipe_command("distill", _distill, "make a draft, or Medusa's heads, for a target")
    distill.add_argument(
        "--kind",
        default="draft",
        choices=["draft", "medusa"],
        help="the recipe's draft, or its heads (default: draft)",
    )
    distill.add_argument("--work", type=Path, help="folder for corpus and checkpoints (default: beside --out)")
    distill.add_argument(
        "--minutes",
        type=positive_number,
        help="train a draft at most so long, whatever the recipe asks for (default: no limit)",
    )
    convert = command(
        "convert-heads", _convert_heads, "make a safetensors file of Medusa or EAGLE-3 heads that were pickled"
    )
    convert.add_argument("file", type=Path, help="medusa_lm_head.pt, or an EAGLE-3 head's pytorch_model.bin")
    convert.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    scorer = recipe_command("scorer", _scorer, "fit the criticality scorer of a draft")
    scorer.add_argument("--draft", type=Path, required=True, help="draft.safetensors")
    calibrate = recipe_command("calibrate", _calibrate, "find the tiers' thresholds of a bundle")
    calibrate.add_argument("--bundle", type=Path, required=True, help="bundle to calibrate")
    calibrate.add_argument(
        "--prompts", type=Path, help="JSON lines to decode, all of them (default: the recipe's prompts)"
    )
    calibrate.add_argument(
        "--max-divergence",
        action="append",
        default=[],
        metavar="[TIER=]SHARE",
        help="limit of a lossy tier, of `balanced` if none is named; repeatable (default: the recipe's limits)",
    )
    calibrate.add_argument(
        "--confidence",
        type=float,
        help="that each limit is kept on such prompts (default: the recipe's, which is 0.95 unless it says another)",
    )
    add_max_rows(calibrate, "prompts decoded side by side")
    add_precision(calibrate)
    add_threads(calibrate)
    quantize = command("quantize", _quantize, "quantize a target or a draft to FP8 or INT4 with NVIDIA ModelOpt")
    quantize.add_argument("source", type=Path, help="bundle, or (target only) Hugging Face folder or GGUF file")
    quantize.add_argument("--role", required=True, choices=["target", "draft"], help="which of its models")
    quantize.add_argument("--precision", required=True, choices=QUANTIZED_PRECISIONS, help="of the weights")
    quantize.add_argument(
        "--prompts", type=Path, help="JSON lines to calibrate on (default: text the target writes itself)"
    )
    quantize.add_argument("--tokens", type=int, default=1024, help="of text to calibrate on (default: 1024)")
    quantize.add_argument(
        "--group-size", type=int, help="inputs that share an INT4 scale (default: 128, 64 or 32, as fits)"
    )
    quantize.add_argument("--lm-head", action="store_true", help="quantize the target's LM head too (default: off)")
    quantize.add_argument(
        "--recover-tokens", type=int, default=0, help="tokens to train on afterwards (default: 0, none)"
    )
    quantize.add_argument(
        "--openings",
        type=Path,
        default=OPENINGS,
        help="how user turns of self-written text begin (default: %(default)s)",
    )
    quantize.add_argument("--out", type=Path, required=True, help="folder (target) or file (draft) to write")
    add_device(quantize)
    compile_ = command("compile", _compile, "compile a TensorRT engine into a bundle")
    compile_.add_argument("--role", required=True, choices=["target", "draft"], help="which of its models")
    compile_.add_argument("--precision", required=True, choices=ENGINE_PRECISIONS, help="of the weights")
    compile_.add_argument(
        "--checkpoint", type=Path, help="what `ssv-build quantize` wrote (default: the bundle's own weights)"
    )
    compile_.add_argument(
        "--flavor",
        default="tensorrt_rtx",
        choices=["tensorrt_rtx", "tensorrt"],
        help="which TensorRT compiles it and will run it (default: tensorrt_rtx)",
    )
    compile_.add_argument("--compute-capability", required=True, metavar="8.9[,12.0]", help="GPUs that shall run it")
    compile_.add_argument("--max-rows", type=int, default=8, metavar="N", help="rows of a step (default: 8)")
    compile_.add_argument(
        "--max-length",
        type=int,
        default=2048,
        help=f"tokens of a row, {RESERVED_LENGTH} of them for drafting (default: 2048)",
    )
    compile_.add_argument(
        "--max-pending", type=int, help="most tokens verified at a time (default: what the bundle's tiers ask)"
    )
    compile_.add_argument(
        "--prefill-chunk", type=int, default=256, help="most tokens of a row in one step (default: 256)"
    )
    compile_.add_argument(
        "--plugins",
        default="auto",
        choices=["on", "off", "auto"],
        help="kernels of ours in the engine, which TensorRT for RTX cannot have (default: auto, where they can be)",
    )
    compile_.add_argument("--bundle", type=Path, required=True, help="what the engine is added to")
    kernels = command("kernels", _kernels, "compile the kernels of a bundle's models to PTX, without a GPU")
    kernels.add_argument("--bundle", type=Path, required=True, help="whose models the kernels are for")
    kernels.add_argument(
        "--compute-capability",
        default="8.0,8.9,9.0,10.0,12.0",
        metavar="8.9[,12.0]",
        help="GPUs (default: %(default)s)",
    )
    kernels.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["float16", "bfloat16", "float32"],
        help="of states and logits (default: %(default)s)",
    )
    kernels.add_argument("--out", type=Path, required=True, help="folder to write")
    export_command.add_arguments(
        command("export", export_command.run, "write a bundle's models as other engines load them")
    )
    profile = command("profile", _profile, "measure what steps cost here, for what is drafted by what pays")
    profile.add_argument("--bundle", type=Path, required=True, help="what to measure, and where the profile is kept")
    add_engine(profile)
    add_precision(profile)
    add_device(profile)
    add_threads(profile)
    advice.add_arguments(command("advise", advice.run, "say what a draft is worth for a target, and which methods pay"))
    inspect = command("inspect", _inspect, "show a bundle")
    inspect.add_argument("--bundle", type=Path, required=True, help="what to show")
    inspect.add_argument(
        "--json", action="store_true", help="for programs: the manifest, and sizes in bytes (default: off)"
    )
    return parser


def _pair(args: argparse.Namespace) -> int:
    from ssv.builder.pair import build_pair
    from ssv.support.progress import terminal_report

    require_device(args.device)

    def make(bundle: Path, config: CalibrationConfig, report: Report) -> Calibration:
        return calibrate_bundle(
            bundle, config, report, device=args.device, batch=args.max_rows, precision=None, threads=args.threads
        )

    recipe = _recipe(args)
    if args.draft is not None:
        recipe = recipe.model_copy(update={"draft": recipe.draft.elsewhere(args.draft.resolve())})
    with terminal_report() as report:
        build_pair(recipe, args.out, device=args.device, make_calibration=make, report=report)
    print(f"bundle written to {args.out}", file=sys.stderr)
    return 0


def _distill(args: argparse.Namespace) -> int:
    from ssv.builder.place import check_file_place
    from ssv.builder.target import load_target

    require_device(args.device)
    check_file_place(args.out, *([] if args.work else [".work"]))
    recipe = _recipe(args)
    if args.kind == "medusa" and recipe.heads is None:
        raise RecipeError(
            f"{args.recipe} says nothing of heads", "add `heads: {distill: {}}`, with settings if you like"
        )
    if args.kind == "medusa" and args.minutes is not None:
        raise RecipeError("--minutes is for a draft", "leave it out: a recipe's `heads` say how long they are trained")
    target = load_target(recipe.target.locate())
    work = args.work or args.out.with_suffix(".work")
    if args.kind == "draft":
        print(json.dumps(_distill_draft(recipe, target, args.out, work, args.device, args.minutes)))
    else:
        print(json.dumps(_distill_heads(recipe, target, args.out, work, args.device)))
    return 0


def _distill_draft(
    recipe: Recipe, target: Target, out: Path, work: Path, device: str, minutes: float | None
) -> dict[str, object]:
    from ssv.builder.pair import make_draft
    from ssv.builder.preflight import check_distillation
    from ssv.model.draft import save_draft
    from ssv.support.progress import terminal_report

    check_distillation(recipe, target)
    with terminal_report() as report:
        result = make_draft(target, recipe.draft.distilled(), work, device, report, minutes=minutes)
    save_draft(result.draft, out, storage=recipe.draft.distilled().storage)
    measured = (
        {}
        if result.tokens_per_pass is None
        else {"tokens_per_pass": dict(zip(("chain_5", "tree_32"), result.tokens_per_pass, strict=True))}
    )
    return {
        "agreement_by_depth": [round(a, 4) for a in result.agreement],
        **measured,
        "tokens_written": result.tokens_written,
        "tokens_trained": result.tokens_trained,
    }


def _distill_heads(recipe: Recipe, target: Target, out: Path, work: Path, device: str) -> dict[str, object]:
    from ssv.builder.pair import make_heads
    from ssv.builder.preflight import check_heads
    from ssv.model.heads import save_heads
    from ssv.support.progress import terminal_report

    assert recipe.heads is not None
    check_heads(recipe.heads.model_copy(update={"file": None}), target)
    with terminal_report() as report:
        result = make_heads(target, recipe.heads.distill, work, device, report)
    save_heads(result.heads, out)
    return {
        "agreement_by_head": [round(a, 4) for a in result.agreement],
        "tokens_written": result.tokens_written,
        "tokens_trained": result.tokens_trained,
    }


def _convert_heads(args: argparse.Namespace) -> int:
    from ssv.builder.convert import convert_heads
    from ssv.builder.place import check_file_place

    check_file_place(args.out)
    convert_heads(args.file, args.out)
    print(f"heads written to {args.out}", file=sys.stderr)
    return 0


def _scorer(args: argparse.Namespace) -> int:
    from ssv.builder.pair import make_scorer
    from ssv.builder.place import check_file_place
    from ssv.builder.preflight import check_openings
    from ssv.builder.target import load_target
    from ssv.model.scorer import save_scorer
    from ssv.support.progress import terminal_report

    require_device(args.device)
    check_file_place(args.out, ".json")
    recipe = _recipe(args)
    if recipe.scorer is None:
        raise RecipeError(f"{args.recipe}: scorer is null", "leave it out, or say how it is to be fitted")
    target, openings = load_target(recipe.target.locate()), recipe.scorer_openings
    check_openings(openings, target)
    with terminal_report() as report:
        scorer, fitted = make_scorer(target, args.draft, recipe.scorer.fit, openings, args.device, report)
    save_scorer(scorer, args.out)
    document = json.dumps(fitted.to_dict(), indent=1)
    write_whole(args.out.with_suffix(".json"), document + "\n")
    print(document)
    if not fitted.beats_baseline:
        print(
            f"note: AUC {fitted.auc:.4f} does not beat the training-free 1 - p1 ({fitted.auc_baseline:.4f})",
            file=sys.stderr,
        )
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from ssv.builder.pair import calibration_document, made_for
    from ssv.builder.place import check_file_place
    from ssv.builder.preflight import check_lengths, check_prompts
    from ssv.builder.target import load_target
    from ssv.support.progress import terminal_report

    require_device(args.device)
    check_file_place(args.out)
    recipe = _recipe(args)
    config = _asked_of_calibration(recipe.calibration.make, args)
    check_prompts(config)
    target = load_target(recipe.target.locate())
    check_lengths(config, target)
    with terminal_report() as report:
        calibration = calibrate_bundle(
            args.bundle,
            config,
            report,
            device=args.device,
            batch=args.max_rows,
            precision=args.precision,
            threads=args.threads,
        )
    document = calibration_document(calibration, made_for(args.bundle, target.sha256), config)
    write_json(args.out, document)
    _print_by_category(calibration)
    print(json.dumps({name: trial.to_dict() for name, trial in calibration.tiers.items()}, indent=1))
    return 0


def _asked_of_calibration(config: CalibrationConfig, args: argparse.Namespace) -> CalibrationConfig:
    """The recipe's settings, with what the command line says instead."""
    limits: dict[str, object] = dict(config.limits.items())
    for given in args.max_divergence:
        tier, _, share = given.rpartition("=")
        limits[tier or "balanced"] = share
    asked: dict[str, object] = {"limits": limits}
    if args.confidence is not None:
        asked["confidence"] = args.confidence
    if args.prompts is not None:
        asked |= {"prompts_file": args.prompts, "num_prompts": None}
    return checked(CalibrationConfig, **{**config.model_dump(), **asked})


def _print_by_category(calibration: Calibration) -> None:
    """Shows on stderr what kinds of prompts diverged how much, as a person wants to see it."""
    from rich.console import Console
    from rich.table import Table

    lossy = {name: trial for name, trial in calibration.tiers.items() if not trial.policy.lossless}
    kinds = sorted({kind for trial in lossy.values() for kind in trial.by_category})
    if not any(kinds):
        return
    table = Table("category", "prompts", *lossy)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in kinds:
        counts = [trial.by_category[kind] for trial in lossy.values()]
        shares = [f"{divergent / emitted:.2%}" for _, emitted, divergent in counts]
        table.add_row(kind or "-", str(counts[0][0]), *shares)
    whole = [f"{trial.divergence:.2%} (bound {trial.divergence_bound:.2%})" for trial in lossy.values()]
    table.add_section()
    table.add_row("all", str(sum(trial[0] for trial in next(iter(lossy.values())).by_category.values())), *whole)
    Console(stderr=True).print(table)


def _quantize(args: argparse.Namespace) -> int:
    from ssv.builder.training.quantize_job import load_source, quantize
    from ssv.support.progress import terminal_report

    require_device(args.device)
    config = checked(
        QuantizeConfig,
        role=args.role,
        precision=args.precision,
        prompts_file=args.prompts,
        tokens=args.tokens,
        group_size=args.group_size,
        lm_head=args.lm_head,
        recover_tokens=args.recover_tokens,
        openings_file=args.openings,
    )
    target, draft_file = load_source(args.source)
    with terminal_report() as report:
        quantize(target, draft_file, config, args.out, args.device, report)
    print(f"{config.precision} {config.role} written to {args.out}", file=sys.stderr)
    return 0


def _compile(args: argparse.Namespace) -> int:
    from ssv.builder.tensorrt.engine import compile_engine
    from ssv.support.progress import terminal_report

    config = checked(
        EngineConfig,
        role=args.role,
        precision=args.precision,
        checkpoint=args.checkpoint,
        flavor=args.flavor,
        compute_capability=args.compute_capability.split(","),
        max_rows=args.max_rows,
        max_length=args.max_length,
        max_pending=args.max_pending,
        prefill_chunk=args.prefill_chunk,
        plugins=args.plugins,
    )
    with terminal_report() as report:
        name, entry = compile_engine(args.bundle, config, report)
    facts = {"engine": name, **entry.model_dump(mode="json"), "plan_bytes": (args.bundle / entry.file).stat().st_size}
    print(json.dumps(facts))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from ssv.builder.tensorrt.kernels import write_kernels
    from ssv.support.progress import terminal_report

    config = checked(KernelsConfig, compute_capability=args.compute_capability.split(","), dtype=args.dtype)
    with terminal_report() as report:
        written = write_kernels(args.bundle, config, args.out, report)
    print(*written, sep="\n")
    return 0


def _profile(args: argparse.Namespace) -> int:
    from ssv.bundle.manifest import manifest_lock, read_manifest, write_manifest
    from ssv.runtime.llm import load_for

    llm = load_for(args)
    costs = llm.measure_costs(repeats=PROFILE_REPEATS, within=PROFILE_SECONDS)
    with manifest_lock(args.bundle):
        manifest = read_manifest(args.bundle, verify=False)
        profiles = {**manifest.profiles, llm.place: costs}
        write_manifest(args.bundle, manifest.model_copy(update={"profiles": profiles}))
    print(f"{llm.place}:")
    for name, curve in (("target pass", costs.target), ("draft step", costs.draft)):
        sizes = ", ".join(f"{n}: {1e3 * s:.2f}" for n, s in zip(curve.tokens, curve.seconds, strict=True))
        print(f"  {name}, milliseconds by tokens: {sizes}")
    _warn_if_busy(costs, "The profile is kept and may be wrong: repeat this on an idle machine")
    return 0


def _warn_if_busy(costs: Costs, so: str) -> None:
    if costs.conditions is not None and (doubts := costs.conditions.doubts):
        print(f"warning: this machine was busy: {doubts}. {so}", file=sys.stderr)


def _inspect(args: argparse.Namespace) -> int:
    from ssv.builder.inspect import bundle_facts, print_bundle

    if args.json:
        print(json.dumps(bundle_facts(args.bundle), indent=1))
    else:
        print_bundle(args.bundle)
    return 0


def calibrate_bundle(
    bundle: Path,
    config: CalibrationConfig,
    report: Report,
    *,
    device: str,
    batch: int,
    precision: str | None,
    threads: int | None,
) -> Calibration:
    """Calibrates a bundle by decoding with the torch engine."""
    from ssv.builder.calibrate import PromptResult, calibrate
    from ssv.builder.survival_fit import PROBED, Seen, fit_survival, watch_guesses
    from ssv.runtime.decode.audit import audit
    from ssv.runtime.decode.round import DecodeBatch
    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Request, SamplingParams
    from ssv.support.prompts import read_categorized

    with waiting(f"loading {bundle}") as say:
        llm = LLM.load(bundle, device=device, max_batch=batch, precision=precision, threads=threads, say=say)
    params = SamplingParams(max_tokens=config.max_tokens)
    given = read_categorized(config.prompts_file)[: config.num_prompts]
    prompts, categories = [llm.chat_ids(prompt.text) for prompt in given], [prompt.category for prompt in given]

    def run(policy: Policy) -> list[PromptResult]:
        requests = [Request(ids, "calibration", params, policy=policy) for ids in prompts]
        # What pays depends on the rows that share a pass: the cost that is reported is that of a request alone.
        outputs = [llm.generate([each])[0] for each in requests] if policy.pays else llm.generate(requests)
        results = []
        for ids, output in zip(prompts, outputs, strict=True):
            audited, counters = audit(llm.target, ids, output.token_ids), output.counters
            results.append(
                PromptResult(
                    emitted=counters.emitted,
                    divergent=audited.strict,
                    divergent_margin=audited.margin,
                    target_passes=counters.target_passes,
                    target_tokens=counters.target_tokens,
                    drafted=counters.drafted,
                )
            )
        return results

    batch_of_one = DecodeBatch(llm.target, llm.draft, sorted(llm.eos_token_ids), llm.max_length)

    def probe(greedy: bool) -> list[Seen]:
        report("survival", 0 if greedy else 1, 2, "greedy" if greedy else "sampled")
        temperature, top_p = (0.0, 1.0) if greedy else (0.8, 0.95)
        sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=config.max_tokens)
        return watch_guesses(batch_of_one, prompts, sampling, PROBED)

    # By what is known when the bundle decodes: the rule that drafts what pays goes by corrected shares.
    fitted = fit_survival(probe)
    report("survival", 2, 2, "done")
    costs = llm.costs = llm.measure_costs(repeats=PROFILE_REPEATS, within=PROFILE_SECONDS)
    _warn_if_busy(costs, "Which of the policies that keep a limit is the cheapest may be told wrong; no limit is")
    llm.survival = fitted.survival
    return replace(calibrate(run, config, costs, report, categories), survival=fitted)


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = load_recipe(args.recipe)
    if args.target is None:
        return recipe
    return recipe.model_copy(update={"target": TargetConfig(path=args.target.resolve())})


if __name__ == "__main__":
    sys.exit(main())
