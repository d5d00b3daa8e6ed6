"""`ssv-build advise`: whether a draft is worth having for a target, before anything is built or bought."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.support.console import (
    add_device,
    add_engine,
    add_max_rows,
    add_precision,
    add_threads,
    positive,
    require_device,
)
from ssv.support.errors import UserError

if TYPE_CHECKING:
    from ssv.builder.advice.positions import Texts
    from ssv.builder.advice.speed import Basis
    from ssv.builder.advice.view import Advice
    from ssv.bundle.policy import Policy

PROMPTS = Path(__file__).parents[1] / "presets" / "prompts" / "calibration.jsonl"
NUM_PROMPTS = 12
"""Of the prompts that are decoded where none are given."""

REPEATS = 15
"""Of each step that is measured: some seconds on two CPU cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ssv-build advise`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", type=Path, help="pair that is built already")
    what.add_argument("--target", type=Path, help="checkpoint, or a config.json (or a folder of it) without weights")
    parser.add_argument(
        "--draft",
        type=Path,
        help="of --target: a draft of ours, an EAGLE-3 head, a language model, or a config.json (default: none)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="JSON lines to decode, all of them (default: of a bundle none, but what its calibration has seen; else "
        f"{NUM_PROMPTS} of the project's own)",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=64, metavar="N", help="of each output that is decoded (default: 64)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="of shapes: whose published figures count (default: none)")
    parser.add_argument(
        "--acceptance",
        metavar="SHARE[,SHARE]",
        help="of shapes: how often the first guess is right, the second, and so on (default: none, and only what "
        "would be needed is said)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        help="of shapes: GPUs that share the target (default: as few as have the memory)",
    )
    parser.add_argument(
        "--context", type=positive, default=2048, metavar="N", help="of shapes: tokens of a row (default: 2048)"
    )
    add_max_rows(parser, "of shapes: rows side by side", default=1)
    parser.add_argument("--json", action="store_true", help="for programs (default: off)")
    add_engine(parser)
    add_precision(parser)
    add_device(parser)
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Runs it, and prints the advice."""
    from ssv.builder.advice.view import print_advice

    advice = _advice(args)
    if args.json:
        print(json.dumps(advice.to_dict(), indent=1))
    else:
        print_advice(advice)
    return 0


def _advice(args: argparse.Namespace) -> Advice:
    from ssv.builder.advice.shapes import has_shape_alone

    if args.target is not None and args.draft is None:
        raise UserError("--target without a draft", "name it with --draft, or give a --bundle")
    if args.bundle is not None and args.draft is not None:
        raise UserError("--draft is of --target: a bundle has its own", "leave one of them out")
    on_shapes = args.target is not None and has_shape_alone(args.target)
    given = {"--gpu": args.gpu, "--acceptance": args.acceptance, "--tensor-parallel": args.tensor_parallel}
    if on_shapes:
        if not has_shape_alone(args.draft):
            raise UserError(f"{args.target} is a shape and {args.draft} is not", "give config.json of both")
        return _of_shapes(args)
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"{', '.join(wrong)} is of shapes alone: this pair has weights, and is measured",
            "leave it out, or give config.json of both",
        )
    require_device(args.device)
    return _of_bundle(args) if args.bundle is not None else _of_weights(args)


# --- pairs that can be run ------------------------------------------------------------------------------------------


def _of_bundle(args: argparse.Namespace) -> Advice:
    from ssv.builder.advice.positions import drawn, watch
    from ssv.builder.advice.rounds import decoding, seconds_of_rounds
    from ssv.builder.advice.speed import Basis
    from ssv.bundle.survival import Survival
    from ssv.runtime.decode.round import DecodeBatch
    from ssv.runtime.llm import load_for
    from ssv.support.json_text import parse_json
    from ssv.support.prompts import read_prompts

    llm = load_for(args)
    if llm.draft is None:
        raise UserError("this engine has no draft of its own to measure", "use the engine torch")

    recorded = llm.costs
    costs = recorded or llm.measure_costs(repeats=REPEATS)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts or PROMPTS)]
    if args.prompts is None:
        calibration = args.bundle / "calibration.json"
        reliability = ()
        if calibration.is_file():
            reliability = parse_json(calibration.read_text()).get("survival", {}).get("reliability", ())
        if not reliability:
            raise UserError(f"{args.bundle} does not say how often its guesses are right", "give --prompts to decode")
        # Shares that are drawn are those that came true: there is nothing to correct.
        texts: Texts = drawn(reliability)
        survival = Survival()
        seen = "acceptance as its calibration has seen it, by rank"
    else:
        batch = DecodeBatch(llm.target, llm.draft, sorted(llm.eos_token_ids), llm.max_length)
        texts, survival = watch(batch, prompts, args.max_tokens), llm.survival or Survival()
        seen = f"acceptance measured on {len(prompts)} prompts of {args.prompts.name}"
    how = "the bundle's profile" if recorded is not None else "steps measured now"
    # What is drawn has no risks of the scorer, by which tiers trust.
    tiers = llm.tiers if args.prompts is not None else {}
    basis = Basis(costs, survival, llm.draft.num_features > 0, recorded).timed(
        seconds_of_rounds(prompts, decoding(llm))
    )
    return _measured(f"{llm.place}: costs of {how} and of some rounds, {seen}", texts, basis, tiers)


def _of_weights(args: argparse.Namespace) -> Advice:
    from ssv.builder.advice.pair import NotItsTokens, load_pair
    from ssv.builder.advice.positions import watch
    from ssv.builder.advice.rounds import seconds_of_rounds
    from ssv.builder.advice.speed import Basis
    from ssv.builder.advice.view import Advice
    from ssv.bundle.survival import Survival
    from ssv.runtime.decode.costs import measure
    from ssv.support.prompts import read_prompts
    from ssv.support.waiting import waiting

    if args.engine != "torch":
        raise UserError(f"--engine {args.engine} runs bundles alone", "use the engine torch, or build a bundle first")
    prompts = read_prompts(args.prompts) if args.prompts is not None else read_prompts(PROMPTS)[:NUM_PROMPTS]
    with waiting(f"loading {args.target}"):
        try:
            pair = load_pair(args.target, args.draft, args.precision or "fp32", args.device, args.threads, prompts)
        except NotItsTokens as error:
            return Advice("wrong vocabulary", f"{error.what}. {error.cure}".strip(), f"{args.target}, {args.draft}")
    costs = measure(pair.batch.target, pair.draft, repeats=REPEATS, threads=pair.threads)
    asked = [pair.chat_ids(prompt) for prompt in prompts]
    texts = watch(pair.batch, asked, args.max_tokens)
    basis = Basis(costs, Survival(), pair.draft.num_features > 0).timed(seconds_of_rounds(asked, pair.decode))
    said = f"{pair.place}: steps and some rounds measured now, acceptance measured on {len(prompts)} prompts"
    return _measured(said, texts, basis, {})


def _measured(said: str, texts: Texts, basis: Basis, tiers: dict[str, Policy]) -> Advice:
    from ssv.builder.advice.positions import acceptance
    from ssv.builder.advice.speed import break_even, speeds, verdict
    from ssv.builder.advice.view import Advice

    if not any(text for text in texts):
        raise UserError("the target answers with nothing to judge guesses by", "give other --prompts")
    found, free = speeds(texts, basis, tiers), speeds(texts, basis.with_free_draft(), {})
    what, why = verdict(found, basis.costs, free)
    facts = {}
    if basis.costs.conditions is not None and (doubts := basis.costs.conditions.doubts):
        facts["costs may be wrong"] = doubts
    if (doubts := basis.overhead.doubts(basis.costs.target.at(1))) is not None:
        facts["rounds may be measured wrong"] = doubts
    return Advice(what, why, said, facts, acceptance(texts), found, break_even(texts, basis))


# --- shapes ---------------------------------------------------------------------------------------------------------


def _of_shapes(args: argparse.Namespace) -> Advice:
    from ssv.builder.advice.gpus import gpu_named
    from ssv.builder.advice.positions import drawn
    from ssv.builder.advice.shapes import place_pair, read_shape, vocabulary_differs
    from ssv.builder.advice.speed import Basis, least_acceptance, speeds, verdict
    from ssv.builder.advice.view import Advice
    from ssv.bundle.survival import Survival

    if args.gpu is None:
        raise UserError("a shape has no machine", "name its GPU with --gpu")
    target, draft, gpu = read_shape(args.target), read_shape(args.draft), gpu_named(args.gpu)
    precision = args.precision or "bf16"
    placed = place_pair(
        target, draft, gpu, precision, degree=args.tensor_parallel, context=args.context, rows=args.max_rows
    )
    basis = (
        f"shapes alone, on {args.gpu} in {precision}: steps by memory bandwidth and products, without launches and "
        "without what GPUs tell one another"
    )
    costs = placed.costs
    facts: dict[str, Any] = {
        "tensor parallel": placed.degree,
        "memory per GPU": f"{placed.bytes_per_gpu / 1e9:.1f} of {gpu.gb:g} GB" + ("" if placed.fits else ", too much"),
        "target pass of 1 token": f"{1e3 * costs.target.at(1):.3f} ms, of 8 {1e3 * costs.target.at(8):.3f} ms",
        "draft step": f"{1e3 * costs.draft.at(1):.3f} ms",
    }
    least = least_acceptance(costs)
    needed = "no acceptance is enough" if least is None else f"more than {least:.1%} of the tokens accepted"
    facts["needed for a chain to pay"] = needed
    if vocabulary_differs(target, draft):
        sizes = f"{draft.spec.vocab_size} and {target.spec.vocab_size}"
        return Advice("wrong vocabulary", f"draft and target have {sizes} tokens", basis, facts)
    if least is None:
        return Advice("too strong", "a draft step costs more than any guess can save", basis, facts)
    if args.acceptance is None:
        return Advice("not known", "how often its guesses are right is not: give --acceptance", basis, facts)
    shares = _shares(args.acceptance)
    rows = [{"rows": "greedy", "rank": rank, "guesses": 1, "chosen": share} for rank, share in enumerate(shares)]
    texts, at = drawn(rows), Basis(costs, Survival(), conditioned=False)
    found = speeds(texts, at, {})
    what, why = verdict(found, costs, speeds(texts, at.with_free_draft(), {}))
    return Advice(what, why, basis, facts, [shares], found)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
        raise UserError(
            f"--acceptance {text!r} is no list of shares",
            "give numbers from 0 to 1 that add up to at most 1, as 0.7,0.1",
        )
    return shares
