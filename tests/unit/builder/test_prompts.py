"""The prompts that are shipped to calibrate on."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

from ssv.builder.calibrate import check_num_prompts, prompts_needed
from ssv.builder.config import CalibrationConfig
from ssv.support.prompts import read_categorized, read_prompts

PROMPTS = ROOT / "builder" / "presets" / "prompts"
VARIED = PROMPTS / "varied.jsonl"
KEPT = tuple(ROOT / "benchmarks" / "prompts" / name for name in ("heldout.jsonl", "demo.jsonl"))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, length: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[i:] for i in range(length)), strict=False)


def test_the_file_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(PROMPTS / "write_varied.py"))
    assert VARIED.read_text() == "\n".join(script["lines"]()) + "\n"


def test_there_are_many_of_many_kinds_and_none_twice() -> None:
    prompts = read_categorized(VARIED)
    assert len(prompts) >= 1000 and len({prompt.text for prompt in prompts}) == len(prompts)
    counts = Counter(prompt.category for prompt in prompts)
    assert len(counts) >= 24 and min(counts.values()) >= 16
    assert {"code", "debug", "sql", "stem", "math", "logic", "table"} <= counts.keys()  # those that diverge most


def test_ranges_are_measured_on_the_same_prompts() -> None:
    written = read_prompts(PROMPTS / "calibration.jsonl")
    assert read_prompts(VARIED)[: len(written)] == written


def test_they_suffice_for_the_demos_limits() -> None:
    """With room for half as much divergence as the tightest limit allows."""
    settings = {
        "prompts_file": VARIED,
        "max_tokens": 48,
        "families": [(0.3, 0.5, 6), (0.4, 0.6, 10)],
        "accept_below": [0.1],
    }
    config = CalibrationConfig.model_validate(settings)
    count = len(read_prompts(VARIED))
    check_num_prompts(count, config)
    needed = prompts_needed(0.02, config, divergence=0.01)
    assert needed is not None and needed < count / 2


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_none_is_like_a_prompt_that_is_kept_for_measuring(kept: Path) -> None:
    """No seven words in a row are shared; of the runs of four words, which "Write a function that" is too, at most a
    third are those of any one kept prompt of more than a few words."""
    lines = [json.loads(line)["prompt"] for line in kept.read_text().splitlines()]
    sevens = {run for line in lines for run in runs(line, 7)}
    fours = [set(runs(line, 4)) for line in lines]
    for prompt in read_prompts(VARIED):
        assert not sevens & set(runs(prompt, 7)), prompt
        own = set(runs(prompt, 4))
        most = max(len(own & four) for four in fours)
        assert most <= max(1, len(own) / 3), prompt
