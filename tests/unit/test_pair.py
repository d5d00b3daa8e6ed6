"""A whole bundle from a recipe, on a tiny target: what is written, what is reused, what is refused, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_spec, tiny_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ssv.builder import pair
from ssv.builder.calibrate import Calibration, Trial
from ssv.builder.checkpoint import hf_config
from ssv.builder.config import CalibrationConfig, load_recipe
from ssv.builder.manifest import BundleError, Manifest, read_manifest
from ssv.builder.progress import Report, silent
from ssv.builder.tiers import Policy
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams

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
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A folder with a recipe, its target and its prompts."""
    folder = tmp_path / "target"
    folder.mkdir()
    spec = tiny_spec()
    weights = {name: weight.contiguous() for name, weight in tiny_weights(spec).items()}
    save_file(weights, folder / "model.safetensors")
    words = ["<s>", "<e>", "user", "assistant", "<<first>>", "<<second>>", "<<third>>", *(f"w{i}" for i in range(105))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config(spec, [1], torch.float32)))
    lines = [
        json.dumps({"id": str(i), "prompt": " ".join(f"w{(7 * i + j) % 105}" for j in range(20))}) for i in range(9)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


class Calibrator:
    """Stands for decoding; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, bundle: Path, config: CalibrationConfig, report: Report) -> Calibration:
        self.calls += 1
        assert read_manifest(bundle).tiers["premium"].lossless  # a bundle that decodes already

        def trial(accept_below: float) -> Trial:
            policy = Policy(accept_below=accept_below, verify_above=0.4, risk_budget=0.6, max_pending=6)
            return Trial(policy, accept_below / 10, accept_below / 20, accept_below / 8, 0.5, 0.6)

        tiers = {"premium": trial(0.0), "balanced": trial(0.1), "turbo": trial(0.1)}
        return Calibration(list(tiers.values()), tiers)


def build(recipe: Path, out: Path, make: Calibrator | None = None) -> Manifest:
    return pair.build_pair(load_recipe(recipe), out, device="cpu", make_calibration=make or Calibrator(), report=silent)


def written(manifest: Manifest) -> str:
    """As it stands in the file, where a tuple is a list."""
    return manifest.model_dump_json()


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_bundle_decodes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    manifest = build(recipe, out)
    assert written(read_manifest(out)) == written(manifest)
    assert manifest.tiers["premium"].lossless
    assert not manifest.tiers["turbo"].lossless
    assert manifest.tiers["turbo"].divergence_bound == 0.0125
    assert {"target/model.safetensors", "draft/draft.safetensors", "scorer.safetensors"} < set(manifest.files)
    assert left_behind(tmp_path) == []
    llm = LLM.load(out, max_length=64)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    ids = llm.chat_ids("w1 w2 w3")
    outputs = [
        llm.generate([Request(ids, method, params)])[0] for method in ("autoregressive", "speculative", "premium")
    ]
    assert len({output.token_ids for output in outputs}) == 1
    assert len(llm.generate([Request(ids, "turbo", params)])[0].token_ids) == 20


def test_what_has_not_changed_is_not_made_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, make = tmp_path / "bundle", Calibrator()
    first = build(recipe, out, make)

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(pair, "make_draft", never)
    monkeypatch.setattr(pair, "make_scorer", never)
    monkeypatch.setattr(pair, "measure_ranges", never)
    assert build(recipe, out, make).files == first.files
    assert make.calls == 1
    # Another calibration only: the draft and the scorer stay.
    recipe.write_text(RECIPE.replace("accept_below: [0.1]", "accept_below: [0.1, 0.2]"))
    changed = build(recipe, out, make)
    assert make.calls == 2
    assert changed.files["draft/draft.safetensors"] == first.files["draft/draft.safetensors"]
    # Another draft: everything that hangs on it.
    recipe.write_text(RECIPE.replace("depth: 2}\nscorer", "depth: 1}\nscorer"))
    with pytest.raises(AssertionError, match="made again"):
        build(recipe, out, make)
    assert written(read_manifest(out)) == written(changed)
    assert left_behind(tmp_path) == []


def test_a_damaged_bundle_is_refused_and_built_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    first = build(recipe, out)
    path = out / "scorer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"scorer\.safetensors"):
        LLM.load(out)
    assert build(recipe, out).files == first.files
    LLM.load(out)


def test_a_failure_leaves_the_old_bundle(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    first = build(recipe, out)

    def fails(*_: object) -> Calibration:
        raise ValueError("no threshold")

    recipe.write_text(RECIPE.replace("accept_below: [0.1]", "accept_below: [0.2]"))
    with pytest.raises(ValueError, match="no threshold"):
        pair.build_pair(load_recipe(recipe), out, device="cpu", make_calibration=fails, report=silent)
    assert written(read_manifest(out)) == written(first)
    assert left_behind(tmp_path) == []


def test_a_calibration_of_another_draft_is_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    build(recipe, out)
    document = json.loads((out / "calibration.json").read_text())
    document["made_for"]["draft"] = "0" * 64
    (tmp_path / "calibration.json").write_text(json.dumps(document))
    recipe.write_text(RECIPE.replace("calibration:\n", "calibration:\n  file: calibration.json\n"))
    with pytest.raises(BundleError, match="was made for another draft: run `ssv-build calibrate`"):
        build(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert left_behind(tmp_path) == []


def test_a_folder_that_is_no_bundle_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists and is not a bundle: choose another folder"):
        build(recipe, tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_a_place_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written .*: choose another folder"):
        build(recipe, tmp_path / "file" / "bundle")
