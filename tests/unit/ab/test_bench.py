"""ssv-bench and ssv-generate on a tiny bundle: what they count and print, and what they refuse before they load anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import build, write_recipe

from ssv.ab import bench
from ssv.client import cli
from ssv.runtime.llm import LLM
from ssv.runtime.request import Chunk, Request, SamplingParams

LOSSLESS = ["autoregressive", "lookahead", "prompt-lookup", "suffix", "speculative", "premium"]
METHODS = [*LOSSLESS, "balanced", "turbo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `bundle` and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("bench")
    build(write_recipe(folder), folder / "bundle")
    return folder


def run_bench(folder: Path, *options: str) -> int:
    return bench.main(
        [
            "--bundle",
            str(folder / "bundle"),
            "--prompts",
            str(folder / "prompts.jsonl"),
            "--max-tokens",
            "12",
            "--num-prompts",
            "9",
            *options,
        ]
    )


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--batch", "4") == 0
    found = document(capsys)
    assert {"rows", "machine", "versions", "commit"} <= found.keys()
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == METHODS
    for row in rows.values():
        assert row["tokens_per_s"] > 0
        assert row["drafted"] == row["accepted"] + row["trusted"] + row["rolled_back"]
        # Of each output one token comes with the prompt, and every pass gives one more.
        assert (
            row["emitted"]
            <= row["accepted"] + row["trusted"] + 9 + row["target_passes_per_token"] * row["emitted"] + 1e-6
        )
        assert row["target_tokens_per_token"] >= row["target_passes_per_token"] - 1e-9
    assert rows["autoregressive"]["speedup"] == pytest.approx(1.0)
    assert rows["autoregressive"]["drafted"] == 0
    for method in LOSSLESS:
        assert rows[method]["divergence"] == 0.0
        assert rows[method]["identical"] == 1.0
        assert rows[method]["trusted"] == 0
    assert found["settings"]["policies"]["turbo"]["accept_below"] == 0.1


def test_divergence_is_what_the_target_contradicts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier that trusts everything emits what the draft says; an untrained draft says other things than its target."""
    from ssv.bundle.policy import Policy

    load = LLM.load

    def trusting(*args: Any, **options: Any) -> LLM:
        llm = load(*args, **options)
        llm.tiers["turbo"] = Policy(accept_below=1.0, verify_above=1.0, risk_budget=1.0, max_pending=6)
        return llm

    monkeypatch.setattr(LLM, "load", trusting)
    assert run_bench(folder, "--methods", "turbo") == 0
    baseline, turbo = document(capsys)["rows"]
    assert baseline["divergence"] == 0.0
    assert turbo["trusted"] > 0
    assert 0.1 < turbo["divergence"] < 1.0
    assert turbo["divergence_low"] < turbo["divergence"] < turbo["divergence_high"]
    assert turbo["divergence_promised"] == 0.05 and baseline["divergence_promised"] is None
    assert turbo["divergence_margin"] < turbo["divergence"]
    assert turbo["identical"] < 1.0


def test_sampled_outputs_have_no_divergence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--methods", "premium", "--temperature", "1", "--num-prompts", "2") == 0
    rows = document(capsys)["rows"]
    assert [row["method"] for row in rows] == ["autoregressive", "premium"]
    assert all(row["divergence"] is None for row in rows)


def test_what_is_sampled_is_the_same_with_a_lossless_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--methods", "premium,speculative", "--temperature", "5", "--num-prompts", "2") == 0
    assert [row["identical"] for row in document(capsys)["rows"]] == [1.0, 1.0, 1.0]


def test_top_k_and_top_p_reach_the_requests(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SamplingParams] = []
    stream = LLM.stream

    def recording(self: LLM, requests: Sequence[Request]) -> Iterator[Chunk]:
        asked.extend(request.params for request in requests)
        return stream(self, requests)

    monkeypatch.setattr(LLM, "stream", recording)
    words = ("--methods", "premium", "--temperature", "5", "--num-prompts", "2", "--top-k", "3", "--top-p", "0.4")
    assert run_bench(folder, *words) == 0
    assert {(params.temperature, params.top_k, params.top_p) for params in asked} == {(5.0, 3, 0.4)}
    settings = document(capsys)["settings"]
    assert (settings["top_k"], settings["top_p"]) == (3, 0.4)


def test_cost_is_of_the_price_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--methods", "autoregressive", "--num-prompts", "2", "--price-per-hour", "3.6") == 0
    (row,) = document(capsys)["rows"]
    assert row["cost_per_1m_tokens"] == pytest.approx(1000 / row["tokens_per_s"])


def test_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.png"
    assert run_bench(folder, "--methods", "premium", "--num-prompts", "2", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--methods", "fast"], "unknown method 'fast'"),
        (["--price-per-hour", "0"], "--price-per-hour 0.0 must be above 0"),
        (["--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--plot", "speed.pdf"], "choose a .png file"),
        (["--plot", "/nowhere/speed.png"], "choose a .png file in a folder that exists"),
        (["--max-tokens", "0"], "max_tokens 0"),
        (["--temperature", "1", "--top-k", "-1"], "top_k -1"),
        (["--temperature", "1", "--top-p", "0"], "top_p 0.0"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-k", "40"], "--top-k and --top-p are of sampled output"),
        (["--top-p", "0.9"], "--top-k and --top-p are of sampled output"),
        (["--prompts", "/nowhere/prompts.jsonl"], "/nowhere/prompts.jsonl"),
        (["--bundle", "/nowhere/bundle"], "/nowhere/bundle"),
        (["--max-tokens", "4000"], "exceed the cache"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str) -> None:
    assert run_bench(folder, *options) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert named in captured.err.replace("\nhint: ", ": ")
    assert captured.out == ""


def test_generate_streams_text_and_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for method in METHODS[:3]:
        assert cli.main(["--bundle", str(folder / "bundle"), "--method", method, "--max-tokens", "9", "w1 w2"]) == 0
        captured = capsys.readouterr()
        texts[method] = captured.out
        assert f"[{method}: " in captured.err and "ended by" in captured.err
    assert texts["autoregressive"].strip()
    assert len(set(texts.values())) == 1


def test_generate_stops_where_it_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bundle", str(folder / "bundle"), "--max-tokens", "9", "--quiet", "w1 w2"]
    assert cli.main(options) == 0
    words = capsys.readouterr().out.split()
    assert len(words) > 2
    assert cli.main([*options, "--stop", words[2]]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == words[:2]
    assert captured.err == ""


def test_generate_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--bundle", str(folder / "bundle"), " "]) == 2
    assert "error: the prompt is empty" in capsys.readouterr().err
    assert cli.main(["--bundle", str(folder), "w1"]) == 2
    assert "error: " in capsys.readouterr().err


def row(**changes: Any) -> bench.MethodRow:
    zeros = {name: 0.0 for name in bench.MethodRow.__dataclass_fields__}
    return bench.MethodRow(**{**zeros, "method": "turbo", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("divergence", "low", "high", "promised", "said"),
    [
        (0.049, 0.03, 0.07, 0.05, None),
        (0.2, 0.1, 0.3, None, None),  # lossless, or never calibrated
        (None, None, None, 0.05, None),  # sampled
        (0.06, 0.04, 0.08, 0.05, "turbo diverged in 6.00% .*4.00% to 8.00%.* above the 5.00% .*may be chance"),
        (0.08, 0.06, 0.1, 0.05, "turbo diverged in 8.00% .*6.00% to 10.00%.* promises: calibrate it on prompts like"),
    ],
)
def test_a_broken_promise_is_said(
    divergence: float | None, low: float | None, high: float | None, promised: float | None, said: str | None
) -> None:
    found = bench.broken_promise(
        row(divergence=divergence, divergence_low=low, divergence_high=high, divergence_promised=promised)
    )
    assert (found is None) if said is None else re.search(said, found or "")


def test_labels_of_the_plot_are_apart() -> None:
    assert bench.spread([1.0, 0.99, 1.4], 0.1) == pytest.approx([1.09, 0.99, 1.4])
    assert bench.spread([2.0, 2.0, 2.0], 0.5) == [2.0, 2.5, 3.0]
    assert bench.spread([], 1.0) == []
