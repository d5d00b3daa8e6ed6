"""`benchmarks/structured_output.py`: what it takes for a failure, and what it counts as drafted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from scripts import loaded

SCRIPTS = Path(__file__).parents[3] / "benchmarks"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return loaded(SCRIPTS / "structured_output.py", monkeypatch)


@pytest.mark.parametrize(
    ("text", "reason", "lossless", "says"),
    [
        ('{"a": 1}', "stop", True, None),
        ('{"a": 2}', "stop", True, "plain decoding says"),
        ('{"a": 2}', "stop", False, None),
        ('{"a": "x"}', "stop", False, "not valid"),
        ('{"a": ', "stop", False, "no JSON"),
        ('{"a": NaN}', "stop", False, "no JSON"),
        ('{"a": ', "length", False, None),
        ("", "HTTP 500", False, "ended with HTTP 500"),
    ],
)
def test_what_an_answer_has_to_be(script: ModuleType, text: str, reason: str, lossless: bool, says: str | None) -> None:
    plain = script.Said('{"a": 1}', "stop", True)
    counts, failures = script._judged([script.Case("x", SCHEMA, 0)], [script.Said(text, reason, lossless)], [plain])
    kind = "failed" if says else "valid" if reason == "stop" else "length"
    assert counts[kind] == 1
    assert [failure["problem"].startswith(says) for failure in failures] == ([True] if says else [])


def test_a_stream_has_to_have_the_text_of_the_whole_answer_in_a_lossy_tier_too(script: ModuleType) -> None:
    whole = script.Said('{"a": 2}', "stop")
    cases, plain = [script.Case("x", SCHEMA, 0)], [script.Said('{"a": 1}', "stop")]
    counts, failures = script._judged(cases, [whole], plain, [whole])
    assert (dict(counts), failures) == ({"compared with the whole answer": 1, "valid": 1}, [])
    for other in (replace(whole, text='{"a": 3}'), replace(whole, reason="length")):
        _, (failure,) = script._judged(cases, [other], plain, [whole])
        assert failure["problem"].startswith("the whole answer is")


def test_places_with_several_drafted_tokens_are_those_of_a_tree(script: ModuleType) -> None:
    def entry(fate: str, *dropped: list[str]) -> dict[str, object]:
        return {"fate": fate, "dropped": list(dropped)}

    chain = [entry("target"), entry("accepted"), entry("trusted"), entry("corrected", ["x", "y"])]
    tree = [entry("accepted", ["x"], ["x", "z"]), entry("corrected", ["x"], ["y"]), entry("corrected", ["x"], ["x"])]
    metrics = {"speculative_decoding": {"num_spec_steps": 2, "num_draft_tokens": 9}}
    found = script._drafting(chain, metrics)
    assert found["places_with_several_drafted"] == 0
    assert (found["tokens"], found["kept"], found["trusted"], found["drafted"]) == (4, 2, 1, 9)
    assert script._drafting(tree, None)["places_with_several_drafted"] == 2
