"""A whole bundle from a recipe, on a tiny target: what is written, reused, refused, and left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_bundle import RECIPE, Calibrator, build, write_recipe

from ssv.builder import pair, staging
from ssv.builder.calibrate import Calibration
from ssv.builder.config import load_recipe
from ssv.bundle.manifest import (
    BundleError,
    EngineEntry,
    Manifest,
    engine_source,
    file_entry,
    manifest_lock,
    read_manifest,
    write_manifest,
)
from ssv.runtime.llm import LLM
from ssv.runtime.methods import EAGLE, METHODS, NEEDS_HEADS, PROMPT_LOOKUP, SUFFIX, policy_for, with_options
from ssv.runtime.request import Request, SamplingParams
from ssv.support.progress import silent


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
    assert not (tmp_path / "bundle.work").exists()  # the corpus
    llm = LLM.load(out, max_length=64)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    ids = llm.chat_ids("w1 w2 w3")
    outputs = [
        llm.generate([Request(ids, method, params)])[0] for method in ("autoregressive", "speculative", "premium")
    ]
    assert len({output.token_ids for output in outputs}) == 1
    assert len(llm.generate([Request(ids, "turbo", params)])[0].token_ids) == 20


def test_a_bundle_with_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made, decode losslessly, are taken over while their sources stay the same, and go with the key."""
    recipe, out = write_recipe(tmp_path, heads=True), tmp_path / "bundle"
    manifest = build(recipe, out)
    assert manifest.heads is not None and manifest.heads["num_heads"] == 3
    assert "heads.safetensors" in manifest.files
    assert not (tmp_path / "bundle.work").exists()
    llm = LLM.load(out, max_length=64)
    assert llm.methods == METHODS
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=4, ignore_eos=True)
        ids = llm.chat_ids("w1 w2 w3")
        plain, medusa = llm.generate([Request(ids, method, params) for method in ("autoregressive", "medusa")])
        assert medusa.token_ids == plain.token_ids
        assert medusa.counters.drafted > 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(pair, "make_heads", never)
        assert build(recipe, out).files == manifest.files
    recipe.write_text(RECIPE)
    without = build(recipe, out)
    assert without.heads is None and "heads.safetensors" not in without.files
    assert not (out / "heads.safetensors").exists()
    assert LLM.load(out, max_length=64).methods == tuple(name for name in METHODS if name not in NEEDS_HEADS)


def test_methods_of_a_recipe_are_the_bundles(recipe: Path, tmp_path: Path) -> None:
    """They are kept in its manifest, and requests begin with them; other methods stay as published."""
    recipe.write_text(
        recipe.read_text()
        + "methods:\n  suffix: {longest_match: 12, min_probability: 0.25}\n  prompt-lookup: {max_pending: 20}\n"
    )
    manifest = build(recipe, tmp_path / "bundle")
    own = {
        "suffix": SUFFIX.model_copy(update={"longest_match": 12, "min_probability": 0.25}),
        "prompt-lookup": PROMPT_LOOKUP.model_copy(update={"max_pending": 20}),
    }
    assert manifest.methods == own == read_manifest(tmp_path / "bundle").methods
    llm = LLM.load(tmp_path / "bundle", max_length=64)
    assert {name: policy_for(name, llm.tiers) for name in ("suffix", "prompt-lookup", "eagle")} == {
        **own,
        "eagle": EAGLE,
    }
    changed = with_options("suffix", policy_for("suffix", llm.tiers), {"longest_match": 5})
    assert (changed.longest_match, changed.min_probability) == (5, 0.25)
    requests = [
        Request(llm.chat_ids("w1 w2 w3"), name, SamplingParams(max_tokens=9)) for name in ("autoregressive", *own)
    ]
    assert len({output.token_ids for output in llm.generate(requests)}) == 1


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


def test_no_engine_is_added_between_what_is_carried_over_and_the_exchange(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, exchange, held = tmp_path / "bundle", staging.exchange, []

    def watched(new: Path, place: Path) -> None:
        if place.exists():
            descriptor = os.open(place, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(descriptor)
            held.append(place)
        exchange(new, place)

    monkeypatch.setattr(staging, "exchange", watched)
    build(recipe, out)
    build(recipe, out)
    assert held == [out]
    with manifest_lock(out):  # and is given back
        assert read_manifest(out)


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


def test_engines_that_were_added_are_carried_over_while_they_match(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    build(recipe, out)
    for role in ("target", "draft"):
        add_engine(out, role)
    added = read_manifest(out)
    assert len(added.engines) == 2
    again = build(recipe, out)
    assert again.engines == added.engines
    assert read_manifest(out).files == added.files
    recipe.write_text(RECIPE.replace("depth: 2}\ncalibration", "depth: 2, seed: 2}\ncalibration"))  # another scorer
    assert set(build(recipe, out).engines) == {"target-fp16-tensorrt_rtx-8.9"}
    assert "note: engine draft-fp16-tensorrt_rtx-8.9 was compiled from other weights" in capsys.readouterr().err
    assert not list(out.glob("draft/*.engine"))
    read_manifest(out)


def test_a_damaged_engine_is_not_carried_over(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    build(recipe, out)
    add_engine(out, "target")
    next(out.glob("target/*.engine")).write_bytes(b"torn")
    assert not build(recipe, out).engines
    assert "target-fp16-tensorrt_rtx-8.9 is damaged" in capsys.readouterr().err


def add_engine(bundle: Path, role: str) -> None:
    """Has a bundle hold what stands for an engine, as `ssv-build compile` adds one."""
    manifest, name = read_manifest(bundle), f"{role}-fp16-tensorrt_rtx-8.9"
    plan = bundle / role / f"{name}-0123456789ab.engine"
    plan.write_bytes(b"plan")
    entry = EngineEntry.model_validate(
        {
            "role": role,
            "precision": "fp16",
            "flavor": "tensorrt_rtx",
            "tensorrt": "1.7.1",
            "compute_capabilities": ["8.9"],
            "file": plan.relative_to(bundle).as_posix(),
            "compute_type": "float16",
            "max_batch": 1,
            "max_length": 128,
            "max_pending": 8,
            "prefill_chunk": 64,
            "source": engine_source(manifest, role),
            "build_seconds": 1.0,
            "peak_memory_bytes": 1,
        }
    )
    files = {**manifest.files, entry.file: file_entry(plan)}
    write_manifest(bundle, manifest.model_copy(update={"files": files, "engines": {**manifest.engines, name: entry}}))


def test_finished_parts_survive_a_failure(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit that cannot be met is found when draft and scorer are there."""
    out = tmp_path / "bundle"

    def fails(*_: object) -> Calibration:
        raise ValueError("no threshold")

    with pytest.raises(ValueError, match="no threshold"):
        pair.build_pair(load_recipe(recipe), out, device="cpu", make_calibration=fails, report=silent)
    assert not out.exists()
    assert "note: what has been finished is kept in" in capsys.readouterr().err

    def never(*_: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        for name in ("make_draft", "make_scorer", "measure_ranges"):
            patch.setattr(pair, name, never)
        manifest = build(recipe, out)
    assert written(read_manifest(out)) == written(manifest)
    assert left_behind(tmp_path) == []
    assert written(build(recipe, tmp_path / "other")) == written(manifest)


def test_a_finished_part_that_is_torn_or_of_other_sources_is_made_again(recipe: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "bundle", build(recipe, tmp_path / "whole")

    def fails(*_: object) -> Calibration:
        raise ValueError("no threshold")

    def interrupted() -> Path:
        with pytest.raises(ValueError, match="no threshold"):
            pair.build_pair(load_recipe(recipe), out, device="cpu", make_calibration=fails, report=silent)
        return tmp_path / ".bundle.building"

    (interrupted() / "bundle" / "scorer.safetensors").write_bytes(b"torn")
    assert build(recipe, out).files == expected.files
    shutil.rmtree(out)
    interrupted()
    recipe.write_text(RECIPE.replace("depth: 2}\ncalibration", "depth: 2, seed: 2}\ncalibration"))
    changed = build(recipe, out)
    assert changed.files["draft/draft.safetensors"] == expected.files["draft/draft.safetensors"]
    assert changed.files["scorer.safetensors"] != expected.files["scorer.safetensors"]


def nothing_is_made_again(patch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("made again")

    for name in ("make_draft", "make_scorer", "measure_ranges"):
        patch.setattr(pair, name, never)


def test_a_moved_recipe_is_the_same_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, make = tmp_path / "bundle", Calibrator()
    (tmp_path / "openings.txt").write_text("w3 w4\nw5\n")
    text = RECIPE.replace("head_size: 48", "head_size: 48, openings_file: openings.txt")
    recipe.write_text(text)
    first = build(recipe, out, make)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("target", "prompts.jsonl"):
        (tmp_path / name).rename(moved / name)
    (tmp_path / "openings.txt").rename(moved / "begin.txt")
    (moved / "recipe.yaml").write_text(
        text.replace("openings.txt", "begin.txt").replace("head_size: 48", "head_size: 48, checkpoint_every: 7")
    )
    with monkeypatch.context() as patch:
        nothing_is_made_again(patch)
        assert build(moved / "recipe.yaml", out, make).files == first.files
    assert make.calls == 1


@pytest.mark.parametrize("what", ["openings", "prompts", "template", "eos", "precision"])
def test_other_content_in_the_same_place_is_made_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out, make = tmp_path / "bundle", Calibrator()
    openings, prompts = tmp_path / "openings.txt", tmp_path / "prompts.jsonl"
    openings.write_text("w3 w4\nw5\n")
    recipe.write_text(RECIPE.replace("head_size: 48", "head_size: 48, openings_file: openings.txt"))
    first = build(recipe, out, make)
    settings = tmp_path / "target" / "tokenizer_config.json"
    template = tmp_path / "target" / "chat_template.jinja"
    if what == "openings":
        openings.write_text("w6 w7\nw8\n")
    elif what == "prompts":
        prompts.write_text(prompts.read_text().replace("w1 ", "w2 "))
    elif what == "template":
        template.write_text(template.read_text().replace("<s> assistant", "<s> w44 assistant"))
    elif what == "eos":
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "w17"}))
    else:
        recipe.write_text(recipe.read_text().replace("precision: fp32", "precision: int8"))
    changed = build(recipe, out, make)
    assert make.calls == 2  # its prompts are decoded again
    differ = {name for name in first.sources if first.sources[name] != changed.sources[name]}
    text = {"draft", "scorer", "ranges", "calibration"}
    assert (
        differ
        == {
            "openings": text,
            "prompts": {"ranges", "calibration"},
            "template": {"target", *text},
            "eos": {"target", *text},
            "precision": {"calibration"},
        }[what]
    )
    if what == "template":
        assert "w44 assistant" in (out / "tokenizer" / "chat_template.jinja").read_text()
    if what == "eos":
        ends = json.loads((out / "target" / "config.json").read_text())["eos_token_id"]
        assert read_manifest(out).eos_token_ids == ends and 24 in ends
        assert LLM.load(out, max_length=64).tokenizer.chat_ids([{"role": "user", "content": "w1"}])


def test_files_of_a_bundle_can_be_read_by_others(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    mask = os.umask(0o022)
    try:
        build(write_recipe(tmp_path), out)
    finally:
        os.umask(mask)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.rglob("*"))
