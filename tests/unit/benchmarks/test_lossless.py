"""`benchmarks/lossless.py`: what it compares, and that a text that is another one is found."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rounds import FakeRounds
from scripts import loaded
from tiny_bundle import build, write_recipe

from ssv.runtime.llm import LLM

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "lossless.py"
PROMPTS = 24


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(SCRIPT, monkeypatch)


def run(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[int, dict[str, Any]]:
    """The script's status and its record."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "record.json"
    texts = [" ".join(f"w{(5 * i + j) % 105}" for j in range(4 + i % 40)) for i in range(PROMPTS)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = {"--bundle": bundle, "--prompts": prompts, "--out": out, "--precision": "fp32", "--max-tokens": 8}
    words = [str(word) for pair in given.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["lossless.py", *words, "--threads", "1", *options])
    status: int = script.main()
    return status, json.loads(out.read_text())


def rounds_of(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[FakeRounds]:
    """Those of each `LLM` that is loaded from now on: its engines run rounds by themselves."""
    load, made = LLM.load, list[FakeRounds]()

    def with_rounds(*args: Any, **options: Any) -> LLM:
        llm = load(*args, **options)
        assert llm.draft is not None
        made.append(FakeRounds(llm.target, llm.draft, lambda num_rows, shape: pytest.fail("costs are flat")))
        llm.rounds = made[-1]
        return llm

    monkeypatch.setattr(script, "LLM", type("Loader", (), {"load": staticmethod(with_rounds)}))
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless")
    build(write_recipe(folder), folder / "bundle")
    return folder / "bundle"


def test_every_method_is_compared_beside_others_at_each_number_of_rows(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, record = run(script, bundle, tmp_path, monkeypatch, "--rows", "1,4", "--turns", "1", "--once")
    assert status == record["outputs_different"] == 0
    assert set(record["rows"]) == {"1", "4"}
    assert record["outputs_compared"] == 2 * PROMPTS
    for found in record["rows"].values():
        assert "trees_of_rounds_by_the_engines" not in found
        assert sum(sum(each["outputs"].values()) for each in found["methods"].values()) == PROMPTS
        assert all(each["outputs"] for each in found["methods"].values())


def test_rounds_of_engines_have_trees_of_many_sizes(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rounds_of(script, monkeypatch)
    options = ("--rows", "1,4", "--methods", "autoregressive,speculative,eagle,premium", "--turns", "3")
    status, record = run(script, bundle, tmp_path, monkeypatch, *options)
    assert status == record["outputs_different"] == 0
    assert record["outputs_compared"] == 2 * 3 * 2 * PROMPTS  # rows, turns, without the prompt and with it
    for rounds, (num_rows, found) in zip(made, record["rows"].items(), strict=True):
        seen = found["trees_of_rounds_by_the_engines"]
        assert seen["most_nodes"] > 8
        assert seen["different_sizes"] > 6
        assert {shape.samples for shape in rounds.shapes} == {False, True}, num_rows
        assert any(shape.tree is None for shape in rounds.shapes)
        assert any(not shape.is_chain for shape in rounds.shapes)


def test_a_text_that_is_another_one_is_found(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rounds_of(script, monkeypatch)
    take, calls = FakeRounds.take, Counter[int]()

    def wrong(rounds: FakeRounds) -> Any:
        results = take(rounds)
        calls[id(rounds)] += 1
        if rounds is made[1] and calls[id(rounds)] == 3:
            results[0] = results[0]._replace(tokens=[*results[0].tokens[:-1], 30 + results[0].tokens[-1] % 2])
        return results

    monkeypatch.setattr(FakeRounds, "take", wrong)
    options = ("--rows", "1,4", "--methods", "autoregressive,speculative", "--turns", "1", "--once")
    status, record = run(script, bundle, tmp_path, monkeypatch, *options)
    assert status == 1
    assert record["outputs_different"] == record["rows"]["4"]["outputs_different"] == 1


def test_trees_are_told_by_their_sizes(script: ModuleType) -> None:
    assert script.trees(Counter({0: 5, 1: 2, 3: 1, 8: 4, 64: 1, 5: 0})) == {
        "most_nodes": 64,
        "different_sizes": 4,
        "passes_by_nodes": {"0": 5, "1": 2, "2 to 3": 1, "8 to 15": 4, "32 to 64": 1},
    }


def test_a_lossy_method_is_refused(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(script.UserError, match="'turbo' is no lossless method"):
        run(script, bundle, tmp_path, monkeypatch, "--methods", "premium,turbo")
