"""What can be checked is refused before anything is built, by name."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_bundle import RECIPE, build, write_recipe

from ssv.builder import pair
from ssv.builder.cli import main
from ssv.support.console import ended_by_sigterm, run_command
from ssv.support.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("built")

    for name in ("make_draft", "make_heads", "make_scorer", "measure_ranges", "compile_apart"):
        monkeypatch.setattr(pair, name, never)


ENGINE = "engines: [{{role: target, precision: fp16, compute_capability: ['8.9'], {}}}]"
PROMPT = json.dumps({"prompt": "w1 w2"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: [0, 1]", "layers: [0, 2]", r"layers \[0, 2\]: name at least one of the target's layers 0 to 1"),
        ("head_size: 48", "head_size: 113", "head_size 113 exceeds the target's vocab_size 112"),
        ("tokens: 800, rows: 16, window: 48", "window: 1024", "draft.distill.window: 1024 exceeds .* 512 positions"),
        ("rows: 32, window: 48", "rows: 32, window: 1024", "scorer.fit.window: 1024 exceeds the model's 512 positions"),
        ("depth: 2}\nscorer", "depth: 2, openings_file: no.txt}\nscorer", r"openings_file: .*no\.txt cannot be read"),
        ("depth: 2}\nscorer", "depth: 2, openings_file: empty.txt}\nscorer", r"empty\.txt holds no openings"),
        ("depth: 2}\nscorer", "depth: 2, start_from: no.safetensors}\nscorer", r"start_from: .* is not there"),
        ("draft:\n", "draft:\n  file: no.safetensors\n", r"draft\.file: .*no\.safetensors is not there"),
        ("draft:\n", "draft:\n  file: empty.txt\n", r"empty\.txt"),
        ("scorer:\n", "heads: {file: no.safetensors}\nscorer:\n", r"heads\.file: .*no\.safetensors is not there"),
        ("scorer:\n", "heads: {file: empty.txt}\nscorer:\n", r"empty\.txt cannot be read"),
        ("scorer:\n", "heads: {file: heads.pt}\nscorer:\n", r"heads\.pt is a pickle, .*ssv-build convert-heads"),
        ("scorer:\n", "heads: {distill: {head_size: 113}}\nscorer:\n", "head_size 113 exceeds vocab_size 112"),
        (
            "scorer:\n",
            "heads: {distill: {head_size: 9, window: 1024}}\nscorer:\n",
            "heads.distill.window: 1024 exceeds",
        ),
        (
            "scorer:\n",
            "methods: {suffix: {beam: 0}}\nscorer:\n",
            "methods.suffix: beam: Input should be greater .*: see docs/methods.md for what suffix can have",
        ),
        (
            "scorer:\n",
            "methods: {suffix: {shortest_match: 2}}\nscorer:\n",
            "methods.suffix: shortest_match: it changes",
        ),
        ("scorer:\n", "methods: {eagle: {pays: 1}}\nscorer:\n", "methods.eagle: pays: Input should be a valid boolean"),
        (
            "scorer:\n",
            "methods: {turbo: {beam: 2}}\nscorer:\n",
            "methods.turbo: a recipe has options of lookahead, prompt-lookup, suffix, .*: leave it out",
        ),
        (
            "scorer:\n",
            "methods: {speculative: {max_pending: 3}}\nscorer:\n",
            "methods.speculative: a recipe has options",
        ),
        ("scorer:\n", "methods: [suffix]\nscorer:\n", "methods: Input should be a valid dictionary"),
        ("scorer:\n", "scorer:\n  file: no.safetensors\n", r"scorer\.file: .* is not there"),
        ("calibration:\n", "calibration:\n  file: no.json\n", r"calibration\.file: .* is not there"),
        ("calibration:\n", "calibration:\n  file: prompts.jsonl\n", r"prompts\.jsonl is not a calibration"),
        ("calibration:\n", "calibration:\n  file: other.json\n", r"other\.json was made for another target"),
        ("prompts_file: prompts.jsonl", "prompts_file: no.jsonl", r"no\.jsonl cannot be read"),
        ("prompts_file: prompts.jsonl", "prompts_file: empty.txt", r"empty\.txt holds no prompts"),
        ("prompts_file: prompts.jsonl", "prompts_file: latin.jsonl", r"latin\.jsonl is not UTF-8"),
        ("prompts_file: prompts.jsonl", "prompts_file: half.jsonl", r"half\.jsonl:2: .*half of a surrogate pair"),
        ("prompts_file: prompts.jsonl", "prompts_file: long.jsonl", "prompt 2 has 6.. tokens, .*: shorten it"),
        ("accept_below: [0.1]", "accept_below: [0.1], max_tokens: 440", "prompt 1 has 2. tokens, with max_tokens 440"),
        (
            "accept_below: [0.1]",
            "accept_below: [0.1], num_prompts: 201",
            r"num_prompts: 201 are asked for .* holds 200: add",
        ),
        ("accept_below: [0.1]", "accept_below: [0.1], num_prompts: 99", "99 prompts are too few .*: give at least 1"),
        (
            "accept_below: [0.1]",
            "accept_below: [0.1], limits: {turbo: 0.0001}",
            r"200 prompts are too few to show, .* that turbo diverges in at most 0\.0001 .*: give at least 30955, ",
        ),
        ("precision: fp32", ENGINE.format("max_length: 1024"), "max_length 1024 exceeds the model's 512 positions"),
        ("precision: fp32", ENGINE.format("checkpoint: nowhere"), r"engines\.0\.checkpoint: .*nowhere is not there"),
        ("precision: fp32", ENGINE.format("plugins: 'on'"), "has no plugins"),
        ("precision: fp32", ENGINE.format("flavor: tensorrt"), "this machine has none"),
        ("precision: fp32", ENGINE.format("").replace("8.9", "9.0"), r"capability 9\.0 is not one"),
        ("precision: fp32", ENGINE.format("").replace("8.9", "7.0"), r"capability 7\.0 does not run a target in fp16"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused_first(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "heads.pt").write_bytes(b"")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    (tmp_path / "half.jsonl").write_text(PROMPT + '\n{"prompt": "\\ud83d"}\n')
    (tmp_path / "long.jsonl").write_text(PROMPT + "\n" + (json.dumps({"prompt": "w3 " * 600}) + "\n") * 199)
    tiers = {"premium": {"policy": {"accept_below": 0, "verify_above": 0.5, "risk_budget": 0.5, "max_pending": 4}}}
    document = {
        "made_for": {"target": "0" * 64},
        "settings": {"limits": {}, "confidence": 0.95, "num_prompts": 1, "max_tokens": 8},
        "prompts": {"name": "p", "sha256": "0" * 64},
        "bound": {"kind": "asymptotic", "method": "m"},
        "tiers": tiers,
    }
    (tmp_path / "other.json").write_text(json.dumps(document))
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        build(recipe, tmp_path / "bundle")
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_may_hold_what_only_python_takes_for_a_line_break(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        "\ufeff" + (json.dumps({"prompt": "w1\u2028w2"}, ensure_ascii=False) + "\n") * 200
    )
    with pytest.raises(AssertionError, match="built"):
        build(recipe, tmp_path / "bundle")


@pytest.mark.parametrize("batch", ["0", "-3", "two", "1.5"])
@pytest.mark.parametrize("command", ["pair", "calibrate"])
def test_a_batch_of_nothing_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], command: str, batch: str
) -> None:
    more = ["--bundle", "bundle"] if command == "calibrate" else []
    with pytest.raises(SystemExit) as caught:
        main([command, str(recipe), "--out", "out", *more, "--max-rows", batch])
    assert caught.value.code == 2
    assert f"--max-rows: '{batch}' is not a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf", "soon"])
def test_a_training_of_no_time_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["distill", str(recipe), "--out", "out", f"--minutes={minutes}"])
    assert caught.value.code == 2
    assert f"--minutes: '{minutes}' is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("distill", "folder", "is a folder, and a file is to be written"),
        ("distill", "file/draft.safetensors", r"file is no folder"),
        ("distill", "draft.work", r"what ends in \.work is written beside it"),
        ("scorer", "folder", "is a folder, and a file is to be written"),
        ("scorer", "file/deep/scorer.safetensors", "is no folder"),
        ("scorer", "scorer.json", r"what ends in \.json is written beside it"),
        ("calibrate", "folder", "is a folder, and a file is to be written"),
        ("calibrate", "file/calibration.json", "is no folder"),
        ("convert-heads", "folder", "is a folder, and a file is to be written"),
    ],
)
def test_a_place_where_no_file_can_be_written_is_refused_first(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, out: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    source = tmp_path / "heads.pt" if command == "convert-heads" else recipe
    more = {"scorer": ["--draft", "none"], "calibrate": ["--bundle", "none"]}.get(command, [])
    assert main([command, str(source), "--out", str(tmp_path / out), *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "folder").iterdir())


def test_a_recipe_without_heads_says_what_to_add(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(recipe), "--kind", "medusa", "--out", str(recipe.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert "says nothing of heads\n" in said and "hint: add `heads: {distill: {}}`" in said


def test_pickled_heads_are_converted_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"0.0.linear.weight": torch.ones(4, 4), "0.0.linear.bias": torch.ones(4), "0.1.weight": torch.ones(9, 4)}
    torch.save(state, tmp_path / "medusa_lm_head.pt")
    out = tmp_path / "made" / "heads.safetensors"
    assert main(["convert-heads", str(tmp_path / "medusa_lm_head.pt"), "--out", str(out)]) == 0
    found = load_file(out)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    torch.save({"x": 1}, tmp_path / "no.pt")
    assert main(["convert-heads", str(tmp_path / "no.pt"), "--out", str(out)]) == 2
    assert "no table of tensors by name" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pair", "distill", "scorer", "calibrate", "quantize"])
def test_cuda_that_is_not_there_is_refused(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = str(tmp_path / "target") if command == "quantize" else str(recipe)
    more = {
        "scorer": ["--draft", "draft.safetensors"],
        "calibrate": ["--bundle", "bundle"],
        "quantize": ["--role", "target", "--precision", "int4"],
    }.get(command, [])
    out = tmp_path / "out" / "it"
    assert main([command, source, *more, "--out", str(out), "--device", "cuda"]) == 2
    assert "error: CUDA is not available" in (error := capsys.readouterr().err)
    assert "hint: use --device cpu" in error
    assert not out.parent.exists()


# --- signals --------------------------------------------------------------------------------------------------------


def test_sigterm_tidies_up_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    before, tidied = signal.getsignal(signal.SIGTERM), []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            tidied.append(True)
        return 0

    with ended_by_sigterm():
        assert run_command(work) == 143
    assert tidied == [True]
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


CHILD = "import time; print('up', flush=True); time.sleep(600)"
PARENT = f"""
import os, signal, subprocess, sys
from ssv.builder.tensorrt.compile_job import _die_with
me = os.getpid()
subprocess.Popen([sys.executable, "-c", {CHILD!r}], preexec_fn=lambda: _die_with(me))
signal.pause()
"""


def test_a_child_does_not_outlive_its_parent() -> None:
    """SIGKILL leaves a parent no time to end its child."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        said = parent.stdout.readline()
        parent.kill()
        assert said == b"up\n"
        assert parent.stdout.read() == b""  # the end: nobody holds the other side any more
