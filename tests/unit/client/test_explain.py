"""`--explain`: each token with its mark, a line for each pass, and what was saved."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from changed_logits import make_llm
from lettered import NUM_TOKENS, lettered
from rich.console import Console

from ssv.client.cli import main
from ssv.client.explain import MOST_BRANCHES, Explanation
from ssv.runtime.fates import FateEntry
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_of
from ssv.runtime.request import Fate, Request, SamplingParams


def entry(token: str, fate: Fate, target_pass: int, *dropped: list[str]) -> FateEntry:
    data = list(token.encode())
    return {"token": token, "bytes": data, "fate": fate, "pass": target_pass, "risk": None, "dropped": [*dropped]}


def shown(*pushes: list[FateEntry], passes: int = 2, **console: Any) -> list[str]:
    out = io.StringIO()
    explanation = Explanation(Console(file=out, highlight=False, **console))
    for push in pushes:
        explanation.push(push)
    explanation.close(passes, "lossless")
    return out.getvalue().splitlines()


def test_a_line_is_a_pass_however_it_comes() -> None:
    entries = [
        entry("Rain", "target", 0),
        entry("bow", "accepted", 1, [" s", "x"], ["y"]),
        entry(" is", "corrected", 1, [" a"]),
        entry(" a", "trusted", 2),
        entry("\n", "typical", 2),
    ]
    lines = shown(entries)
    assert lines == shown(*([each] for each in entries))
    assert lines[:3] == ["   0  .Rain", "   1  +bow[·s/x|y] !·is[·a]", "   2  ~·a %\\n"]
    assert [line.split()[:2] for line in lines[3:-1]] == [["+", "1"], ["%", "1"], ["~", "1"], ["!", "1"], [".", "1"]]
    assert lines[-1] == "5 tokens, 2 passes of the target: 2 saved (50%); lossless"


def test_what_is_dropped_is_bounded() -> None:
    branches = [[str(i)] for i in range(MOST_BRANCHES + 2)]
    assert shown([entry("x", "corrected", 1, *branches)])[0] == "   1  !x[0|1|2|2 more]"
    assert shown([entry("x", "corrected", 1, *branches[:MOST_BRANCHES])])[0] == "   1  !x[0|1|2]"


def test_no_token_is_a_command_to_the_terminal() -> None:
    line = shown([entry("\x1b[31m[bold]\r", "target", 0)])[0]
    assert line == r"   0  .\x1b[31m[bold]\r"


def test_lines_are_not_broken_and_colours_are_for_terminals() -> None:
    many = [entry(f" word{i}", "trusted", 1) for i in range(60)]
    assert shown(many, width=40)[0].count("~") == 60
    assert "\x1b" not in "".join(shown(many))
    assert "\x1b[33m" in shown(many, force_terminal=True, color_system="standard")[0]


def test_nothing_and_one_token() -> None:
    assert shown(passes=0) == ["0 tokens, 0 passes of the target: 0 saved; lossless"]
    assert shown([entry("x", "target", 0)], passes=0)[-1] == "1 tokens, 0 passes of the target: 0 saved; lossless"


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> LLM:
    made = make_llm(tokenizer=lettered(), vocab_size=NUM_TOKENS, heads=False, agreement=0.9)
    made.limits["turbo"] = 0.05
    monkeypatch.setattr("ssv.runtime.llm.load_for", lambda args: made)
    return made


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("premium", "lossless: plain decoding's text"),
        ("turbo", "divergence of at most 5.0% on prompts like those calibrated on"),
    ],
)
def test_the_command_shows_the_answer_that_it_would_have_printed(
    llm: LLM, method: str, bound: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[FateEntry] = []
    push = Explanation.push
    monkeypatch.setattr(Explanation, "push", lambda self, entries: (told.extend(entries), push(self, entries)))
    command = ["ab0", "--bundle", "anywhere", "--raw", "--max-tokens", "30", "--method", method]
    assert main([*command, "--explain"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary.endswith(bound)
    passes = [line for line in lines if re.match(r" +\d+  ", line)]
    assert [int(line.split()[0]) for line in passes] == list(range(len(passes)))
    request = Request(llm.tokenizer.encode("ab0"), method, SamplingParams(max_tokens=30))
    (output,) = llm.generate([request])
    assert policy_of(request, llm.tiers).lossless == (method == "premium")
    assert "".join(each["token"] for each in told if each["bytes"] is not None) == output.text
    assert len(told) == len(output.token_ids)


def test_without_it_the_command_prints_text(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab0", "--bundle", "anywhere", "--raw", "--max-tokens", "9"]) == 0
    (output,) = llm.generate([Request(llm.tokenizer.encode("ab0"), "premium", SamplingParams(max_tokens=9))])
    assert capsys.readouterr().out == f"{output.text}\n"
