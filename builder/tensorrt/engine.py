"""Compiles a target or a draft into a TensorRT engine of a bundle.

TensorRT for RTX builds for the compute capabilities it is told, on any machine; TensorRT builds for the GPU it runs on.
The plan is written beside its place and moved there when it is whole, then the manifest is rewritten: a bundle never
holds half an engine.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from ssv.builder.config import EngineConfig
from ssv.builder.tensorrt.graph import Graph
from ssv.builder.tensorrt.lowering import NativeOps, NetworkOps, PluginOps
from ssv.builder.tensorrt.network import add_profiles, build_draft, build_target
from ssv.builder.tensorrt.spill import Spill
from ssv.bundle.manifest import (
    SCORER,
    EngineEntry,
    Manifest,
    digest,
    engine_source,
    file_entry,
    locked_file,
    manifest_lock,
    read_manifest,
    write_manifest,
)
from ssv.bundle.shapes import Limits
from ssv.bundle.tensorrt_api import PACKAGES, EngineBuildError, load_tensorrt, local_capability, logger
from ssv.model.checkpoint import checkpoint_files
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, DraftSpec, load_draft
from ssv.model.quantized import precision_of
from ssv.model.scorer import Scorer, load_scorer
from ssv.model.unified import CONFIG_NAME, load_any
from ssv.plugins.contract import OpError
from ssv.support.environment import versions
from ssv.support.precisions import QUANTIZED_PRECISIONS
from ssv.support.progress import Report

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


def compile_engine(bundle: Path, config: EngineConfig, report: Report) -> tuple[str, EngineEntry]:
    """Compiles an engine and adds it to a bundle, in place of one of the same role, precision, flavor and capabilities.

    Returns:
        Its name in the manifest, and its entry.

    Raises:
        EngineBuildError: TensorRT missing, without a GPU where it needs one, or refusing the network; the checkpoint is
            of another model or precision; the plan cannot be written.
        CheckpointError, BundleError: the checkpoint or the bundle is damaged.
    """
    trt = tensorrt_for(config)
    manifest = read_manifest(bundle)
    limits = limits_of(config, manifest)
    positions = manifest.target if config.role == "target" else manifest.draft["decoder"]
    check_length(config, positions["max_positions"])
    name = config.name

    def on_progress(done: int, total: int, what: str) -> None:
        report(f"compile {config.role} {config.precision}", done, total, what)

    checkpoint = checkpoint_digest(config.checkpoint) if config.checkpoint is not None else None
    started = time.monotonic()
    _spare_memory()
    with _part_file(bundle / config.role, name) as part:
        compute_type = build_plan(trt, bundle, config, limits, part, on_progress)
        made = EngineEntry(
            role=config.role,
            precision=config.precision,
            flavor=config.flavor,
            tensorrt=trt.__version__,
            compute_capabilities=config.compute_capability,
            file="",
            compute_type=compute_type,
            max_batch=limits.max_batch,
            max_length=limits.max_length,
            max_pending=limits.max_pending,
            prefill_chunk=limits.prefill_chunk,
            source=engine_source(manifest, config.role),
            checkpoint=checkpoint,
            plugins=uses_plugins(config),
            build_seconds=round(time.monotonic() - started, 2),
            peak_memory_bytes=_peak_memory_bytes(),
        )
        # Others may have added an engine in the meantime, and another may be doing so now.
        with manifest_lock(bundle):
            entry = _add_engine(bundle, config, made, part)
    return name, entry


def _add_engine(bundle: Path, config: EngineConfig, made: EngineEntry, part: Path) -> EngineEntry:
    """Moves a plan to its place, and writes the manifest that names it, in place of one of the same name."""
    manifest, name = read_manifest(bundle, verify=False), config.name
    if engine_source(manifest, config.role) != made.source or not part.is_file():
        raise EngineBuildError(
            f"{bundle} was built again while the {config.role} engine was compiled for what it was", "compile it again"
        )
    found = file_entry(part)
    # Part of the hash is in the name: the old plan stays in its place until the manifest names the new one.
    plan = part.with_name(f"{name}-{found.sha256[:12]}.engine")
    part.replace(plan)
    file = plan.relative_to(bundle).as_posix()
    entry = made.model_copy(update={"file": file})
    old = manifest.engines.get(name)
    files = {path: each for path, each in manifest.files.items() if old is None or path != old.file}
    changes = {
        "engines": {**manifest.engines, name: entry},
        "files": {**files, file: found},
        "versions": {**manifest.versions, **versions(PACKAGES[config.flavor])},
    }
    try:
        write_manifest(bundle, manifest.model_copy(update=changes))
    except BaseException as error:
        if old is None or old.file != file:
            plan.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise EngineBuildError(f"{bundle} cannot be written ({error})", "choose a place with more room") from error
        raise
    if old is not None and old.file != file:
        (bundle / old.file).unlink(missing_ok=True)
    return entry


def tensorrt_for(config: EngineConfig) -> ModuleType:
    """The TensorRT that an engine is built with, once it is clear that this machine and that TensorRT can.

    Raises:
        EngineBuildError: TensorRT missing, without a GPU where it needs one, without plugins that are asked for, or not
            building for a GPU.
    """
    uses_plugins(config)
    if config.flavor == "tensorrt":
        _check_gpu(config)  # before a package is asked for that would be of no use here
    trt = load_tensorrt(config.flavor)
    if config.flavor == "tensorrt_rtx":
        for name in config.compute_capability:
            compute_capability(trt, name)
    return trt


def check_length(config: EngineConfig, positions: int) -> None:
    """Refuses a cache that is longer than the model's positions.

    Raises:
        EngineBuildError: naming both.
    """
    if config.max_length > positions:
        raise EngineBuildError(
            f"max_length {config.max_length} exceeds the model's {positions} positions", "choose a shorter one"
        )


def uses_plugins(config: EngineConfig) -> bool:
    """Whether an engine has ops as plugins: where its TensorRT has plugins, unless told otherwise.

    Raises:
        EngineBuildError: they are asked for and there are none.
    """
    if config.plugins == "on" and config.flavor == "tensorrt_rtx":
        raise EngineBuildError(
            "TensorRT for RTX has no plugins", "give --plugins auto, which takes its own layers, or --flavor tensorrt"
        )
    return config.plugins == "on" or (config.plugins == "auto" and config.flavor == "tensorrt")


def limits_of(config: EngineConfig, manifest: Manifest) -> Limits:
    """What an engine is built for; verification is as wide as the bundle's tiers ask unless told otherwise."""
    widest = max(tier.policy.max_pending for tier in manifest.tiers.values())
    return Limits(
        max_batch=config.max_rows,
        max_length=config.max_length,
        max_pending=config.max_pending or widest,
        prefill_chunk=min(config.prefill_chunk, config.max_length),
    )


def checkpoint_digest(checkpoint: Path) -> str:
    """SHA-256 over the files of a checkpoint that are loaded.

    Raises:
        CheckpointError: see `checkpoint_files`.
    """
    files = [*checkpoint_files(checkpoint), checkpoint / CONFIG_NAME]
    return digest(file_entry(file).sha256 for file in files if file.is_file())


def load_networks(bundle: Path, config: EngineConfig) -> tuple[Decoder, Draft]:
    """The target and the draft of a bundle in the engine's types.

    The one that is compiled is read from its checkpoint if one is given.

    Raises:
        EngineBuildError: the checkpoint is of another model or precision than asked for.
        CheckpointError: a checkpoint is damaged.
    """
    spec, weights = load_any(bundle / "target")
    given = config.checkpoint
    if config.role == "target" and given is not None:
        given_spec, given_weights = load_any(given)
        if "lm_head.weight_scale" in given_weights:  # a target whose LM head is quantized is tied no more
            spec = replace(spec, tie_embeddings=given_spec.tie_embeddings)
        if given_spec != spec or not _same_embedding(given_weights, weights):
            raise EngineBuildError(
                f"{given} is not the target of {bundle}", "give the checkpoint that was made from it"
            )
        weights = given_weights
    stored = weights["model.embed_tokens.weight"].dtype
    dtype = _COMPUTE_TYPES.get(config.precision, torch.float16 if stored == torch.float16 else torch.bfloat16)
    decoder = Decoder.from_weights(spec, weights, dtype)
    draft = load_draft(bundle / "draft" / "draft.safetensors", decoder, dtype)
    if config.role == "draft" and given is not None:
        given_draft = load_draft(given, decoder, dtype)
        if given_draft.spec != draft.spec or not torch.equal(given_draft.token_ids, draft.token_ids):
            raise EngineBuildError(f"{given} is not the draft of {bundle}", "give the checkpoint that was made from it")
        draft = given_draft
    _check_precision(decoder if config.role == "target" else draft, config)
    return decoder, draft


def build_plan(
    trt: ModuleType, bundle: Path, config: EngineConfig, limits: Limits, part: Path, on_progress: OnProgress
) -> Literal["float16", "bfloat16"]:
    """Builds an engine and writes its plan to a file; returns its compute type.

    Raises:
        EngineBuildError, CheckpointError: see `compile_engine`.
        OSError: no space left.
    """
    log = logger(trt)
    builder = _builder(trt, config, log)
    settings = builder.create_builder_config()
    _choose_capabilities(trt, config, settings)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    spill = Spill(part.parent)
    graph = add_network(trt, network, bundle, config, limits, log.last, spill)
    add_profiles(graph, builder, settings, limits, config.flavor)
    gc.collect()

    monitor = _monitor(trt, on_progress)
    settings.progress_monitor = monitor
    with part.open("wb") as file, spill.not_in_memory():
        writer = _writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, settings, writer)
        if monitor.error is not None:
            raise monitor.error
        if writer.error is not None:
            raise EngineBuildError(f"{part.parent} cannot be written ({writer.error})", "choose a place with more room")
    if not built or part.stat().st_size == 0:
        raise EngineBuildError(f"TensorRT cannot build this {config.role} in {config.precision}: {log.last()}")
    monitor.done(f"{part.stat().st_size / 1e6:.0f} MB")
    return "bfloat16" if graph.dtype == torch.bfloat16 else "float16"


def add_network(
    trt: ModuleType,
    network: Any,
    bundle: Path,
    config: EngineConfig,
    limits: Limits,
    complaint: Callable[[], str],
    spill: Spill,
) -> Graph:
    """Adds the layers of an engine to a network. The weights are gone from memory when it returns."""
    decoder, draft = load_networks(bundle, config)
    graph = Graph(trt, network, decoder.embed.weight.dtype, complaint, spill)
    ops: NetworkOps
    try:
        ops = PluginOps(graph) if uses_plugins(config) else NativeOps(graph)
        if config.role == "target":
            build_target(graph, decoder, limits, draft.tap, ops)
        else:
            build_draft(graph, draft, limits, scorer_of(bundle, draft.spec), ops)
    except OpError as error:
        raise EngineBuildError(str(error)) from error
    graph.forget()
    return graph


def scorer_of(bundle: Path, draft: DraftSpec) -> Scorer | None:
    """The scorer of a bundle; None where it was built without one.

    Raises:
        BundleError, CheckpointError: the bundle is damaged.
    """
    if not read_manifest(bundle, verify=False).has_scorer:
        return None
    return load_scorer(bundle / SCORER, draft.decoder.hidden_size)


def compute_capability(trt: ModuleType, name: str) -> Any:
    """TensorRT's value for a capability such as "8.9".

    Raises:
        EngineBuildError: this TensorRT does not build for it.
    """
    known = {
        f"{key[2:-1]}.{key[-1]}": value for key, value in trt.ComputeCapability.__members__.items() if key[:2] == "SM"
    }
    if name not in known:
        raise EngineBuildError(
            f"compute capability {name} is not one that TensorRT for RTX {trt.__version__} builds for",
            f"choose from {', '.join(known)}, or use the flavor tensorrt on such a GPU",
        )
    return known[name]


# --- TensorRT -------------------------------------------------------------------------------------------------------


def _builder(trt: ModuleType, config: EngineConfig, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # what the bindings raise when the library gives them nothing
        raise EngineBuildError(f"{config.flavor} {trt.__version__} does not start: {log.last() or error}") from error


def _check_gpu(config: EngineConfig) -> None:
    """Refuses to build for a GPU that is not this machine's: TensorRT times kernels on the one that it builds for."""
    if not torch.cuda.is_available():
        raise EngineBuildError(
            "the flavor tensorrt builds on the GPU that will run the engine, and this machine has none",
            "run this there (pip install tensorrt-cu13), or use the flavor tensorrt_rtx",
        )
    found = local_capability()
    if config.compute_capability != [found]:
        raise EngineBuildError(
            f"the flavor tensorrt builds for this machine's compute capability {found}, not for "
            f"{', '.join(config.compute_capability)}",
            f"give --compute-capability {found}",
        )


def _choose_capabilities(trt: ModuleType, config: EngineConfig, settings: Any) -> None:
    if config.flavor == "tensorrt":
        return
    settings.num_compute_capabilities = len(config.compute_capability)
    for index, name in enumerate(config.compute_capability):
        if not settings.set_compute_capability(compute_capability(trt, name), index):
            raise EngineBuildError(
                f"TensorRT for RTX {trt.__version__} refuses compute capability {name}", "choose another"
            )


def _writer(trt: ModuleType, file: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[name-defined]
        """Takes the plan as it is serialized, so that it is never in memory as a whole beside TensorRT's own copy."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: str | None = None

        def write(self, data: bytes) -> int:
            # An exception must not cross TensorRT's C++: it is told that nothing was written.
            try:
                file.write(data)
                file.flush()
                return len(data)
            except OSError as error:
                self.error = error.strerror
                return 0

    return Writer()


def _monitor(trt: ModuleType, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Adds up the steps of TensorRT's nested phases as they become known."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps, self.total = 0, 1
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.total += num_steps
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps = min(self.steps + 1, self.total - 1)
            self.tell(phase_name)
            return self.error is None

        def tell(self, what: str) -> None:
            # An exception, Ctrl-C among them, must not cross TensorRT's C++: it is told to stop, and ours is raised
            # again after it.
            try:
                on_progress(self.steps, self.total, what)
            except BaseException as error:
                self.error = error

        def phase_finish(self, phase_name: str) -> None:
            """Called at the end of a phase, whose steps have been counted."""

        def done(self, what: str) -> None:
            on_progress(self.total, self.total, what)

    return Monitor()


# --- checkpoints ----------------------------------------------------------------------------------------------------

_COMPUTE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _check_precision(module: torch.nn.Module, config: EngineConfig) -> None:
    found = precision_of(module)
    wanted = config.precision if config.precision in QUANTIZED_PRECISIONS else None
    if found == wanted:
        return
    source = config.checkpoint or f"the bundle's {config.role}"
    if wanted is None:
        raise EngineBuildError(
            f"{source} is quantized to {found}, asked for is {config.precision}", f"give --precision {found}"
        )
    raise EngineBuildError(
        f"{source} is {'not quantized' if found is None else f'quantized to {found}'}, an {wanted} engine is made from "
        f"an {wanted} checkpoint",
        f"make one with `ssv-build quantize --role {config.role} --precision {wanted}` and give it as --checkpoint",
    )


def _same_embedding(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints are of one model: quantizing leaves the embedding as it was, but for its type."""
    a, b = (weights["model.embed_tokens.weight"].to(torch.bfloat16) for weights in (one, other))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-4)


# --- files and memory -----------------------------------------------------------------------------------------------


@contextmanager
def _part_file(folder: Path, name: str) -> Iterator[Path]:
    """A file in the making, which vanishes unless the block has moved it; nobody else makes the same meanwhile."""
    part = folder / f".{name}.part"
    try:
        folder.mkdir(exist_ok=True)
        descriptor = _locked(part)
        try:
            yield part
        finally:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), part.stat()):  # moved, it may be another's by now
                    part.unlink()
            os.close(descriptor)
    except OSError as error:
        raise EngineBuildError(f"{folder} cannot be written ({error})", "choose a place with more room") from error


def _locked(part: Path) -> int:
    """Descriptor of a file that is this process's until it is closed or the process dies."""
    try:
        return locked_file(part)
    except BlockingIOError as error:
        raise EngineBuildError(
            f"another `ssv-build compile` is making {part.name[1:].removesuffix('.part')} of this bundle", "wait for it"
        ) from error


def _spare_memory() -> None:
    """Has freed memory given back at once from now on, and starts measuring the peak anew, where the system can.

    TensorRT allocates and frees hundreds of MB in many pieces; glibc would keep them: 180 MB more at the peak for
    SmolLM2-135M.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for parameter, value in ((_M_TRIM_THRESHOLD, 1 << 16), (_M_MMAP_THRESHOLD, 1 << 16), (_M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
        gc.collect()
        libc.malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def _peak_memory_bytes() -> int:
    """Largest resident memory of this process, since `_spare_memory` where the system can tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
