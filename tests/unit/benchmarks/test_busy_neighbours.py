"""`benchmarks/busy_neighbours.py`, with processes and servers that stand for those that decode."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from scripts import loaded

from ssv.client.triton import ServerError

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "busy_neighbours.py"
WORKER = """
import json, sys
settings = json.loads(sys.stdin.readline())
print("ready", flush=True)
for line in sys.stdin:
    method, tokens = json.loads(line)
    print(10.0 * (settings["threads"] or 3), flush=True)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on two cores, with neighbours that are not there and workers that count."""
    module = loaded(SCRIPT)

    @contextmanager
    def nobody(number: int) -> Iterator[None]:
        yield

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(module, "_neighbours", nobody)
    monkeypatch.setattr(module, "WORKER", WORKER)
    monkeypatch.setattr(module, "Client", FakeClient)
    return module


class FakeClient:
    """A server that says at once what it is asked for, or nothing."""

    silent = False

    def __init__(self, url: str) -> None:
        assert url.startswith("grpc://")

    def stream(self, prompt: str, settings: Any, *, patience: float) -> Iterator[Any]:
        if self.silent:
            raise ServerError(f"no response came in {patience:g} s", "DEADLINE_EXCEEDED")
        yield SimpleNamespace(num_output_tokens=settings.max_tokens)

    def close(self) -> None:
        pass


def rows_of(module: ModuleType, tmp_path: Path, *options: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    out = tmp_path / "record.json"
    assert module.main(["--bundle", str(tmp_path), "--rounds", "2", "--out", str(out), *options]) == 0
    rows: Sequence[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return {(row["setting"], row["method"], row["neighbours"]): row for row in rows}


def test_settings_are_compared_with_the_fixed_number_alone(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, tmp_path)
    assert len(rows) == 3 * 2 * 3
    for method in ("autoregressive", "premium"):
        for number in (0, 1, 2):
            assert {name: rows[name, method, number]["of_fixed_idle"] for name in ("follows", "threads 1")} == {
                "follows": 1.5,
                "threads 1": 0.5,
            }
    assert all(row["rounds"] == 2 for row in rows.values())


@pytest.mark.parametrize("options", [("--settings", "follows,threads 1"), ("--neighbours", "1,2")], ids=str)
def test_what_others_are_compared_with_may_be_left_out(
    script: ModuleType, tmp_path: Path, options: tuple[str, ...]
) -> None:
    rows = rows_of(script, tmp_path, *options)
    assert rows and all(row["of_fixed_idle"] is None for row in rows.values())
    assert rows["follows", "premium", 1]["tokens_per_s"] == 30.0


def test_servers_are_compared_with_the_last_one(script: ModuleType, tmp_path: Path) -> None:
    urls = ("--url", "a=grpc://127.0.0.1:1", "--url", "b=grpc://127.0.0.1:2")
    rows = rows_of(script, tmp_path, "--settings", "", *urls, "--methods", "premium")
    assert {name for name, _, _ in rows} == {"server a", "server b"}
    assert rows["server b", "premium", 0]["of_fixed_idle"] == 1.0
    assert rows["server a", "premium", 2]["of_fixed_idle"] > 0


def test_when_time_is_over_every_number_of_neighbours_has_had_a_round(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, tmp_path, "--rounds", "1000000", "--seconds", "0")
    assert len(rows) == 3 * 2 * 3 and all(row["rounds"] == 1 for row in rows.values())


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (WORKER.replace("for line in sys.stdin:", "for line in ():"), "a process that decodes ended with status 0"),
        (WORKER.replace("for line in sys.stdin:", "sys.stdin.read()\nfor line in ():"), "no answer came in 0.5 s"),
        (WORKER.replace('"ready"', '"not ready"'), "the process of follows said 'not ready"),
    ],
    ids=["gone", "silent", "not ready"],
)
def test_a_process_that_does_not_answer_ends_the_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, said: str
) -> None:
    monkeypatch.setattr(script, "WORKER", worker)
    with pytest.raises(SystemExit, match=said):
        rows_of(script, tmp_path, "--patience", "0.5" if "0.5" in said else "60")


def test_a_server_that_does_not_answer_ends_the_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeClient, "silent", True)
    with pytest.raises(SystemExit, match="no response came in 7 s"):
        rows_of(script, tmp_path, "--settings", "", "--url", "a=grpc://127.0.0.1:1", "--patience", "7")


def test_nobody_to_ask_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nobody to ask"):
        rows_of(script, tmp_path, "--settings", "")
