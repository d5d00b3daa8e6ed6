"""What a server counts, how it is shown, and that it is still there when a process is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_text import Series, families, samples

from ssv.runtime.counters import Counters, GpuUse
from ssv.runtime.decode.generator import Load
from ssv.runtime.decode.prompt_cache import CacheStats
from ssv.runtime.methods import METHODS
from ssv.runtime.request import Audit
from ssv.runtime.serving.board import Board
from ssv.runtime.serving.live_audit import Standing
from ssv.runtime.serving.metrics import (
    COUNTERS,
    GAUGES,
    GPU_GAUGES,
    HISTOGRAMS,
    INVALID,
    REFUSED,
    REQUESTS,
    RESTARTS,
    RUNNING,
    STANDINGS,
    Admission,
    Metrics,
    Reader,
    Refusal,
    boards_folder,
)

NAMES = {*COUNTERS, *GAUGES, *HISTOGRAMS, REQUESTS[0], REFUSED[0], INVALID[0], RUNNING[0], RESTARTS[0], *STANDINGS}
ANSWER = Counters(prompt_tokens=5, emitted=11, judged=9, accepted=7, target_passes=4, target_tokens=13)


def answer(first: float = 0.25, total: float = 2.25, queue: float = 0.125, emitted: int = 11) -> Counters:
    counters = Counters(emitted=emitted, first_token_s=first, total_s=total, queue_s=queue)
    if emitted == 0:
        return ANSWER + counters
    return Counters(1, 5, 0, emitted, 9, 9, 7, 0, 0, 2, 4, 13, queue, first, total)


def load(decoding: int = 0, joining: int = 0, waiting: int = 0) -> Load:
    return Load(decoding, joining, waiting, CacheStats(0, 0, 0, 0, 0))


def of(name: str, **labels: str) -> Series:
    return name, frozenset(labels.items())


# Boards


def test_a_board_goes_on_where_it_was(tmp_path: Path) -> None:
    Board("ab", tmp_path / "board").add("b", 2.5)
    again = Board("ab", tmp_path / "board")
    again.add("b")
    assert (again.get("a"), again.get("b")) == (0, 3.5)
    assert Board("ab", tmp_path / "board").get("b") == 3.5


def test_a_board_of_other_keys_is_refused(tmp_path: Path) -> None:
    Board("ab", tmp_path / "board")
    with pytest.raises(ValueError, match="has 16 bytes, not 24"):
        Board("abc", tmp_path / "board")


def test_threads_lose_nothing() -> None:
    board = Board("a")
    threads = [threading.Thread(target=lambda: [board.add("a") for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.get("a") == 20000


def test_what_a_killed_process_has_counted_is_there(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib; from ssv.runtime.serving.metrics import Metrics\n"
        "metrics = Metrics(pathlib.Path(sys.argv[1]), 'ssv')\n"
        "[metrics.refused('full') for _ in range(1234)]\n"
        "[metrics.taken('turbo') for _ in range(3)]\n"
        "metrics.ended('turbo', 'stop')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    reader = Reader(tmp_path)
    assert reader.get("ssv_requests_refused", reason="full") == 1234
    assert reader.get("ssv_requests_running", tier="turbo") == 2
    # Whoever supervises it says that it is dead: what it had taken has ended, and its successor begins with nothing.
    Metrics(tmp_path, "ssv").died()
    assert reader.get("ssv_requests", tier="turbo", reason="error") == 2
    assert reader.get("ssv_requests", tier="turbo", reason="stop") == 1
    assert reader.get("ssv_requests_running", tier="turbo") == 0


def test_processes_are_summed(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for process, times in (("preprocessing", 2), ("ssv", 3), ("serve", 4)):
        metrics = Metrics(tmp_path, process)
        for _ in range(times):
            metrics.refused("draining")
    assert reader.get("ssv_requests_refused", reason="draining") == 9
    assert samples(reader.text())[of("ssv_requests_refused", reason="draining")] == 9


def test_the_folder_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSV_BOARDS", raising=False)
    assert boards_folder() is None
    monkeypatch.setenv("SSV_BOARDS", "/a b")
    assert boards_folder() == Path("/a b")


def test_without_a_folder_a_process_counts_for_itself() -> None:
    metrics = Metrics()
    metrics.taken("premium")
    metrics.ended("premium", "stop")


# Exposition


def test_a_gpu_is_shown_where_there_is_one(tmp_path: Path) -> None:
    metrics, reader = Metrics(tmp_path, "ssv"), Reader(tmp_path)
    assert "ssv_gpu" not in reader.text()
    metrics.gpu(GpuUse(reserved=5 << 30, peak=6 << 30, in_use=7 << 30, graphs=31))
    found = {name: value for (name, _), value in samples(reader.text()).items() if name in GPU_GAUGES}
    assert found == {
        "ssv_gpu_memory_reserved_bytes": 5 << 30,
        "ssv_gpu_memory_reserved_peak_bytes": 6 << 30,
        "ssv_gpu_memory_used_bytes": 7 << 30,
        "ssv_gpu_graphs": 31,
    }
    metrics.died()
    assert "ssv_gpu" not in reader.text()


def test_every_family_is_there_from_the_start(tmp_path: Path) -> None:
    """A rate wants the zero before the first one."""
    Metrics(tmp_path, "ssv")
    text = Reader(tmp_path).text()
    types = families(text)
    assert types.keys() == NAMES
    assert all(f"# HELP {name} " in text for name in NAMES)
    assert {name for name, kind in types.items() if kind == "histogram"} == set(HISTOGRAMS)
    assert {name for name, kind in types.items() if kind == "gauge"} == {*GAUGES, RUNNING[0], *STANDINGS}
    assert set(samples(text).values()) == {0}


def test_histograms_keep_to_the_format(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "ssv")
    for first in (0.004, 0.25, 0.26, 1000.0):
        metrics.taken("premium")
        metrics.finished("premium", "stop", answer(first, first + 2))
    found = samples(Reader(tmp_path).text())
    name = "ssv_time_to_first_token_seconds"
    buckets = {
        dict(labels)["le"]: value
        for (series, labels), value in found.items()
        if series == f"{name}_bucket" and ("tier", "premium") in labels
    }
    bounds = [float(bound) for bound in buckets]
    assert bounds == sorted(bounds) and bounds[-1] == float("inf")
    assert list(buckets.values()) == sorted(buckets.values()), "buckets are cumulative"
    assert (buckets["0.005"], buckets["0.1"], buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (1, 1, 2, 3, 4)
    assert found[of(f"{name}_count", tier="premium")] == 4
    assert found[of(f"{name}_sum", tier="premium")] == pytest.approx(1000.514)
    # Ten tokens after the first in two seconds.
    assert found[of("ssv_time_per_output_token_seconds_bucket", le="0.1", tier="premium")] == 0
    assert found[of("ssv_time_per_output_token_seconds_bucket", le="0.25", tier="premium")] == 4


# What counts as what


def test_an_answered_request() -> None:
    metrics, tier = Metrics(), "balanced"
    metrics.taken(tier)
    metrics.finished(tier, "length", answer())
    board = metrics._board

    def of(name: str, **labels: str) -> float:
        return board.get((name, tuple(sorted({"tier": tier, **labels}.items()))))

    assert of("ssv_requests", reason="length") == 1
    assert of("ssv_requests_running") == 0
    assert (of("ssv_tokens_emitted"), of("ssv_prompt_tokens"), of("ssv_tokens_verified")) == (11, 5, 9)
    assert (of("ssv_first_token_seconds"), of("ssv_request_seconds")) == (0.25, 2.25)
    assert of("ssv_request_queue_time_seconds_sum") == 0.125


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_times_are_of_answered_requests_alone(reason: str) -> None:
    """A request that was given up before its first token has none, which is not zero seconds."""
    metrics = Metrics()
    metrics.taken("premium")
    metrics.finished("premium", reason, Counters(prompt_tokens=5, total_s=3.0))
    for name in HISTOGRAMS:
        assert metrics._board.get((f"{name}_count", (("tier", "premium"),))) == 0
    for name in ("ssv_first_token_seconds", "ssv_request_seconds"):
        assert metrics._board.get((name, (("tier", "premium"),))) == 0
    assert metrics._board.get(("ssv_prompt_tokens", (("tier", "premium"),))) == 5


def test_one_token_has_no_time_between_tokens() -> None:
    metrics = Metrics()
    metrics.taken("premium")
    metrics.finished("premium", "length", answer(emitted=1))
    counts = {name: metrics._board.get((f"{name}_count", (("tier", "premium"),))) for name in HISTOGRAMS}
    assert counts.pop("ssv_time_per_output_token_seconds") == 0
    assert set(counts.values()) == {1}


def test_refusals_and_mistakes_are_no_errors(tmp_path: Path) -> None:
    metrics, reader = Metrics(tmp_path, "ssv"), Reader(tmp_path)
    metrics.refused("full")
    metrics.invalid()
    metrics.taken("turbo")
    metrics.withdrawn("turbo")
    assert reader.get("ssv_requests_refused", reason="full") == reader.get("ssv_requests_invalid") == 1
    requests = [value for (name, _), value in samples(reader.text()).items() if name == "ssv_requests"]
    assert requests and not any(requests)
    assert all(reader.get("ssv_requests_running", tier=tier) == 0 for tier in METHODS)


def test_audits_and_load(tmp_path: Path) -> None:
    metrics, reader = Metrics(tmp_path, "ssv"), Reader(tmp_path)
    metrics.audited(Audit(strict=2, margin=1), "turbo", 30)
    metrics.load(load(decoding=3, joining=1, waiting=2))
    assert reader.get("ssv_audited_requests", tier="turbo") == 1
    assert reader.get("ssv_audited_tokens", tier="turbo") == 30
    assert reader.get("ssv_audit_mismatches", tier="turbo") == 2
    found = [reader.get(f"ssv_requests_{what}") for what in ("decoding", "joining", "waiting")]
    assert found == [3, 1, 2] and reader.get("ssv_engine_alive") == 1
    metrics.load(load(), alive=False)
    assert reader.get("ssv_engine_alive") == 0


def test_how_tiers_stand(tmp_path: Path) -> None:
    """A tier that is withdrawn is so too while the process is started again that has found it."""
    metrics, reader = Metrics(tmp_path, "ssv"), Reader(tmp_path)
    metrics.stands("turbo", Standing(evidence=123.5, is_withdrawn=True))
    metrics.died()
    assert reader.get("ssv_audit_evidence", tier="turbo") == 123.5
    assert reader.get("ssv_tier_withdrawn", tier="turbo") == 1
    assert reader.get("ssv_tier_withdrawn", tier="balanced") == 0
    Metrics(tmp_path, "ssv").stands("turbo", Standing(evidence=1.0, is_withdrawn=False))
    assert reader.get("ssv_tier_withdrawn", tier="turbo") == 0


# Who is let in


@pytest.mark.parametrize(
    ("decoding", "waiting", "is_full"),
    [(0, 0, False), (2, 0, False), (2, 3, False), (2, 4, True), (2, 9, True), (1, 4, False)],
)
def test_a_full_server_refuses(decoding: int, waiting: int, is_full: bool, tmp_path: Path) -> None:
    Metrics(tmp_path, "ssv").load(load(decoding, 0, waiting))
    admission = Admission(tmp_path, max_rows=2, max_waiting=4)
    if not is_full:
        admission.check()
        return
    with pytest.raises(Refusal, match=f"{waiting} requests are waiting already: try again later") as raised:
        admission.check()
    assert raised.value.reason == "full"


def test_a_server_without_a_queue_is_full_with_its_rows(tmp_path: Path) -> None:
    Metrics(tmp_path, "ssv").load(load(decoding=2))
    with pytest.raises(Refusal):
        Admission(tmp_path, max_rows=2, max_waiting=0).check()


def test_a_draining_server_refuses(tmp_path: Path) -> None:
    admission = Admission(tmp_path, 2, 4)
    admission.check()
    Metrics(tmp_path, "serve").drain()
    with pytest.raises(Refusal, match="shutting down: try another one") as raised:
        admission.check()
    assert raised.value.reason == "draining"


def test_without_a_folder_everybody_is_let_in() -> None:
    Admission(None, 1, 0).check()
