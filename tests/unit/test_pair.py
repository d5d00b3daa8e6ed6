"""A whole bundle from a recipe, on a tiny target: what is written, what is reused, what is refused, what is left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_bundle import RECIPE, Calibrator, build, write_recipe

from ssv.builder import pair
from ssv.builder.calibrate import Calibration
from ssv.builder.config import load_recipe
from ssv.builder.manifest import BundleError, Manifest, read_manifest
from ssv.builder.progress import silent
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


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
    assert left_behind(tmp_path) == [".other.building"]  # the draft and the scorer, for the next run


def test_a_folder_that_is_no_bundle_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists and is not a bundle: choose another folder"):
        build(recipe, tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_a_place_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written .*: choose another folder"):
        build(recipe, tmp_path / "file" / "bundle")


def test_engines_of_the_recipe_are_compiled_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    engines = [
        f"  - {{role: {role}, precision: {precision}, compute_capability: ['8.9'], max_length: 192, prefill_chunk: 64}}"
        for role, precision in (("target", "int4"), ("draft", "fp16"))
    ]
    recipe.write_text(recipe.read_text() + "engines:\n" + "\n".join(engines) + "\n")
    out = tmp_path / "out"
    manifest = build(recipe, out)
    assert {(e.role, e.precision) for e in manifest.engines.values()} == {("target", "int4"), ("draft", "fp16")}
    assert read_manifest(out).engines == manifest.engines
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # neither stage nor quantized checkpoint

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(pair, "compile_apart", never)
    assert build(recipe, out).engines == manifest.engines
    assert read_manifest(out).engines == manifest.engines


def test_files_of_a_bundle_can_be_read_by_others(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    mask = os.umask(0o022)
    try:
        build(write_recipe(tmp_path), out)
    finally:
        os.umask(mask)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.rglob("*"))
