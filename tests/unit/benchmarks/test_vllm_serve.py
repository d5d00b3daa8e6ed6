"""`benchmarks/vllm_serve.py` with a server that stands for vLLM: exports, scripts, comparison and record."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from scripts import loaded
from tiny_bundle import built_with

from ssv.ab.samples import Sample
from ssv.support.errors import UserError

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "support" / "fake_vllm.py"


@pytest.fixture
def script() -> ModuleType:
    return loaded(ROOT / "benchmarks" / "vllm_serve.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    built_with(folder, "join: eagle3")
    return folder


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says what was started, as `vllm` is the stand-in."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vllm").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {FAKE} "$@"\n')
    (programs / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def lines_of(log: Path) -> list[tuple[str, int, list[str]]]:
    found = [line.split(" ", 2) for line in log.read_text().splitlines()]
    return [(gpus, int(pid), rest.split()) for gpus, pid, rest in found]


def test_a_run_of_two_sizes(
    script: ModuleType, folder: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of them cannot be started, which costs the first nothing."""
    out = tmp_path / "record.json"
    monkeypatch.setenv("FAKE_VLLM_DIES", "2")
    command = ["vllm_serve.py", "--bundle", str(folder / "bundle"), "--prompts", str(folder / "prompts.jsonl")]
    command += ["--num-prompts", "12", "--concurrency", "1,2", "--gpus", "2", "--engine-options", "--seed 3"]
    command += ["--arms", "plain,speculation", "--max-length", "200", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    assert script.main() == 1
    record = json.loads(out.read_text())
    one, two = record["sizes"]["1"], record["sizes"]["2"]
    assert "it ended with 1: error: plain ended, see " in two["error"] and "arms" not in two
    assert one["status"] == "complete" and "error" not in one and len(one["verdicts"]) == 1
    for concurrency, requests in (("1", 24), ("2", 24)):
        plain, speculation = (one["arms"][arm][concurrency] for arm in ("plain", "speculation"))
        assert plain["requests"] == speculation["requests"] == requests and not plain["failed"]
        assert plain["output_tokens"] == 9 * requests
        assert speculation["identical_share"] == 1.0 and "identical_share" not in plain
        low, high = plain["tokens_per_s_interval"]
        assert low <= plain["tokens_per_s"] <= high
        assert {"mean", "p50", "p95"} == plain["ttft_ms"].keys() == plain["itl_ms"].keys()
        assert speculation["speed_against_plain"].keys() == {"times", "low", "high", "level"}
    # As many as were asked, and those that warm it up.
    assert one["counters"]["plain"].keys() == {"generated", "requests"}
    counters = one["counters"]["speculation"]
    assert counters["requests"] > 48 and counters["generated"] == 9 * counters["requests"]
    assert counters["tokens_per_pass"] == 2.0 == counters["mean_acceptance_length"]
    assert counters["accepted_by_position"] == [1.0, 0.0, 0.0]
    assert one["heads"]["target"] == {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    assert one["not_run"].keys() == {"ssv"} and any("the arm ssv" in each for each in two["not_exported"])
    # Side by side on two GPUs, and sharing both.
    assert one["gpus_of_arms"] == {"plain": "0", "speculation": "1"}
    assert two["gpus_of_arms"] == {"plain": "0,1", "speculation": "0,1"}
    log = lines_of(started)
    assert sorted(gpus for gpus, _, _ in log[:2]) == ["0", "1"]
    assert all(words[-2:] == ["--seed", "3"] for _, _, words in log)
    assert not any(Path(f"/proc/{pid}").exists() for _, pid, _ in log)
    assert {"command", "machine", "versions", "commit", "gpus"} <= record.keys()


def test_what_takes_too_long_is_ended_with_all_that_it_started(script: ModuleType, tmp_path: Path) -> None:
    """Also what has a process group of its own, and does not end when told to."""
    program, pids = tmp_path / "program", tmp_path / "pids"
    program.write_text(
        f"#!/usr/bin/env bash\nset -m\ntrap '' TERM\n(echo $BASHPID > {pids}; sleep 3600) &\n"
        "echo error: late >&2\nwait\n"
    )
    program.chmod(0o755)
    script.ENDING = 0.1
    assert script.run([str(program)], dict(os.environ), 2.0) == "not done after 2 s: error: late"
    patience = time.monotonic() + 600
    while Path(f"/proc/{pids.read_text().strip()}").exists() and time.monotonic() < patience:
        time.sleep(0.01)
    assert not Path(f"/proc/{pids.read_text().strip()}").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tp", "one"], "--tp one: 'one' is not a whole number from 1 on"),
        (["--tp", "1,0"], "--tp 1,0: '0' is not a whole number from 1 on"),
        (["--tp", "2,1,2"], "--tp 2,1,2 names a size twice"),
        (["--tp", "1,2", "--work", "{folder}"], "{folder}/tp2 exists"),
        (["--out", "{folder}/none/record.json"], "{folder}/none is no folder"),
    ],
)
def test_nothing_is_begun_that_cannot_be_kept(
    script: ModuleType, arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tp2").mkdir()
    given = [each.format(folder=tmp_path) for each in arguments]
    monkeypatch.setattr(sys, "argv", ["vllm_serve.py", "--bundle", str(tmp_path / "bundle"), *given])
    with pytest.raises(UserError) as refused:
        script.main()
    assert refused.value.what == named.format(folder=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["tp2"]


def test_an_arm_has_no_gpu_twice(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["vllm_serve.py", "--bundle", str(tmp_path / "bundle"), "--tp", "1,2", "--gpus", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "record.json")])
    assert script.main() == 1
    one, two = json.loads((tmp_path / "record.json").read_text())["sizes"].values()
    assert "is not a bundle" in one["error"]
    assert two["error"] == "an arm needs 2 GPUs, and there are 1: choose smaller ones with --tp"


def test_speeds(script: ModuleType) -> None:
    def sample(block: int, repeat: int, seconds: float, tokens: int) -> Sample:
        start = 100.0 * block + 10 * repeat
        return Sample("plain", 1, block, repeat, "p", 0, start, start + seconds, output_tokens=tokens)

    alike = [sample(block, repeat, 2.0, 50) for block in range(6) for repeat in (0, 1)]
    assert script.speed_interval(alike) == [25.0, 25.0]
    assert script.speed_interval(alike[:10]) is None  # five blocks
    slower = [*alike, sample(6, 0, 4.0, 50), sample(6, 1, 4.0, 50)]
    low, high = script.speed_interval(slower)
    assert low < 700 / 32 < high <= 25.0
    cost = {"metric": "cost", "estimate": -0.2, "interval": {"low": -0.5, "high": 0.25, "level": 0.975}}
    assert script.speed_against([cost]) == {"times": 1.25, "low": 0.8, "high": 2.0, "level": 0.975}
    assert script.speed_against([{**cost, "interval": None}]) == {"times": 1.25}
    assert script.speed_against([]) is None


def test_counters_of_other_engines_and_none(script: ModuleType, tmp_path: Path) -> None:
    assert script.counted(tmp_path / "none") is None
    (tmp_path / "metrics").write_text('# TYPE other counter\nother{a="b"} 3\nup 1\n')
    assert script.counted(tmp_path / "metrics") == {}
