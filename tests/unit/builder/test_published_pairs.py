"""The presets of pairs that people use: that each is a recipe, and fits the models that it names as they are published.

No weights of theirs are here. Their full sizes are compared without any, and a preset's whole preflight runs on models
of their shape whose widths are divided by 64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from published_configs import HEADS, MODELS
from safetensors.torch import save_file
from tiny import random_weight
from tiny_bundle import Calibrator, write_checkpoint

from ssv.builder import pair
from ssv.builder.cli import main
from ssv.builder.config import Recipe, RecipeError, TargetConfig, load_recipe
from ssv.bundle.policy import RESERVED_LENGTH
from ssv.model.checkpoint import CheckpointError, DecoderSpec, spec_from_hf_config
from ssv.model.draft import DraftSpec, Eagle3, check_fits
from ssv.model.eagle3 import tensor_shapes
from ssv.support.progress import silent

PRESETS = Path(pair.__file__).parent / "presets"
PAIRS = {
    "llama-3.3-70b-llama-3.2-1b": ("Llama-3.3-70B-Instruct", "Llama-3.2-1B-Instruct"),
    "llama-3.3-70b-eagle3": ("Llama-3.3-70B-Instruct", "EAGLE3-LLaMA3.3-Instruct-70B"),
    "llama-3.1-8b-eagle3": ("Llama-3.1-8B-Instruct", "EAGLE3-LLaMA3.1-Instruct-8B"),
    "qwen3-32b-qwen3-0.6b": ("Qwen3-32B", "Qwen3-0.6B"),
    "qwen3-8b-eagle3": ("Qwen3-8B", "Qwen3-8B_eagle3"),
}
any_pair = pytest.mark.parametrize("name", PAIRS)


def preset(name: str) -> Recipe:
    return load_recipe(PRESETS / f"{name}.yaml")


def head_spec(config: dict[str, Any], target: DecoderSpec) -> DraftSpec:
    """Of a head that taps the authors' default layers."""
    layer = spec_from_hf_config({**config, "architectures": ["LlamaForCausalLM"]})
    taps = (1, target.num_layers // 2 - 1, target.num_layers - 4)
    head_size = config["draft_vocab_size"]
    return DraftSpec("conditioned", layer, taps, head_size, Eagle3(target.hidden_size), own_lm_head=True)


@any_pair
def test_a_preset_names_its_pair(name: str) -> None:
    recipe, (target, draft) = preset(name), PAIRS[name]
    given = recipe.draft.folder if draft in HEADS else recipe.draft.checkpoint
    assert recipe.target.path is not None and given is not None
    assert (recipe.name, recipe.target.path.name, given.name) == (name, target, draft)


@any_pair
def test_published_sizes_fit(name: str) -> None:
    recipe, (target_name, draft_name) = preset(name), PAIRS[name]
    target = spec_from_hf_config(MODELS[target_name])
    if draft_name in HEADS:
        spec = head_spec(HEADS[draft_name], target)
        check_fits(spec, target)
        assert tensor_shapes(spec)["fc.weight"] == (target.hidden_size, 3 * target.hidden_size)
        draft = spec.decoder
    else:
        draft = spec_from_hf_config(MODELS[draft_name])
        assert draft.vocab_size == target.vocab_size
        assert recipe.calibration.make.max_tokens + RESERVED_LENGTH < draft.max_positions
    assert recipe.calibration.make.max_tokens + RESERVED_LENGTH < target.max_positions
    for gpus in (1, 2, 4, 8):
        assert target.is_shared_evenly(gpus) and draft.is_shared_evenly(gpus)


def test_a_head_of_another_target_does_not_fit() -> None:
    target = spec_from_hf_config(MODELS["Llama-3.1-8B-Instruct"])
    with pytest.raises(CheckpointError, match="vocab_size 151936 != target vocab_size 128256"):
        check_fits(head_spec(HEADS["Qwen3-8B_eagle3"], target), target)


# --- the whole preflight, on models of their shape ------------------------------------------------------------------


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """The same layers and heads, with widths divided by 64 and the tests' vocabulary."""
    sizes = {name: config[name] // 64 for name in ("hidden_size", "intermediate_size")}
    return {**config, **sizes, "head_dim": 2, "vocab_size": 112}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    write_checkpoint(folder)  # for its tokenizer
    spec = spec_from_hf_config(config)
    save_file(
        {name: random_weight(name, shape) for name, shape in spec.weight_shapes().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))


def write_head(folder: Path, config: dict[str, Any], target: DecoderSpec) -> None:
    folder.mkdir()
    config = {**config, "draft_vocab_size": 40}
    shapes = tensor_shapes(head_spec(config, target))
    tensors = {name.replace("layers.0", "midlayer"): random_weight(name, shape) for name, shape in shapes.items()}
    save_file({**tensors, "d2t": torch.arange(40)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def written(base: Path, name: str) -> tuple[Path, Path]:
    """Folders of a pair."""
    target_name, draft_name = PAIRS[name]
    target = narrow(MODELS[target_name])
    write_model(base / target_name, target)
    if draft_name in HEADS:
        write_head(base / draft_name, narrow(HEADS[draft_name]), spec_from_hf_config(target))
    else:
        write_model(base / draft_name, narrow(MODELS[draft_name]))
    return base / target_name, base / draft_name


@pytest.fixture
def stops_before_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise InterruptedError("built")

    monkeypatch.setattr(pair, "write_given", stop)


@any_pair
def test_a_preset_passes_preflight(name: str, tmp_path: Path, stops_before_it_builds: None) -> None:
    target, draft = written(tmp_path, name)
    recipe = preset(name)
    update = {"target": TargetConfig(path=target), "draft": recipe.draft.elsewhere(draft)}
    with pytest.raises(InterruptedError, match="built"):
        pair.build_pair(
            recipe.model_copy(update=update),
            tmp_path / "bundle",
            device="cpu",
            make_calibration=Calibrator(),
            report=silent,
        )


def test_the_command_takes_both_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(pair, "build_pair", lambda recipe, *_, **__: asked.append(recipe))
    monkeypatch.chdir(tmp_path)
    arguments = ["pair", str(PRESETS / "qwen3-8b-eagle3.yaml"), "--out", "bundle"]
    assert main([*arguments, "--target", "here", "--draft", "there"]) == 0 and main(arguments) == 0
    assert [(recipe.target.path, recipe.draft.folder) for recipe in asked] == [
        (tmp_path / "here", tmp_path / "there"),
        (PRESETS / "Qwen3-8B", PRESETS / "Qwen3-8B_eagle3"),
    ]


def test_a_draft_of_another_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: tmp_path / name for name in ("qwen3-8b-eagle3", "llama-3.3-70b-eagle3")}
    for folder in folders.values():
        folder.mkdir()
    (target, _), (_, draft) = (written(folder, name) for name, folder in folders.items())
    arguments = ["pair", str(PRESETS / "qwen3-8b-eagle3.yaml"), "--target", str(target), "--draft", str(draft)]
    assert main([*arguments, "--out", str(tmp_path / "bundle")]) == 2
    assert "draft target_hidden_size 128 != target hidden_size 64" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted(folders.values())


def test_a_draft_that_is_made_lies_nowhere_else() -> None:
    distills = load_recipe(PRESETS / "smollm2-135m" / "first.yaml")
    with pytest.raises(RecipeError, match="--draft is for a draft that the recipe gives"):
        distills.draft.elsewhere(Path("/somewhere"))


# --- the arithmetic of the docs -------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "beyond-one-gpu.md").read_text()
TARGETS = {"8B": "Llama-3.1-8B-Instruct", "70B": "Llama-3.3-70B-Instruct"}
HEAD_OF = {"8B": "EAGLE3-LLaMA3.1-Instruct-8B", "70B": "EAGLE3-LLaMA3.3-Instruct-70B"}
CACHED = 8 * 4096
CARD, BANDWIDTH = 0.85 * 80e9, 3.35e12


def spec_of(name: str) -> DecoderSpec:
    return spec_from_hf_config(MODELS[name])


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def weights(spec: DecoderSpec, precision: str) -> float:
    """In bytes."""
    shapes = spec.weight_shapes()
    projections = parameters({name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")})
    each = {"bf16": 2.0, "FP8": 1.0, "INT4": 0.5 + 2 / 128}[precision]
    return projections * each + (parameters(shapes) - projections) * 2


def cache(spec: DecoderSpec) -> int:
    """Of a token, in bytes."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2


def head_of(size: str) -> tuple[int, int]:
    """Weights of an EAGLE-3 head, and its cache of a token, in bytes."""
    spec = head_spec(HEADS[HEAD_OF[size]], spec_of(TARGETS[size]))
    return 2 * parameters(tensor_shapes(spec)), cache(spec.decoder)


def read_in_a_pass(size: str, precision: str) -> float:
    spec = spec_of(TARGETS[size])
    return weights(spec, precision) - 2 * spec.vocab_size * spec.hidden_size


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def row(*cells: str) -> str:
    """The one row of the page that begins with a cell and ends with others."""
    found = [line for line in PAGE.splitlines() if line.startswith(f"| {cells[0]} |")]
    return next((line for line in found if line.endswith(f"| {' | '.join(cells[1:])} |")), f"not {cells} but {found}")


def test_sizes_in_the_docs() -> None:
    specs, small = {size: spec_of(name) for size, name in TARGETS.items()}, spec_of("Llama-3.2-1B-Instruct")

    def rows(begins: str, value: Callable[[str], str]) -> None:
        assert row(begins, value("8B"), value("70B")) in PAGE, row(begins, value("8B"), value("70B"))

    rows("parameters", lambda size: f"{parameters(specs[size].weight_shapes()):,}")
    rows("weights in bf16", lambda size: gb(weights(specs[size], "bf16")))
    rows("in FP8", lambda size: gb(weights(specs[size], "FP8")))
    rows("in INT4", lambda size: gb(weights(specs[size], "INT4")))
    rows("cache of a token", lambda size: f"{cache(specs[size]):,} bytes")
    rows("cache of 8 requests of 4,096 tokens", lambda size: gb(CACHED * cache(specs[size])))
    rows("EAGLE-3 head, 32,000 rows, bf16", lambda size: gb(head_of(size)[0]))
    rows("its cache, likewise", lambda size: gb(CACHED * head_of(size)[1]))
    rows("Llama 3.2 1B as the draft, bf16", lambda _: gb(weights(small, "bf16")))
    rows("its cache, likewise", lambda _: gb(CACHED * cache(small)))
    assert f"{parameters(small.weight_shapes()):,} parameters" in PAGE
    assert f"{cache(small):,} bytes a token" in PAGE and f"{head_of('70B')[1]:,} bytes a token" in PAGE


@pytest.mark.parametrize(
    ("size", "precision"), [("8B", "bf16"), ("8B", "FP8"), ("70B", "bf16"), ("70B", "FP8"), ("70B", "INT4")]
)
def test_gpus_and_prices_in_the_docs(size: str, precision: str) -> None:
    spec, (head, head_cache) = spec_of(TARGETS[size]), head_of(size)
    together = weights(spec, precision) + head + CACHED * (cache(spec) + head_cache)
    gpus = next(n for n in (1, 2, 4, 8) if n * CARD >= together)
    name = f"{size} in {precision}"
    expected = [row(name, gb(together), f"{together / CARD:.2f} cards", str(gpus))]
    if precision != "INT4":
        read = read_in_a_pass(size, precision)
        seconds = read / (gpus * BANDWIDTH)
        cost = gpus * 1e6 / (3600 / seconds)
        expected.append(
            row(name, gb(read), str(gpus), f"{1e3 * seconds:.1f} ms", f"{1 / seconds:.0f}", f"{cost:.1f} P")
        )
        drafts = (head, weights(spec_of("Llama-3.2-1B-Instruct"), "bf16"))
        expected.append(row(name, *(f"{1 + 5 * draft / read:.2f}" for draft in drafts)))
        if name == "70B in FP8":
            assert f"3 x {cost:.2f} = {3 * cost:.1f} for" in PAGE
            assert f"{3 * cost:.1f} / 8 / 2 = {3 * cost / 16:.1f} with" in PAGE
    for line in expected:
        assert line in PAGE, line
