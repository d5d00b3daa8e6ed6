"""A recipe, a target and prompts of a few words: a bundle made of them decodes, as nonsense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_spec, tiny_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ssv.builder import pair
from ssv.builder.calibrate import Calibration, Trial
from ssv.builder.config import CalibrationConfig, load_recipe
from ssv.builder.survival_fit import SurvivalFit
from ssv.bundle.manifest import Manifest, read_manifest
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs, Curve
from ssv.bundle.survival import Reliability, Survival
from ssv.model.checkpoint import hf_config
from ssv.support.progress import Report, silent

RECIPE = """
name: tiny
target: {path: target}
draft:
  distill: {layers: [0, 1], head_size: 48, tokens: 800, rows: 16, window: 48, batch_rows: 8, depth: 2}
scorer:
  fit: {rows: 32, window: 48, depth: 2}
calibration:
  make: {prompts_file: prompts.jsonl, families: [[0.4, 0.6, 6]], accept_below: [0.1]}
precision: fp32
"""
NUM_PROMPTS = 200
"""Enough for a limit of 2 %, of one family."""

HEADS = """
heads:
  distill: {num_heads: 3, head_size: 48, tokens: 800, rows: 16, window: 48, batch_rows: 8}
"""
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


WORDS = ["<s>", "<e>", "user", "assistant", "<<first>>", "<<second>>", "<<third>>", *(f"w{i}" for i in range(105))]


def write_checkpoint(
    folder: Path, seed: int = 0, words: Sequence[str] = WORDS, template: str | None = TEMPLATE, **changes: Any
) -> None:
    """A Hugging Face folder of a model at random."""
    folder.mkdir()
    spec = tiny_spec(**changes)
    weights = {name: weight.contiguous() for name, weight in tiny_weights(spec, seed).items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=template)
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config(spec, [1], torch.float32)))


def write_recipe(base: Path, *, heads: bool = False) -> Path:
    """Path of a recipe, with Medusa's heads or without, in a folder with its target and its prompts."""
    write_checkpoint(base / "target")
    lines = [
        json.dumps({"id": str(i), "prompt": " ".join(f"w{(7 * i + j) % 105}" for j in range(20))})
        for i in range(NUM_PROMPTS)
    ]
    (base / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = base / "recipe.yaml"
    path.write_text(RECIPE + (HEADS if heads else ""))
    return path


COSTS = Costs(target=Curve(tokens=(1, 8), seconds=(1.0, 1.5)), draft=Curve(tokens=(1, 8), seconds=(0.1, 0.2)))


class Calibrator:
    """Stands for decoding; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, bundle: Path, config: CalibrationConfig, report: Report) -> Calibration:
        self.calls += 1
        assert read_manifest(bundle).tiers["premium"].lossless  # a bundle that decodes already

        def trial(accept_below: float) -> Trial:
            policy = Policy(accept_below=accept_below, verify_above=0.4, risk_budget=0.6, max_pending=6)
            return Trial(policy, accept_below / 10, accept_below / 20, accept_below / 8, 0.5, 1.5, 1.0, 0.6)

        tiers = {"premium": trial(0.0), **{name: trial(0.1) for name in config.limits}}
        seen = Reliability(rows="greedy", rank=0, depth=2, guesses=40, said=0.5, corrected=0.625, chosen=0.75)
        survival = SurvivalFit(Survival(greedy=((0.1, 0.9),), sampled=((0.0, 0.8),)), [], [seen])
        return Calibration(list(tiers.values()), tiers, COSTS, survival)


def build(recipe: Path, out: Path, make: Calibrator | None = None) -> Manifest:
    return pair.build_pair(load_recipe(recipe), out, device="cpu", make_calibration=make or Calibrator(), report=silent)


def built_with(folder: Path, draft: str, more: str = "", recipe: str = RECIPE) -> Path:
    """A bundle in the folder, of a draft distilled with further settings, and with more behind the recipe."""
    path = write_recipe(folder)
    path.write_text(recipe.replace("distill: {layers", f"distill: {{{draft}, layers") + more)
    build(path, folder / "bundle")
    return folder / "bundle"
