"""Engines really compiled into a bundle by TensorRT for RTX: what it holds, what is refused, what a failure leaves."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import tensorrt_rtx as trt
import torch
from quantized_weights import pack_int4, quantized_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_spec, tiny_weights
from tiny_bundle import build, write_recipe

from ssv.builder.cli import main
from ssv.builder.config import EngineConfig
from ssv.builder.tensorrt import engine, spill
from ssv.builder.tensorrt.engine import checkpoint_digest, compile_engine, limits_of, load_networks
from ssv.builder.tensorrt.lowering import NativeOps
from ssv.builder.tensorrt.spill import Spill
from ssv.bundle import tensorrt_api
from ssv.bundle.manifest import BundleError, EngineEntry, Manifest, engine_source, read_manifest, write_manifest
from ssv.bundle.shapes import Limits
from ssv.bundle.tensorrt_api import EngineBuildError, load_tensorrt
from ssv.model.checkpoint import DecoderSpec, Weights, hf_config
from ssv.model.quantized import AwqLinear, precision_of
from ssv.plugins.contract import OpError
from ssv.support.progress import silent

ALGORITHMS = {"fp8": "FP8", "int4": "W4A16_AWQ"}


class Compiled(NamedTuple):
    """An engine that was compiled.

    Attributes:
        name, entry, reports: of the engine; (stage, done, total) of each report.
    """

    bundle: Path
    name: str
    entry: EngineEntry
    reports: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("built")
    build(write_recipe(base), base / "bundle")
    return base / "bundle"


@pytest.fixture(scope="module")
def compiled(built: Path) -> Compiled:
    """A bundle with an engine of its target."""
    bundle = built.with_name("compiled")
    shutil.copytree(built, bundle)
    reports: list[tuple[str, int, int]] = []
    name, entry = compile_engine(bundle, config(), lambda stage, done, total, _: reports.append((stage, done, total)))
    return Compiled(bundle, name, entry, reports)


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def compiled_bundle(compiled: Compiled, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled.bundle, tmp_path / "bundle"))


@pytest.fixture
def imports() -> Iterator[None]:
    """TensorRT is imported anew in the test, and after it."""
    load_tensorrt.cache_clear()
    yield
    load_tensorrt.cache_clear()


def config(role: str = "target", precision: str = "fp16", **changes: Any) -> EngineConfig:
    settings = {"compute_capability": ["8.9"], "max_length": 192, "prefill_chunk": 64}
    return EngineConfig.model_validate({"role": role, "precision": precision, **settings, **changes})


def arguments(bundle: Path, *more: str) -> list[str]:
    fixed = ["--role", "target", "--max-length", "192", "--prefill-chunk", "64", "--bundle", str(bundle)]
    return ["compile", *fixed, *more]


def quantized(folder: Path, precision: str, spec: DecoderSpec | None = None, seed: int = 0) -> Path:
    """A checkpoint as ModelOpt writes it, of the tiny bundle's target unless told otherwise."""
    spec = spec or tiny_spec()
    weights = quantized_weights(spec, tiny_weights(spec, seed), precision, group=32)
    return write_checkpoint(folder, spec, weights, ALGORITHMS[precision])


def write_checkpoint(folder: Path, spec: DecoderSpec, weights: Weights, algorithm: str) -> Path:
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(spec, [1], torch.float32)))
    facts = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "group_size": 32}}
    (folder / "hf_quant_config.json").write_text(json.dumps(facts))
    return folder


def quantized_draft(bundle: Path, path: Path, change: Callable[[Weights], object] | None = None) -> Path:
    """The bundle's draft with the layers' products in INT4."""
    source = bundle / "draft" / "draft.safetensors"
    state = load_file(source)
    for name in ("qkv", "o", "gate_up", "down"):
        layer = f"decoder.layers.0.{name}"
        state[f"{layer}.weight"], state[f"{layer}.weight_scale"] = pack_int4(state[f"{layer}.weight"].float(), 32)
    if change is not None:
        change(state)
    with safe_open(source, framework="pt") as file:
        save_file(state, path, metadata=file.metadata())
    return path


def part_files(bundle: Path) -> list[Path]:
    return [path for path in bundle.rglob("*") if path.name.endswith(".part")]


def plans(bundle: Path) -> list[str]:
    return [path.relative_to(bundle).as_posix() for path in bundle.rglob("*.engine")]


def tie(target: Path) -> None:
    """Has the head of a checkpoint be its embedding."""
    facts = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**facts, "tie_word_embeddings": True}))
    # A head of its own would count, whatever the config says.
    weights = load_file(target / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if name != "lm_head.weight"}, target / "model.safetensors"
    )


def has_gpu(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def write_no_plan(*args: Any) -> Literal["float16"]:
    """Stands for `build_plan`."""
    args[4].write_bytes(b"a plan")
    return "float16"


# --- What a bundle holds then ---------------------------------------------------------------------------------------


def test_the_entry_says_what_was_asked_and_the_bundle_verifies(compiled: Compiled) -> None:
    name, entry = "target-fp16-tensorrt_rtx-8.9", compiled.entry
    manifest = read_manifest(compiled.bundle)
    assert manifest.engines == {name: entry}
    assert compiled.name == name
    asked = ("target", "fp16", "tensorrt_rtx", "float16")
    assert (entry.role, entry.precision, entry.flavor, entry.compute_type) == asked
    assert (entry.tensorrt, entry.compute_capabilities) == (trt.__version__, ["8.9"])
    assert (entry.max_batch, entry.max_length, entry.max_pending, entry.prefill_chunk) == (8, 192, 6, 64)
    digest = manifest.files[entry.file].sha256
    assert (entry.file, entry.checkpoint) == (f"target/{name}-{digest[:12]}.engine", None)
    assert entry.source == engine_source(manifest, "target")
    assert not entry.plugins
    assert (compiled.bundle / entry.file).stat().st_size > 100_000
    assert entry.build_seconds > 0
    assert entry.peak_memory_bytes > 50e6
    assert part_files(compiled.bundle) == []


def test_the_rest_of_the_manifest_stays(compiled: Compiled, built: Path) -> None:
    before, after = read_manifest(built), read_manifest(compiled.bundle)
    assert after.files.items() > before.files.items()
    assert after.versions.items() >= before.versions.items()
    assert after.versions["tensorrt-rtx-cu13"] == trt.__version__
    changed: dict[str, object] = {"engines": {}, "files": {}, "versions": {}}
    assert after.model_copy(update=changed) == before.model_copy(update=changed)


def test_progress_never_goes_back_and_ends_when_all_is_done(compiled: Compiled) -> None:
    assert {stage for stage, _, _ in compiled.reports} == {"compile target fp16"}
    done = [done for _, done, _ in compiled.reports]
    assert done == sorted(done)
    assert all(done < total for _, done, total in compiled.reports[:-1])
    assert len(done) > 20
    assert compiled.reports[-1][1] == compiled.reports[-1][2]


def test_a_command_compiles_a_quantized_draft_for_two_capabilities(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = quantized_draft(bundle, tmp_path / "draft.safetensors")
    more = ("--role", "draft", "--compute-capability", "8.9,12.0", "--max-rows", "2", "--max-pending", "3")
    assert main(arguments(bundle, "--precision", "int4", "--checkpoint", str(checkpoint), *more)) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    plan_bytes, name = facts.pop("plan_bytes"), facts.pop("engine")
    assert name == "draft-int4-tensorrt_rtx-8.9-12.0"
    assert read_manifest(bundle).engines == {name: EngineEntry.model_validate(facts)}
    assert (facts["compute_capabilities"], facts["max_batch"], facts["max_pending"]) == (["8.9", "12.0"], 2, 3)
    assert (facts["compute_type"], facts["checkpoint"]) == ("bfloat16", checkpoint_digest(checkpoint))
    assert (bundle / facts["file"]).stat().st_size == plan_bytes
    assert "compile draft int4: " in printed.err


def test_a_second_engine_of_the_same_name_replaces_the_first(
    compiled: Compiled, compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked_write(folder: Path, manifest: Manifest) -> None:
        read_manifest(folder)  # the old plan is still there
        write_manifest(folder, manifest)

    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    monkeypatch.setattr(engine, "write_manifest", checked_write)
    name, entry = compile_engine(compiled_bundle, config(max_rows=2), silent)
    manifest = read_manifest(compiled_bundle)
    assert entry.max_batch == 2
    assert manifest.engines == {compiled.name: entry}
    assert name == compiled.name
    assert plans(compiled_bundle) == [entry.file]
    before = read_manifest(compiled.bundle).files.keys()
    assert manifest.files.keys() == before - {compiled.entry.file} | {entry.file}
    assert part_files(compiled_bundle) == []


def test_an_engine_of_the_same_plan_keeps_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    (_, first), (_, second) = (compile_engine(bundle, config(max_rows=rows), silent) for rows in (1, 2))
    assert first.file == second.file
    assert read_manifest(bundle).engines == {config().name: second}


def test_a_quantized_target_is_compiled_from_its_checkpoint(bundle: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "quantized", "fp8")
    name, entry = compile_engine(bundle, config(precision="fp8", checkpoint=checkpoint), silent)
    assert name == "target-fp8-tensorrt_rtx-8.9"
    found = (entry.precision, entry.compute_type, entry.checkpoint)
    assert found == ("fp8", "bfloat16", checkpoint_digest(checkpoint))
    assert read_manifest(bundle).engines == {name: entry}


def test_a_quantized_int4_target_is_taken_from_its_checkpoint(built: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "quantized", "int4")
    decoder, draft = load_networks(built, config(precision="int4", checkpoint=checkpoint))
    assert (precision_of(decoder), precision_of(draft)) == ("int4", None)


def test_a_target_with_a_quantized_head_is_tied_no_more(bundle: Path, tmp_path: Path) -> None:
    tie(bundle / "target")
    spec = tiny_spec()
    weights = tiny_weights(spec)
    head = quantized_weights(spec, {"head_proj.weight": weights.pop("lm_head.weight")}, "int4", group=32)
    weights = quantized_weights(spec, weights, "int4", group=32)
    weights |= {name.replace("head_proj", "lm_head"): tensor for name, tensor in head.items()}
    checkpoint = write_checkpoint(tmp_path / "quantized", spec, weights, "W4A16_AWQ")
    decoder, draft = load_networks(bundle, config(precision="int4", checkpoint=checkpoint))
    assert isinstance(decoder.lm_head, AwqLinear)
    assert precision_of(draft) is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)], ids=["fp16", "bf16"]
)
def test_networks_have_the_type_asked_for(built: Path, precision: str, dtype: torch.dtype) -> None:
    for network in load_networks(built, config(precision=precision)):
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}


def test_a_quantized_draft_is_taken_from_its_checkpoint(built: Path, tmp_path: Path) -> None:
    checkpoint = quantized_draft(built, tmp_path / "draft.safetensors")
    decoder, draft = load_networks(built, config("draft", "int4", checkpoint=checkpoint))
    assert (precision_of(decoder), precision_of(draft)) == (None, "int4")


def test_the_digest_of_a_checkpoint_follows_its_files(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "quantized", "int4")
    before = checkpoint_digest(folder)
    assert checkpoint_digest(Path(shutil.copytree(folder, tmp_path / "copy"))) == before
    with (folder / "hf_quant_config.json").open("a") as file:
        file.write(" ")
    assert checkpoint_digest(folder) != before
    assert checkpoint_digest(folder / "model.safetensors") != checkpoint_digest(folder)


def test_the_source_of_a_draft_includes_its_scorer(built: Path) -> None:
    manifest = read_manifest(built)
    other = {**manifest.files, "scorer.safetensors": manifest.files["scorer.json"]}
    changed = manifest.model_copy(update={"files": other})
    assert engine_source(changed, "draft") != engine_source(manifest, "draft")
    assert engine_source(changed, "target") == engine_source(manifest, "target")


# --- Plugins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "plugins", "expected"),
    [
        ("tensorrt", "auto", True),
        ("tensorrt", "on", True),
        ("tensorrt", "off", False),
        ("tensorrt_rtx", "auto", False),
        ("tensorrt_rtx", "off", False),
    ],
)
def test_plugins_are_where_there_are_any_unless_told_otherwise_and_the_entry_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, imports: None, flavor: str, plugins: str, expected: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    has_gpu(monkeypatch, 8, 9)
    name, entry = compile_engine(bundle, config(flavor=flavor, plugins=plugins), silent)
    assert entry.plugins == expected
    assert read_manifest(bundle).engines[name].plugins == expected


def test_plugins_that_tensorrt_for_rtx_does_not_have(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "load_tensorrt", lambda _: pytest.fail("imported"))
    argv = arguments(bundle, "--precision", "fp16", "--compute-capability", "8.9", "--plugins", "on")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: TensorRT for RTX has no plugins\nhint: give --plugins auto")
    assert "--flavor tensorrt" in error
    assert read_manifest(bundle).engines == {}


def added(bundle: Path, tmp_path: Path, **changes: Any) -> None:
    """Adds the network of an engine, and nothing else."""
    asked, log = config(**changes), tensorrt_api.logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    limits = limits_of(asked, read_manifest(bundle))
    engine.add_network(trt, network, bundle, asked, limits, log.last, Spill(tmp_path))


@pytest.mark.parametrize(("role", "ops"), [("target", ["sparse_gather"]), ("draft", ["sparse_gather", "score"])])
def test_a_network_has_its_ops_as_plugins(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, ops: list[str]
) -> None:
    used: list[str] = []

    class Plugins(NativeOps):
        def __getattribute__(self, name: str) -> Any:
            if name in ("sparse_gather", "score"):
                used.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(engine, "PluginOps", Plugins)
    added(built, tmp_path, role=role, flavor="tensorrt", plugins="off")
    assert used == []
    added(built, tmp_path, role=role, flavor="tensorrt")
    assert used == ops


def test_plugins_that_cannot_be_compiled(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(graph: Any) -> None:
        raise OpError("plugins: Triton", "an installed one", "none: pip install triton, or --plugins off")

    monkeypatch.setattr(engine, "PluginOps", refused)
    with pytest.raises(EngineBuildError, match=r"^plugins: Triton: .*: pip install triton, or --plugins off$"):
        added(built, tmp_path, flavor="tensorrt")


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_without_a_quantized_checkpoint_the_command_that_makes_one_is_named(
    bundle: Path, capsys: pytest.CaptureFixture[str], role: str, precision: str
) -> None:
    argv = arguments(bundle, "--role", role, "--precision", precision, "--compute-capability", "8.9")
    before = read_manifest(bundle)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"error: the bundle's {role} is not quantized" in error
    assert f"hint: make one with `ssv-build quantize --role {role} --precision {precision}`" in error
    assert read_manifest(bundle) == before
    assert part_files(bundle) == []


def test_a_checkpoint_of_another_precision(built: Path, tmp_path: Path) -> None:
    int4, fp8 = quantized(tmp_path / "int4", "int4"), quantized(tmp_path / "fp8", "fp8")
    with pytest.raises(EngineBuildError, match=r"int4 is quantized to int4, asked for is fp16: give --precision int4"):
        load_networks(built, config(checkpoint=int4))
    with pytest.raises(EngineBuildError, match=r"fp8 is quantized to fp8, an int4 engine is made from an int4"):
        load_networks(built, config(precision="int4", checkpoint=fp8))


@pytest.mark.parametrize(("changes", "seed"), [({}, 1), ({"num_layers": 3}, 0)], ids=["other weights", "other shape"])
def test_a_checkpoint_of_another_model(built: Path, tmp_path: Path, changes: dict[str, int], seed: int) -> None:
    other = quantized(tmp_path / "other", "int4", tiny_spec(**changes), seed)
    with pytest.raises(EngineBuildError, match=rf"{other} is not the target of {built}: give the checkpoint"):
        load_networks(built, config(precision="int4", checkpoint=other))


def test_a_tied_checkpoint_of_an_untied_target(built: Path, tmp_path: Path) -> None:
    """Its head is the embedding, which is not the bundle's."""
    other = quantized(tmp_path / "other", "int4")
    tie(other)
    with pytest.raises(EngineBuildError, match=rf"{other} is not the target of {built}"):
        load_networks(built, config(precision="int4", checkpoint=other))


def test_a_checkpoint_of_another_draft(built: Path, tmp_path: Path) -> None:
    def exchange(state: Weights) -> None:
        state["token_ids"] = state["token_ids"].flip(0)

    other = quantized_draft(built, tmp_path / "other.safetensors", exchange)
    with pytest.raises(EngineBuildError, match=rf"{other} is not the draft of {built}"):
        load_networks(built, config("draft", "int4", checkpoint=other))


def test_an_unknown_capability_names_the_known_ones(bundle: Path) -> None:
    message = r"capability 9\.0 is not one .*choose from 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, .*the flavor tensorrt"
    with pytest.raises(EngineBuildError, match=message):
        compile_engine(bundle, config(compute_capability=["8.9", "9.0"]), silent)


@pytest.mark.parametrize(
    ("role", "precision", "capabilities", "message"),
    [
        ("target", "bf16", ["7.5"], r"capability 7\.5 does not run a target in bf16, .*8\.0 or more: .*precision fp16"),
        ("target", "int4", ["8.9", "7.5"], r"capability 7\.5 does not run a target in int4"),
        (
            "target",
            "fp8",
            ["8.0", "8.6", "8.9"],
            r"8\.0, 8\.6 does not run a target in fp8, .*8\.9.*fp16 or bf16 or int4",
        ),
        ("draft", "fp16", ["7.5"], r"capability 7\.5 does not run a draft, which takes 8\.0 or more"),
        ("draft", "fp8", ["8.6"], r"capability 8\.6 does not run a draft in fp8"),
        ("target", "fp16", ["7.0"], r"capability 7\.0 does not run a target in fp16, which takes 7\.5"),
    ],
)
def test_what_a_gpu_has_no_arithmetic_for_is_refused_before_building(
    bundle: Path, capsys: pytest.CaptureFixture[str], role: str, precision: str, capabilities: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(role, precision, compute_capability=capabilities)
    argv = ["--role", role, "--precision", precision, "--compute-capability", ",".join(capabilities)]
    assert main(["compile", *argv, "--bundle", str(bundle)]) == 2
    assert re.search(r"does not run a " + role, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("role", "precision", "capability"),
    [("target", "fp16", "7.5"), ("draft", "int4", "8.0"), ("target", "bf16", "8.6"), ("target", "fp8", "8.9")],
)
def test_what_a_gpu_can_is_not_refused(role: str, precision: str, capability: str) -> None:
    config(role, precision, compute_capability=[capability, "12.0"])


def test_the_flavor_tensorrt_needs_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch, imports: None) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # a package that would be of no use is not asked for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        EngineBuildError, match=r"this machine has none: run this there .*or use the flavor tensorrt_rtx"
    ):
        compile_engine(bundle, config(flavor="tensorrt"), silent)


def test_the_flavor_tensorrt_builds_for_its_own_gpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, imports: None
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    has_gpu(monkeypatch, 9, 0)
    with pytest.raises(EngineBuildError, match=r"capability 9\.0, not for 8\.9: give --compute-capability 9\.0"):
        compile_engine(bundle, config(flavor="tensorrt"), silent)


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_without_tensorrt_the_package_is_named(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    imports: None,
    flavor: Literal["tensorrt", "tensorrt_rtx"],
) -> None:
    monkeypatch.setitem(sys.modules, flavor, None)
    has_gpu(monkeypatch, 8, 9)
    argv = arguments(bundle, "--precision", "fp16", "--compute-capability", "8.9", "--flavor", flavor)
    assert main(argv) == 2
    package = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}[flavor]
    assert capsys.readouterr().err == f"error: {flavor} is not installed\nhint: pip install {package}\n"


def test_tensorrt_without_its_libraries(monkeypatch: pytest.MonkeyPatch, imports: None) -> None:
    def import_module(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", import_module)
    with pytest.raises(EngineBuildError, match=r"cannot be loaded \(libnvinfer.so.11.*\): pip install"):
        load_tensorrt("tensorrt_rtx")


def test_tensorrt_that_is_too_old(monkeypatch: pytest.MonkeyPatch, imports: None) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(INetworkDefinition=object, __version__="10.9"))
    with pytest.raises(EngineBuildError, match=r"tensorrt 10\.9 is too old.*pip install --upgrade tensorrt-cu13"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize("flavor", ["onnx", "os"])
def test_another_flavor_is_not_imported(flavor: Any, imports: None) -> None:
    with pytest.raises(EngineBuildError, match=f"flavor '{flavor}' is unknown; known: tensorrt, tensorrt_rtx"):
        load_tensorrt(flavor)


# --- Limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits", [(8, 128, 63, 64), (8, 128, 64, 64), (8, 128, 6, 129), (0, 128, 6, 64), (8, 128, 0, 64)]
)
def test_limits_out_of_range(limits: tuple[int, int, int, int]) -> None:
    with pytest.raises(EngineBuildError, match="must be"):
        Limits(*limits)


def test_the_widest_limits() -> None:
    assert Limits(1, 128, 62, 64).prefill_chunk == 64
    assert Limits(1, 128, 6, 128).prefill_chunk == 128


def test_limits_follow_the_bundles_tiers(built: Path) -> None:
    manifest = read_manifest(built)
    assert limits_of(config(), manifest).max_pending == 6
    assert limits_of(config(max_pending=9), manifest).max_pending == 9
    assert limits_of(config(prefill_chunk=256), manifest).prefill_chunk == 192


def test_tiers_that_verify_more_than_a_chunk_are_refused(built: Path) -> None:
    manifest = read_manifest(built)
    data = manifest.model_dump(mode="json")
    data["tiers"]["turbo"]["policy"]["max_pending"] = 63
    with pytest.raises(EngineBuildError, match=r"prefill_chunk 64 must be more than max_pending \+ 1 = 64"):
        limits_of(config(), Manifest.model_validate(data))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max-length", "64"),
        ("prefill-chunk", "32"),
        ("max-pending", "65"),
        ("max-rows", "0"),
        ("compute-capability", "ada"),
        ("compute-capability", "8.9,8.9"),
    ],
)
def test_settings_out_of_range_are_named(
    bundle: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    argv = arguments(bundle, "--precision", "fp16", "--compute-capability", "8.9", f"--{option}", value)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert option.replace("-", "_") in error


def test_more_tokens_than_the_model_has_positions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    with pytest.raises(
        EngineBuildError, match="max_length 513 exceeds the model's 512 positions: choose a shorter one"
    ):
        compile_engine(bundle, config(max_length=513), silent)
    assert compile_engine(bundle, config(max_length=512), silent)[1].max_length == 512


# --- What a failure leaves ------------------------------------------------------------------------------------------


def test_no_space_for_the_plan(compiled_bundle: Path) -> None:
    before = read_manifest(compiled_bundle)
    (compiled_bundle / "target" / ".target-fp16-tensorrt_rtx-8.9.part").symlink_to("/dev/full")
    with pytest.raises(EngineBuildError, match=r"cannot be written \(No space left on device\): choose a place"):
        compile_engine(compiled_bundle, config(max_rows=2), silent)
    assert part_files(compiled_bundle) == []
    assert read_manifest(compiled_bundle) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the full file, when it is closed
def test_no_space_for_the_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("wb")  # noqa: SIM115 - closed with the spill
    monkeypatch.setattr(spill, "_SMALL", 0)
    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda dir: full)
    before = read_manifest(bundle)
    with pytest.raises(EngineBuildError, match=r"cannot be written \(.*No space left on device\): choose a place"):
        compile_engine(bundle, config(), silent)
    assert (part_files(bundle), read_manifest(bundle)) == ([], before)


def test_no_plan_at_all(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_some(*args: Any) -> None:
        write_no_plan(*args)
        raise EngineBuildError("TensorRT refuses")

    monkeypatch.setattr(engine, "build_plan", write_some)
    before = sorted(bundle.rglob("*"))
    with pytest.raises(EngineBuildError, match="TensorRT refuses"):
        compile_engine(bundle, config(), silent)
    assert sorted(bundle.rglob("*")) == before
    assert read_manifest(bundle).engines == {}


def test_a_damaged_bundle_is_refused_before_anything_is_compiled(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "build_plan", lambda *_: pytest.fail("compiled"))
    (bundle / "scorer.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"scorer.safetensors does not match the manifest"):
        compile_engine(bundle, config(), silent)


def test_engines_that_are_compiled_at_once_are_all_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends while the other one is being made."""
    others = iter([config(precision="bf16"), config("draft")])

    def build_plan(*given: Any) -> str:
        if (other := next(others, None)) is not None:
            compile_engine(bundle, other, silent)
        given[4].write_text(given[2].name)
        return "float16"

    monkeypatch.setattr(engine, "build_plan", build_plan)
    name, entry = compile_engine(bundle, config(), silent)
    manifest = read_manifest(bundle)
    assert sorted(manifest.engines) == sorted([name, config(precision="bf16").name, config("draft").name])
    assert manifest.engines[name] == entry
    for name, entry in manifest.engines.items():
        assert (bundle / entry.file).read_text() == name
    assert not part_files(bundle)


def test_one_engine_is_made_once_at_a_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_plan(*given: Any) -> str:
        with pytest.raises(
            EngineBuildError, match=rf"another `ssv-build compile` is making {config().name} of this bundle: wait"
        ):
            compile_engine(bundle, config(), silent)
        given[4].write_text("plan")
        return "float16"

    (bundle / "target" / f".{config().name}.part").write_text("left by a process that was killed")
    monkeypatch.setattr(engine, "build_plan", build_plan)
    _, entry = compile_engine(bundle, config(), silent)
    assert (bundle / entry.file).read_text() == "plan" and list(read_manifest(bundle).engines) == [config().name]
    assert not part_files(bundle)


def test_an_engine_of_what_is_there_no_more_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_plan(*given: Any) -> str:
        given[4].write_text("plan")
        manifest = read_manifest(bundle)
        other = manifest.files["target/model.safetensors"].model_copy(update={"sha256": "0" * 64})
        write_manifest(
            bundle, manifest.model_copy(update={"files": {**manifest.files, "target/model.safetensors": other}})
        )
        return "float16"

    monkeypatch.setattr(engine, "build_plan", build_plan)
    with pytest.raises(EngineBuildError, match="was built again while the target engine was compiled"):
        compile_engine(bundle, config(), silent)
    assert not read_manifest(bundle, verify=False).engines and not part_files(bundle)


def test_a_checkpoint_is_what_is_loaded_of_it(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "q", "fp8")
    before = engine.checkpoint_digest(checkpoint)
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "training.json").write_text("{}")
    assert engine.checkpoint_digest(checkpoint) == before
    facts = checkpoint / "hf_quant_config.json"
    facts.write_text(facts.read_text() + " ")
    assert engine.checkpoint_digest(checkpoint) != before


def write_no_manifest(*_: object) -> None:
    """Stands for `write_manifest`."""
    raise OSError(28, "No space left on device")


def test_a_manifest_that_cannot_be_written_leaves_the_old_engine(
    compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, files = read_manifest(compiled_bundle), sorted(compiled_bundle.rglob("*"))
    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    monkeypatch.setattr(engine, "write_manifest", write_no_manifest)
    with pytest.raises(EngineBuildError, match=r"cannot be written \(.*No space left on device\): choose a place"):
        compile_engine(compiled_bundle, config(), silent)
    assert read_manifest(compiled_bundle) == before
    assert sorted(compiled_bundle.rglob("*")) == files


def test_a_manifest_that_cannot_be_written_leaves_an_old_plan_that_is_the_new_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "build_plan", write_no_plan)
    compile_engine(bundle, config(), silent)
    before = read_manifest(bundle)
    monkeypatch.setattr(engine, "write_manifest", write_no_manifest)
    with pytest.raises(EngineBuildError):
        compile_engine(bundle, config(), silent)
    assert read_manifest(bundle) == before


def test_an_interrupt_ends_the_build_and_is_raised_again(compiled: Compiled, compiled_bundle: Path) -> None:
    reports: list[str] = []

    def interrupt(stage: str, done: int, total: int, detail: str) -> None:
        reports.append(detail)
        raise KeyboardInterrupt

    files = sorted(compiled_bundle.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        compile_engine(compiled_bundle, config(), interrupt)
    assert len(reports) < len(compiled.reports)
    assert read_manifest(compiled_bundle) == read_manifest(compiled.bundle)
    assert sorted(compiled_bundle.rglob("*")) == files
