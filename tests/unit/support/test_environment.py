"""The record of a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssv.support.environment import versions, write_record


def test_the_command_of_a_record_can_be_run_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/x.py", "--settings", "follows,threads 1", "--none", "", "--n", "3"])
    write_record({"speed": 1.5}, tmp_path / "record.json", versions("no-such-package"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"] == "python benchmarks/x.py --settings 'follows,threads 1' --none '' --n 3"
    assert (record["speed"], record["versions"]["no-such-package"]) == (1.5, "-")
    assert json.loads(capsys.readouterr().out) == record
