"""Is a draft's guess worth more or less deep in a tree than near the text, beyond what its share and its rank say?

Trees of up to eight levels are drafted on prompts spread over the file, greedily and sampled, and it is noted what the
target chose of guesses whose parents were right. Corrections are fitted on half of the prompts and judged on the other
half, in both directions: none, an offset and a slope for each rank (what `ssv-build calibrate` fits), and the same with
an offset for each depth. An interval of a gain is of prompts drawn anew.

    python benchmarks/survival_depth.py --bundle bundles/smollm2-135m --num-prompts 192 --threads 1 \
        --out benchmarks/records/survival_depth.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssv import LLM, SamplingParams
from ssv.builder.survival_fit import KINDS, RANKS, Seen, logistic, watch_guesses
from ssv.bundle.policy import verify_all
from ssv.bundle.survival import log_odds
from ssv.runtime.decode.round import DecodeBatch
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
DEPTHS = 8
TREE = verify_all(32, children=(RANKS,), beam=RANKS, max_depth=DEPTHS)
FORMS = ("none", "by rank", "by rank and depth")
BINS = 10
DRAWS = 2000

Array = NDArray[np.float64]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "builder/presets/prompts/varied.jsonl")
    parser.add_argument("--num-prompts", type=int, default=192, help="spread over the file (default: 192)")
    parser.add_argument("--max-tokens", type=int, default=48, help="(default: 48)")
    parser.add_argument("--precision", help="(default: the bundle's)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(args.bundle, max_batch=1, precision=args.precision, threads=args.threads)
    assert llm.draft is not None
    given = read_prompts(args.prompts)
    prompts = [llm.chat_ids(given[i * len(given) // args.num_prompts]) for i in range(args.num_prompts)]
    batch = DecodeBatch(llm.target, llm.draft, sorted(llm.eos_token_ids), llm.max_length)
    figures: dict[str, Any] = {
        "what": "log loss and expected calibration error of what a draft's guesses are given, on prompts not fitted on",
        "place": llm.place,
        "prompts": f"{len(prompts)} spread over {args.prompts.name}",
        "max_tokens": args.max_tokens,
        "tree": TREE.model_dump(mode="json"),
    }
    for kind in KINDS:
        temperature, top_p = (0.0, 1.0) if kind == "greedy" else (0.8, 0.95)
        seen = []
        for seed, ids in enumerate(prompts):
            params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=args.max_tokens, seed=seed)
            seen.append(watch_guesses(batch, [ids], params, 1, TREE))
            print(f"{kind}: {seed + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
        figures[kind] = judged(seen)
    write_record(figures, args.out, versions("torch", "numpy"))
    return 0


def judged(seen: list[list[Seen]]) -> dict[str, Any]:
    """What each form gives on prompts that it was not fitted on.

    Args:
        seen: guesses by prompt.
    """
    guesses = [guess for of_prompt in seen for guess in of_prompt]
    prompt_G = np.repeat(np.arange(len(seen)), [len(of_prompt) for of_prompt in seen])
    hit_G = np.array([guess.hit for guess in guesses], dtype=float)
    depth_G = np.array([guess.depth for guess in guesses])
    rank_G = np.array([guess.rank for guess in guesses])
    given = {form: np.array([guess.share for guess in guesses]) for form in FORMS}
    halves = []
    for half in (0, 1):
        fitted_G = prompt_G % 2 == half
        for form in FORMS[1:]:
            x_GP = features(guesses, with_depth=form == FORMS[2])
            prior_P = np.zeros(x_GP.shape[1])
            prior_P[1 : 2 * RANKS : 2] = 1.0
            weights_P = logistic(x_GP[fitted_G], hit_G[fitted_G], prior_P)
            given[form][~fitted_G] = (1 / (1 + np.exp(-(x_GP @ weights_P))))[~fitted_G]
        halves.append([round(float(weight), 3) for weight in weights_P[2 * RANKS :]])
    loss = {form: losses(p_G, hit_G) for form, p_G in given.items()}
    rows: list[dict[str, Any]] = []
    places = [("all", np.ones(len(guesses), dtype=bool))]
    places += [(str(depth), depth_G == depth) for depth in range(1, DEPTHS + 1)]
    for name, at_G in places:
        rows.append({"depth": name, "guesses": int(at_G.sum()), "chosen": round(float(hit_G[at_G].mean()), 4)})
        for form in FORMS:
            rows[-1][form] = {
                "mean": round(float(given[form][at_G].mean()), 4),
                "log_loss": round(float(loss[form][at_G].mean()), 5),
                "calibration_error": round(calibration_error(given[form][at_G], hit_G[at_G]), 4),
            }
        first_G = at_G & (rank_G == 0)
        rows[-1]["first_guesses"] = {
            "guesses": int(first_G.sum()),
            "chosen": round(float(hit_G[first_G].mean()), 4),
            **{form: round(float(given[form][first_G].mean()), 4) for form in FORMS},
        }
    return {
        "rows": rows,
        "offsets_by_depth_of_each_half": halves,
        "gain_of_ranks": gain(loss["none"] - loss["by rank"], prompt_G, len(seen)),
        "gain_of_depths_beyond_ranks": gain(loss["by rank"] - loss["by rank and depth"], prompt_G, len(seen)),
    }


def features(guesses: list[Seen], *, with_depth: bool) -> Array:
    """An offset and the log odds in each guess's rank, and, if asked, an offset of its depth."""
    x_GP = np.zeros((len(guesses), 2 * RANKS + DEPTHS * with_depth))
    for x_P, guess in zip(x_GP, guesses, strict=True):
        x_P[2 * guess.rank : 2 * guess.rank + 2] = 1.0, log_odds(guess.share)
        if with_depth:
            x_P[2 * RANKS + guess.depth - 1] = 1.0
    return x_GP


def losses(p_G: Array, hit_G: Array) -> Array:
    """In nats, of each guess."""
    p_G = np.clip(p_G, 1e-4, 1 - 1e-4)
    return -np.log(np.where(hit_G > 0, p_G, 1 - p_G))


def calibration_error(p_G: Array, hit_G: Array) -> float:
    """Mean distance between what was said and what came true, over tenths of the guesses."""
    parts = np.array_split(np.argsort(p_G, kind="stable"), BINS)
    return float(sum(abs((p_G[part] - hit_G[part]).sum()) for part in parts) / len(p_G))


def gain(saved_G: Array, prompt_G: NDArray[np.int64], num_prompts: int) -> dict[str, float]:
    """Nats saved a guess, and 95 % of what prompts drawn anew would show."""
    by_N = np.bincount(prompt_G, saved_G, num_prompts)
    count_N = np.bincount(prompt_G, minlength=num_prompts)
    drawn_DN = np.random.default_rng(0).integers(0, num_prompts, (DRAWS, num_prompts))
    low, high = np.quantile(by_N[drawn_DN].sum(1) / count_N[drawn_DN].sum(1), [0.025, 0.975])
    return {"nats": round(float(saved_G.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


if __name__ == "__main__":
    sys.exit(main())
