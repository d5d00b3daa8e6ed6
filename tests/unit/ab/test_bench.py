"""ssv-bench and ssv-generate on a tiny bundle: what they count and print, and what they refuse before they load
anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from tiny_bundle import build, write_recipe

from ssv.ab import bench, bench_view
from ssv.ab.bench_ways import ways
from ssv.ab.statistics import mean_ratio_interval
from ssv.client import cli
from ssv.runtime.counters import Counters
from ssv.runtime.llm import LLM
from ssv.runtime.request import Audit, Chunk, Output, Request, SamplingParams
from ssv.support.progress import silent

LOSSLESS = ["autoregressive", "lookahead", "prompt-lookup", "suffix", "specinfer", "eagle", "speculative", "premium"]
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
            "--rounds",
            "2",
            *options,
        ]
    )


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--max-rows", "4") == 0
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
        # Each depth that a pass kept is one token more than its own.
        passes = row["target_passes_per_token"] * row["emitted"]
        assert sum(row["kept_by_depth"]) * passes == pytest.approx(row["accepted"] + row["trusted"])
        assert row["kept_by_depth"] == sorted(row["kept_by_depth"], reverse=True)
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


def test_divergence_of_sampled_outputs_is_from_what_the_target_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(folder, "--methods", "premium", "--temperature", "1", "--num-prompts", "3") == 0
    rows = document(capsys)["rows"]
    assert [row["method"] for row in rows] == ["autoregressive", "premium"]
    assert all(row["divergence"] == row["divergence_margin"] == row["typical"] == 0 for row in rows)


def test_typical_acceptance_diverges_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(write_recipe(tmp_path, heads=True), tmp_path / "bundle")
    options = ("--methods", "medusa,medusa-typical", "--num-prompts", "6")
    assert run_bench(tmp_path, *options, "--temperature", "1") == 0
    _, medusa, typical = document(capsys)["rows"]
    assert medusa["divergence"] == 0 and medusa["typical"] == 0 and medusa["identical"] == 1
    assert 0 < typical["divergence_margin"] <= typical["divergence"] < 1
    assert typical["divergence"] == pytest.approx(typical["typical"] / typical["emitted"], rel=0.5)
    assert typical["divergence_promised"] is None and typical["identical"] < 1
    assert run_bench(tmp_path, *options) == 0
    assert document(capsys)["rows"][2]["divergence"] == 0
    assert run_bench(tmp_path, "--num-prompts", "2") == 0
    assert "medusa-typical" not in {row["method"] for row in document(capsys)["rows"]}  # greedy: it is medusa


def test_what_is_sampled_is_the_same_with_a_lossless_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(folder, "--methods", "premium,speculative", "--temperature", "5", "--num-prompts", "2") == 0
    assert [row["identical"] for row in document(capsys)["rows"]] == [1.0, 1.0, 1.0]


def test_top_k_and_top_p_reach_the_requests(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SamplingParams] = []
    stream = LLM.stream

    def recording(self: LLM, requests: Sequence[Request], **options: Any) -> Iterator[Chunk]:
        asked.extend(request.params for request in requests)
        return stream(self, requests, **options)

    monkeypatch.setattr(LLM, "stream", recording)
    words = ("--methods", "premium", "--temperature", "5", "--num-prompts", "2", "--top-k", "3", "--top-p", "0.4")
    assert run_bench(folder, *words) == 0
    assert {(params.temperature, params.top_k, params.top_p) for params in asked} == {(5.0, 3, 0.4)}
    settings = document(capsys)["settings"]
    assert (settings["top_k"], settings["top_p"]) == (3, 0.4)


def test_rows_have_the_options_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They say which; other rows have the bundle's, and the text is the same."""
    options = {"speculative": {"max_pending": 2}, "suffix": {"longest_match": 2, "pays": False}}
    words = ("--methods", "speculative,suffix,eagle", "--num-prompts", "2", "--policy", json.dumps(options))
    assert run_bench(folder, *words) == 0
    found = document(capsys)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [
        "autoregressive",
        "speculative, max_pending 2",
        "suffix, longest_match 2, pays false",
        "eagle",
    ]
    assert all(row["identical"] == 1.0 for row in rows.values())
    assert len(rows["speculative, max_pending 2"]["kept_by_depth"]) <= 2
    assert json.loads(found["settings"]["policy"]) == options


def test_options_that_a_method_cannot_have_end_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        ({"suffix": {"shortest_match": 2}}, "shortest_match: it changes nothing of suffix"),
        ({"turbo": {"beam": 2}}, "turbo is lossy, and its bound on divergence is that of its own policy"),
        ({"medusa": {"beam": 2}}, "--policy has options of medusa, and what is compared is autoregressive, lookahead"),
    ):
        assert run_bench(folder, "--policy", json.dumps(options)) == 2
        assert says in capsys.readouterr().err


def test_the_title_has_precision_and_rounds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The precision is that of rows that do not say another one."""
    words = ("--methods", "autoregressive", "--num-prompts", "2", "--also", "fp32", "--half-width", "0.0001")
    assert run_bench(folder, *words, "--precision", "int8") == 0
    out = capsys.readouterr().out
    assert "ssv-bench, int8, 2 rounds" in out and "autoregressive, fp32" in out


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
        (["--methods", ","], "--methods names none: choose of: autoregressive, "),
        (["--methods", "all,premium"], "--methods all is every method: give it alone"),
        (["--methods", "speculative", "--num-draft-tokens", "0"], "num_draft_tokens 0: speculative decoding drafts 1"),
        (["--num-draft-tokens", "65"], "num_draft_tokens 65: speculative decoding drafts 1 to 64"),
        (
            ["--methods", "eagle", "--num-draft-tokens", "3"],
            "--num-draft-tokens is of the method speculative, not of autoregressive, eagle: leave it out",
        ),
        (["--policy", "{"], "--policy is not JSON"),
        (["--policy", '{"beam": 4}'], 'must have an object of options by method: as {"eagle": {"max_depth": 4}}'),
        (["--policy", '{"fast": {}}'], "--policy: unknown method 'fast'; known: "),
        (
            ["--methods", "suffix", "--policy", '{"eagle": {"beam": 2}}'],
            "--policy has options of eagle, and what is compared is autoregressive, suffix: leave them out, or choose",
        ),
        (
            ["--num-draft-tokens", "3", "--policy", '{"speculative": {"max_pending": 2}}'],
            "--num-draft-tokens and max_pending of --policy are the same setting: give one of them",
        ),
        (["--also", ""], "--also names nothing: choose of: fp32, bf16, int8, int4, prompt-cache, or leave it out"),
        (["--also", "int3"], "--also 'int3' is unknown; known: fp32, bf16, int8, int4, prompt-cache"),
        (["--system-prompt", "/nowhere/system.txt"], "/nowhere/system.txt cannot be read"),
        (["--price-per-hour", "0"], "--price-per-hour 0.0 must be above 0"),
        (["--price-per-hour", "inf"], "--price-per-hour inf must be above 0"),
        (["--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["--half-width", "0"], "--half-width 0.0 is a share of a speed-up: give a number between 0 and 1"),
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


@pytest.mark.parametrize(
    ("method", "count", "named"),
    [
        ("speculative", "0", "num_draft_tokens 0: speculative decoding drafts 1 to 64"),
        ("speculative", "65", "num_draft_tokens 65: speculative decoding drafts 1 to 64"),
        ("premium", "3", "--num-draft-tokens is of the method speculative, not of premium"),
    ],
)
def test_generate_refuses_a_count_before_it_loads(
    method: str, count: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--bundle", "/nowhere", "--method", method, "--num-draft-tokens", count, "w1"]) == 2
    assert f"error: {named}" in capsys.readouterr().err


def test_generate_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--bundle", str(folder / "bundle"), " "]) == 2
    assert "error: the prompt is empty" in capsys.readouterr().err
    assert cli.main(["--bundle", str(folder), "w1"]) == 2
    assert "error: " in capsys.readouterr().err


def row(**changes: Any) -> bench.MethodRow:
    zeros = {name: 0.0 for name in bench.MethodRow.__dataclass_fields__}
    given: dict[str, Any] = {"method": "turbo", "speedup_by_round": (), "kept_by_depth": ()}
    return bench.MethodRow(**{**zeros, **given, **changes})


@pytest.mark.parametrize(
    ("divergence", "low", "high", "promised", "said"),
    [
        (0.049, 0.03, 0.07, 0.05, None),
        (0.2, 0.1, 0.3, None, None),  # lossless, or never calibrated
        (0.06, 0.04, 0.08, 0.05, "turbo diverged in 6.00% .*4.00% to 8.00%.* above the 5.00% .*may be chance"),
        (0.08, 0.06, 0.1, 0.05, "turbo diverged in 8.00% .*6.00% to 10.00%.* promises: calibrate it on prompts like"),
    ],
)
def test_a_broken_promise_is_said(
    divergence: float, low: float | None, high: float | None, promised: float | None, said: str | None
) -> None:
    found = bench.broken_promise(
        row(divergence=divergence, divergence_low=low, divergence_high=high, divergence_promised=promised)
    )
    assert (found is None) if said is None else re.search(said, found or "")


def shown_texts(axes: Axes) -> Iterator[Text]:
    yield from axes.texts
    for axis in (axes.xaxis, axes.yaxis):
        yield axis.label
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        yield from (tick.label1 for tick in ticks if tick.label1.get_visible())


@pytest.mark.parametrize("depths", [1, 10, 24, 64])
def test_texts_of_the_plot_are_apart(depths: int) -> None:
    """Methods that are equally fast and equally exact, with intervals of one another's place."""
    kept = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, *[0.1] * 58][:depths]
    rows = [
        row(method=method, speedup=1.5, speedup_low=1.4, speedup_high=1.6, kept_by_depth=kept) for method in METHODS
    ]
    drawn = bench_view.figure(rows)
    drawn.draw_without_rendering()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for axes in drawn.axes
        for text in shown_texts(axes)
        if text.get_text()
    ]
    assert {name for name, _ in boxes} >= {*METHODS, "70"}
    assert not [(a, b) for (a, at), (b, other) in itertools.combinations(boxes, 2) if at.overlaps(other)]
    assert not [name for name, box in boxes if box.x0 < 0 or box.x1 > drawn.bbox.x1 or box.y0 < 0]


# --- rounds ---------------------------------------------------------------------------------------------------------


class Decoder:
    """A model that is a list of what each method takes, by the clock that it turns."""

    limits: Mapping[str, float] = {}
    methods = ("autoregressive", "premium", "turbo")
    prefill_chunk = 64
    target = None

    def __init__(self, seconds: Mapping[str, float], hiccups: Mapping[int, float], precision: str = "int8") -> None:
        """Sets the clock to zero.

        Args:
            seconds: that an answer takes, by method.
            hiccups: seconds that an answer takes besides, by its number.
        """
        self.now, self.seconds, self.hiccups = 0.0, seconds, hiccups
        self.asked: list[str] = []
        self.precision, self.cached = precision, 0

    def prompt_cache(self, num_bytes: int) -> set[tuple[int, ...]]:
        assert num_bytes > 0
        return set()

    def generate(
        self, requests: Sequence[Request], *, prompt_cache: set[tuple[int, ...]] | None = None, watch: object = None
    ) -> list[Output]:
        for request in requests:
            if prompt_cache is not None:
                assert request.params.max_tokens == 1 or request.prompt_ids in prompt_cache, "it was not met before"
                prompt_cache.add(request.prompt_ids)
                self.cached += request.params.max_tokens == 1
            # No two prompts speed turbo up alike: there is always an interval.
            share = 1 + 0.01 * (request.prompt_ids[0] % 3 - 1) if request.method == "turbo" else 1.0
            self.now += self.seconds[request.method] * share
            self.now += self.hiccups.get(len(self.asked), 0.0)
            self.asked.append(request.method)
        counters = Counters(emitted=5, drafted=4, judged=4, accepted=2, trusted=1, rolled_back=1, target_passes=2)
        counters.passes_by_kept.update([1, 2])
        return [Output("w", (1, 2, 3, 4, 5), "length", counters) for _ in requests]


def never(precision: str) -> LLM:
    raise AssertionError(f"{precision} is not asked for")


def compare(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, *, rounds: int, half_width: float, batch: int = 1
) -> list[bench.MethodRow]:
    monkeypatch.setattr("ssv.ab.bench.time.perf_counter", lambda: decoder.now)
    monkeypatch.setattr("ssv.runtime.decode.audit.audit", lambda *_: Audit(0, 0))
    return bench.compare(
        ways(decoder, ["autoregressive", "turbo"], [], never),  # type: ignore[arg-type]
        [(length,) for length in range(1, 7)],
        SamplingParams(),
        batch=batch,
        rounds=rounds,
        half_width=half_width,
        num_draft_tokens=5,
        price_per_hour=None,
        report=silent,
    )


SPEEDS = {"autoregressive": 2.0, "turbo": 1.0}
WARM_UP = 2
ROUND = 12


def test_no_further_round_once_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(SPEEDS, {})
    _, turbo = compare(monkeypatch, decoder, rounds=5, half_width=0.05)
    assert len(decoder.asked) == WARM_UP + ROUND
    assert turbo.speedup == pytest.approx(2.0, rel=1e-3)
    assert turbo.speedup_by_round == [turbo.speedup]
    assert turbo.speedup_low is not None and turbo.speedup_high is not None
    assert 1.9 <= turbo.speedup_low <= 2.0 <= turbo.speedup_high <= 2.1
    assert bench.rounds_disagree(turbo, 0.05) is None


def test_a_hiccup_is_diluted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest method stands still for a while in the first round."""
    decoder = Decoder(SPEEDS, {})
    compare(monkeypatch, decoder, rounds=1, half_width=0.05)
    hit = next(number for number in range(WARM_UP, len(decoder.asked)) if decoder.asked[number] == "turbo")
    decoder = Decoder(SPEEDS, {hit: 6.0})
    _, alone = compare(monkeypatch, decoder, rounds=1, half_width=0.05)
    decoder = Decoder(SPEEDS, {hit: 6.0})
    _, turbo = compare(monkeypatch, decoder, rounds=4, half_width=0.05)
    assert len(decoder.asked) == WARM_UP + 4 * ROUND
    # Nothing is discarded: with turbo one of 6 prompts took some 7 s instead of 1 s, and in four rounds 10 s instead of
    # 4 s.
    assert alone.speedup == pytest.approx(2 * (1 / 7) ** (1 / 6), rel=1e-3)
    assert turbo.speedup == pytest.approx(2 * (4 / 10) ** (1 / 6), rel=1e-3)
    assert turbo.speedup_by_round == pytest.approx([alone.speedup, 2.0, 2.0, 2.0], rel=1e-3)
    # By the sums it would have been half of what it is, and 1.6x after four rounds.
    assert alone.speedup > 12 / 12 and turbo.speedup > 48 / 30
    assert alone.speedup_low is not None and turbo.speedup_low is not None
    assert turbo.speedup_low > alone.speedup_low
    said = bench.rounds_disagree(turbo, 0.05)
    assert said is not None and "rounds disagree on turbo: 1.45x to 2.00x in 4 rounds" in said
    assert bench.rounds_disagree(alone, 0.05) is None


def test_the_interval_is_that_of_the_prompts_sums_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(SPEEDS, {5: 1.0, 17: 0.5, 30: 2.0})
    _, turbo = compare(monkeypatch, decoder, rounds=3, half_width=1e-9)
    seconds: dict[str, list[float]] = {"autoregressive": [0.0] * 6, "turbo": [0.0] * 6}
    seen = dict.fromkeys(seconds, 0)
    for number, method in enumerate(decoder.asked[WARM_UP:], WARM_UP):
        prompt = seen[method] % 6
        share = 1 + 0.01 * ((prompt + 1) % 3 - 1) if method == "turbo" else 1.0
        seconds[method][prompt] += SPEEDS[method] * share + decoder.hiccups.get(number, 0.0)
        seen[method] += 1
    tokens = [15.0] * 6
    expected = mean_ratio_interval(tokens, seconds["autoregressive"], tokens, seconds["turbo"], level=0.95)
    assert (turbo.speedup, turbo.speedup_low, turbo.speedup_high) == pytest.approx(
        (1 + expected.estimate, 1 + expected.low, 1 + expected.high)
    )


def test_a_single_group_has_no_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = Decoder(SPEEDS, {})
    rows = compare(monkeypatch, decoder, rounds=2, half_width=0.5, batch=6)
    assert len(decoder.asked) == WARM_UP + 2 * ROUND  # what has no interval is not narrow
    assert (rows[1].speedup_low, rows[1].speedup_high) == (None, None)
    bench_view.print_tables(rows, priced=False)
    assert re.search(r"turbo .* 2\.00x . +- ", capsys.readouterr().out)


def test_methods_take_turns_at_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(SPEEDS, {})
    compare(monkeypatch, decoder, rounds=2, half_width=1e-9)
    asked = decoder.asked[WARM_UP:]
    first = [asked[number] for number in range(0, len(asked), 2)]
    assert first[:6] == ["autoregressive", "turbo"] * 3
    assert first[6:] == ["turbo", "autoregressive"] * 3  # the same prompt has another first method


def test_kept_tokens_by_depth_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(monkeypatch, Decoder(SPEEDS, {}), rounds=1, half_width=0.5)
    assert rows[1].kept_by_depth == [1.0, 0.5]
    bench_view.print_tables(rows, priced=False)
    assert re.search(r"turbo +. 100% . +50%", capsys.readouterr().out)


# --- rows beside the methods ----------------------------------------------------------------------------------------


def test_rows_of_other_precisions_and_of_the_prompt_cache() -> None:
    base, int4 = Decoder({}, {}), Decoder({}, {}, "int4")
    loaded: list[str] = []

    def load(precision: str) -> Decoder:
        loaded.append(precision)
        return int4

    found = ways(base, ["autoregressive", "turbo"], ["int8", "int4", "prompt-cache"], load)  # type: ignore[arg-type]
    assert [(way.name, way.method, way.llm) for way in found] == [
        ("autoregressive", "autoregressive", base),
        ("turbo", "turbo", base),
        ("autoregressive, int4", "autoregressive", int4),
        ("premium, int4", "premium", int4),
        ("autoregressive, prompt-cache", "autoregressive", base),
        ("premium, prompt-cache", "premium", base),
    ]
    assert loaded == ["int4"]  # int8 is what is there
    assert [way.cache is not None for way in found] == [False] * 4 + [True] * 2
    assert found[4].cache is not found[5].cache
    base.methods = ("autoregressive",)
    assert [way.name for way in ways(base, ["autoregressive"], ["prompt-cache"], never)] == [  # type: ignore[arg-type]
        "autoregressive",
        "autoregressive, prompt-cache",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ()),
        (["--methods", "premium"], ()),
        (["--methods", "all"], ("int8", "int4", "prompt-cache")),
        (["--methods", "all", "--device", "cuda"], ("prompt-cache",)),
        (["--methods", "all", "--engine", "tensorrt"], ("prompt-cache",)),
        (["--methods", "all", "--also", "bf16"], ("bf16",)),
        (["--also", "prompt-cache, int4,int4"], ("prompt-cache", "int4")),
    ],
)
def test_what_has_rows_beside_the_methods(options: list[str], expected: tuple[str, ...]) -> None:
    args = bench._parser().parse_args(["--bundle", "b", "--prompts", "p", *options])
    assert tuple(bench._beside(args)) == expected


def test_what_fills_the_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder({"autoregressive": 2.0, "premium": 1.0}, {})
    monkeypatch.setattr("ssv.ab.bench.time.perf_counter", lambda: decoder.now)
    monkeypatch.setattr("ssv.runtime.decode.audit.audit", lambda *_: Audit(0, 0))
    compared = ways(decoder, ["autoregressive"], ["prompt-cache"], never)  # type: ignore[arg-type]
    rows = bench.compare(
        compared, [(1,), (2,), (3,)], SamplingParams(), batch=1, rounds=1, half_width=0.05, num_draft_tokens=5,
        price_per_hour=None, report=silent,
    )  # fmt: skip
    assert [(row.method, row.speedup) for row in rows] == [
        ("autoregressive", 1.0),
        ("autoregressive, prompt-cache", 1.0),
        ("premium, prompt-cache", 2.0),
    ]
    assert decoder.cached == 2 * (1 + 3)  # the warm-up's, and each prompt's


def test_the_table_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(write_recipe(tmp_path, heads=True), tmp_path / "bundle")
    (tmp_path / "system.txt").write_text(" ".join(f"w{i % 90}" for i in range(80)))
    words = ("--methods", "all", "--num-prompts", "3", "--rounds", "1", "--system-prompt", str(tmp_path / "system.txt"))
    assert run_bench(tmp_path, *words) == 0
    out = capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    both = [
        f"{method}, {name}" for name in ("int8", "int4", "prompt-cache") for method in ("autoregressive", "premium")
    ]
    assert list(rows) == [method for method in bench.METHODS if method != "medusa-typical"] + both
    assert {name: row["precision"] for name, row in rows.items() if row["precision"] != "fp32"} == {
        name: name.split(", ")[1] for name in both if "cache" not in name
    }
    for name, row in rows.items():
        assert row["cached_tokens"] == (3 * 64 if "prompt-cache" in name else 0)
        if "prompt-cache" in name:
            assert row["identical"] == 1.0 and row["divergence"] == 0.0
        if "int4" in name:
            assert row["divergence"] > 0 and row["divergence_promised"] is None
    assert rows["premium, int4"]["divergence"] == rows["autoregressive, int4"]["divergence"]
    assert out.count("TTFT ms") == 2 and "found nothing in its cache" not in out


def test_a_cache_that_found_nothing_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--methods", "premium", "--also", "prompt-cache", "--num-prompts", "2", "--rounds", "1")
    assert run_bench(folder, *options) == 0
    said = capsys.readouterr().out
    assert "note: premium, prompt-cache found nothing in its cache: no prompt has more than the 64 tokens" in said
    assert said.count("TTFT ms") == 1  # of all methods, with what comes after it
