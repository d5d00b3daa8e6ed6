"""What `ssv-build calibrate` and `ssv-build profile` make of their options, and what they say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_bundle import COSTS, Calibrator, build, write_recipe

from ssv.builder import cli
from ssv.builder.calibrate import Calibration
from ssv.builder.config import CalibrationConfig
from ssv.bundle.manifest import file_entry, read_manifest
from ssv.bundle.profile import Conditions
from ssv.runtime.llm import LLM


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    build(write_recipe(folder), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[CalibrationConfig]:
    """What calibrations were asked for; prompts of two kinds, of which one diverges."""
    found: list[CalibrationConfig] = []

    def calibrate_bundle(bundle: Path, config: CalibrationConfig, report: object, **_: object) -> Calibration:
        found.append(config)
        made = Calibrator()(bundle, config, report)  # type: ignore[arg-type]
        for trial in made.tiers.values():
            trial.by_category.update({"code": (150, 1000, 20), "": (50, 500, 0)})
        return made

    monkeypatch.setattr(cli, "calibrate_bundle", calibrate_bundle)
    return found


def calibrate(bundle: Path, *options: str) -> int:
    recipe, out = bundle.parent / "recipe.yaml", bundle.parent / "calibration.json"
    return cli.main(["calibrate", str(recipe), "--bundle", str(bundle), "--out", str(out), *options])


def test_limits_and_confidence_of_the_command_line(bundle: Path, asked: list[CalibrationConfig]) -> None:
    assert calibrate(bundle) == 0
    assert calibrate(bundle, "--max-divergence", "0.03", "--confidence", "0.9") == 0
    assert calibrate(bundle, "--max-divergence", "turbo=0.2", "--max-divergence", "balanced=0.1") == 0
    assert [(config.limits, config.confidence) for config in asked] == [
        ({"balanced": 0.02, "turbo": 0.05}, 0.95),
        ({"balanced": 0.03, "turbo": 0.05}, 0.9),
        ({"balanced": 0.1, "turbo": 0.2}, 0.95),
    ]


def test_all_prompts_of_a_given_file_are_decoded(bundle: Path, asked: list[CalibrationConfig]) -> None:
    path = bundle.parent / "own.jsonl"
    lines = (bundle.parent / "prompts.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[:180]) + "\n")
    assert calibrate(bundle, "--prompts", str(path)) == 0
    assert asked[0].prompts_file == path and asked[0].num_prompts is None
    document = json.loads((bundle.parent / "calibration.json").read_text())
    assert (document["prompts"]["name"], document["prompts"]["count"]) == ("own.jsonl", 180)


def test_the_file_says_what_its_bounds_stand_on(bundle: Path, asked: list[CalibrationConfig]) -> None:
    calibrate(bundle, "--confidence", "0.9")
    document = json.loads((bundle.parent / "calibration.json").read_text())
    assert document["bound"]["kind"] == "finite-sample" and "betting" in document["bound"]["method"]
    assert document["settings"]["confidence"] == 0.9 and document["prompts"]["count"] == 200
    assert document["date"].count("-") == 2
    known = read_manifest(bundle).calibration
    assert known is not None
    assert (known.num_prompts, known.confidence, known.bound_kind) == (200, 0.95, "finite-sample")
    assert known.date is not None


def test_divergence_is_shown_by_category(
    bundle: Path, asked: list[CalibrationConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(bundle)
    captured = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in captured.err.splitlines() if "│" in line]
    assert ["code", "150", "2.00%", "2.00%"] in rows and ["-", "50", "0.00%", "0.00%"] in rows
    assert json.loads(captured.out)["turbo"]["by_category"]["code"] == [150, 1000, 20]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-divergence", "0.0001"], r"200 prompts are too few to show, .* balanced .* 0\.0001"),
        (["--max-divergence", "fast=0.1"], "balanced' or 'turbo"),
        (["--max-divergence", "much"], "limits.balanced"),
        (["--confidence", "1"], "confidence"),
        (["--prompts", "nowhere.jsonl"], r"nowhere\.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_refused_first(
    bundle: Path, asked: list[CalibrationConfig], capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert calibrate(bundle, *options) == 2
    assert re.search(said, capsys.readouterr().err) and not asked


@pytest.mark.parametrize("missing", [0.05, 1.3])
def test_a_profile_of_a_busy_machine_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: float
) -> None:
    conditions = Conditions(missing_cores=missing, spread=1.1)
    costs = COSTS.model_copy(update={"conditions": conditions})
    monkeypatch.setattr(LLM, "measure_costs", lambda self, **_: costs)
    assert cli.main(["profile", "--bundle", str(bundle)]) == 0
    assert list(read_manifest(bundle).profiles.values()) == [costs]
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == (missing > 1)
    if warned:
        assert "other processes took 1.3 of the cores" in warned[0] and "repeat this on an idle machine" in warned[0]
        assert cli.main(["inspect", "--bundle", str(bundle)]) == 0
        assert "may be wrong, as other processes took 1.3" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_what_came_true_by_rank_and_depth(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--bundle", str(bundle)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (at,) = [i for i, line in enumerate(lines) if "greedy" in line]
    assert [word for word in lines[at] if word.isalnum()] == ["greedy", "depth", "1", "depth", "2"]
    assert lines[at + 2][-4:-1] == ["62%", "75%", "40"]
    assert cli.main(["inspect", "--bundle", str(bundle), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["reliability_by_depth"]
    assert (row["rank"], row["depth"], row["corrected"], row["chosen"]) == (0, 2, 0.625, 0.75)


@pytest.mark.parametrize(("rows", "said"), [([{"rank": 0}], "depth: Field required"), (7, "not iterable")])
def test_a_damaged_table_is_an_error(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: object, said: str
) -> None:
    """Of a file that the manifest has the hash of: whoever wrote it wrote both."""
    shutil.copytree(bundle, tmp_path / "bundle")
    path, manifest_path = tmp_path / "bundle/calibration.json", tmp_path / "bundle/manifest.json"
    path.write_text(json.dumps({"survival": {"reliability_by_depth": rows}}))
    manifest = json.loads(manifest_path.read_text())
    manifest["files"]["calibration.json"] = file_entry(path).model_dump()
    manifest_path.write_text(json.dumps(manifest))
    assert cli.main(["inspect", "--bundle", str(tmp_path / "bundle")]) == 2
    assert re.search(f"calibration.json is damaged .*{said}", capsys.readouterr().err)
