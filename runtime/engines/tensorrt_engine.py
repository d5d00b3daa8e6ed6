"""The engine contract over a TensorRT plan.

`TensorRTEngine` turns steps of any size into runs that the plan has profiles for; a `Runner` executes them.
`PlanRunner` is the one on a GPU: torch tensors are its buffers, the KV cache is bound as input and output at once, and
decode and verify shapes that come back are captured as CUDA graphs.

Shapes: see `contract.py`; V slots of the cache that attention looks at.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ssv.bundle.manifest import EngineEntry, Manifest, engine_source
from ssv.bundle.shapes import Limits, profiles
from ssv.bundle.tensorrt_api import EngineBuildError, Flavor, load_tensorrt, local_capability, logger
from ssv.model.checkpoint import DecoderSpec
from ssv.model.draft import DraftHead, DraftSpec
from ssv.runtime.engines.contract import Branches, EngineError, StepOutput, check_step
from ssv.runtime.engines.kv_cache import KVCache, visible

_KEYS_STEP = 256
"""V is rounded up to a multiple of this, so that few different shapes come up."""

_MAX_GRAPHS = 48


class Runner(Protocol):
    """Executes a plan."""

    def run(self, profile: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the network for its inputs, but for the caches, which are written in place. They stay valid."""
        ...


class TensorRTEngine:
    """A target or a draft over its own KV cache: `ssv.runtime.engines.contract.Engine`."""

    def __init__(
        self,
        runner: Runner,
        entry: EngineEntry,
        spec: DecoderSpec,
        *,
        draft: DraftSpec | None = None,
        token_ids_V: Tensor | None = None,
        has_scorer: bool = False,
        has_features_out: bool = False,
        max_batch: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        """Runs a plan that has been loaded, over a cache of its own.

        Args:
            draft, token_ids_V: of a draft: its spec, and the vocabulary id of each logit unless that is its index.
            has_scorer: whether the plan is a draft's that was built with a scorer.
            has_features_out: whether the plan is a target's that was built with a tap.
            max_batch: rows of the cache; None for as many as the plan was built for.
        """
        self.max_batch, self.max_length = max_batch or entry.max_batch, entry.max_length
        if self.max_batch > entry.max_batch:
            raise EngineError(
                f"the {entry.role} engine was built for {entry.max_batch} rows, not {self.max_batch}", "use fewer"
            )
        self.num_features = spec.hidden_size if draft is not None and draft.kind == "conditioned" else 0
        self.has_scorer = has_scorer
        self.token_ids_V = token_ids_V
        self.vocab_size = draft.head_size if draft is not None else spec.vocab_size
        self.device = torch.device(device)
        self._runner, self._has_features_out = runner, has_features_out
        limits = Limits(entry.max_batch, entry.max_length, entry.max_pending, entry.prefill_chunk)
        self._limits, self._profiles = limits, profiles(limits, entry.flavor)
        self.cache = KVCache(spec, self.max_batch, entry.max_length, getattr(torch, entry.compute_type), self.device)

    @torch.inference_mode()
    def step(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None = None,
        *,
        branches: Branches | None = None,
        count_B: Tensor | None = None,
        features_out: bool = False,
        first_row: int = 0,
    ) -> StepOutput:
        """See `Engine.step`. TensorRT ignores writes beyond the cache in silence: `check_step` refuses them before."""
        check_step(self, input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, first_row)
        if features_out and not self._has_features_out:
            raise EngineError("features_out: this engine was compiled without the tap of a conditioned draft")
        tokens = input_ids_BT.shape[1]
        parts = []
        for start, stop, rows, kept in self._pieces(input_ids_BT.shape[0], tokens, gather_rows_R):
            features = None if features_in_BTF is None else features_in_BTF[:, start:stop]
            part = None if branches is None else Branches(branches.prefix_B, branches.path_BTD[:, start:stop])
            found = self._run(input_ids_BT[:, start:stop], first_slot_B + start, rows, features, part, first_row)
            parts.append((found, kept))
        return self._joined(parts, features_out, input_ids_BT.shape[0])

    def move_row(self, source: int, dest: int, length: int) -> None:
        """See `Engine.move_row`."""
        self.cache.move_row(source, dest, length)

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        """See `Engine.keep`."""
        self.cache.keep(row, start, slots)

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        """See `Engine.read_cache`."""
        return self.cache.read(row, start, stop)

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        """See `Engine.write_cache`."""
        self.cache.write(row, start, held)

    def _pieces(self, batch: int, tokens: int, gather_rows_R: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Cuts a step into runs: their first and last token, the rows they gather, and where these stand among the
        step's.

        A run gathers no more rows than verification does: one that wants more is cut to verification's width.
        """
        row_R, token_R = gather_rows_R // tokens, gather_rows_R % tokens
        width, most = self._limits.prefill_chunk, self._profiles[-1].largest.gathered
        starts = range(0, tokens, width)
        if any(int(((token_R >= s) & (token_R < s + width)).sum()) > most for s in starts):
            width = self._limits.max_pending + 1
        for start in range(0, tokens, width):
            stop = min(start + width, tokens)
            kept = ((token_R >= start) & (token_R < stop)).nonzero()[:, 0]
            yield start, stop, row_R[kept] * (stop - start) + token_R[kept] - start, kept

    def _run(
        self,
        ids_BT: Tensor,
        first_slot_B: Tensor,
        rows_R: Tensor,
        features_BTF: Tensor | None,
        branches: Branches | None,
        first_row: int,
    ) -> dict[str, Tensor]:
        """One run. Its number of gathered rows is rounded up, so that few different shapes come up."""
        batch, tokens = ids_BT.shape
        profile = self._profile(batch, tokens, len(rows_R))
        most = min(self._profiles[profile].largest.gathered, batch * tokens)
        padded = min(1 << max(len(rows_R) - 1, 0).bit_length(), most)
        rows = torch.zeros(max(padded, len(rows_R)), dtype=torch.int32)
        rows[: len(rows_R)] = rows_R
        last = int(first_slot_B.max()) + tokens
        num_keys = min(-(-last // _KEYS_STEP) * _KEYS_STEP, self.max_length)
        device = self.cache.keys.device
        slot_BT = first_slot_B.to(device)[:, None] + torch.arange(tokens, device=device)
        inputs = {
            "input_ids": ids_BT.to(torch.int32),
            "first_slot": first_slot_B,
            "position": (slot_BT if branches is None else branches.position_BT).to(torch.int32),
            "mask": visible(slot_BT, num_keys, branches)[:, 0],
            "gather_rows": rows,
        }
        if features_BTF is not None:
            inputs["features"] = features_BTF.float()
        used = slice(first_row, first_row + batch)
        for layer, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
            inputs[f"keys_{layer}"], inputs[f"values_{layer}"] = keys[used], values[used]
        found = self._runner.run(profile, inputs)
        return {name: x if name == "features" else x[: len(rows_R)] for name, x in found.items()}

    def _profile(self, batch: int, tokens: int, gathered: int) -> int:
        for index, profile in enumerate(self._profiles):
            if tokens <= profile.largest.tokens and gathered <= profile.largest.gathered:
                return index
        raise AssertionError(f"no profile for {batch} x {tokens} tokens and {gathered} rows")

    def _joined(self, parts: list[tuple[dict[str, Tensor], Tensor]], features_out: bool, batch: int) -> StepOutput:
        """One step's output from its runs'."""

        def rows(name: str) -> Tensor | None:
            if name not in parts[0][0]:
                return None
            if len(parts) == 1:
                return parts[0][0][name]
            joined = torch.cat([found[name] for found, _ in parts])
            order = torch.cat([kept for _, kept in parts])
            return torch.empty_like(joined).index_copy_(0, order.to(joined.device), joined)

        hidden_RH, logits_RV, token_R = rows("hidden"), rows("logits"), rows("token")
        assert hidden_RH is not None and logits_RV is not None and token_R is not None
        features_BTF = None
        if features_out:
            features = [found["features"] for found, _ in parts]
            features_BTF = torch.cat([x.view(batch, -1, x.shape[-1]) for x in features], dim=1)
        return StepOutput(hidden_RH, logits_RV, features_BTF, rows("reject_prob"), token_R.long())


def load_engine(
    bundle: Path,
    manifest: Manifest,
    entry: EngineEntry,
    draft: DraftHead | None = None,
    *,
    max_batch: int | None = None,
) -> TensorRTEngine:
    """An engine of a bundle, on this machine's GPU.

    Args:
        draft: for a draft's engine.
        max_batch: rows of its cache; None for as many as it was built for.

    Raises:
        EngineError: the plan does not match this machine or this bundle; the message names both sides and the cure.
    """
    check_entry(bundle, manifest, entry, *_machine(entry.flavor))
    trt = load_tensorrt(entry.flavor)
    spec = DecoderSpec.from_dict(manifest.target if draft is None else manifest.draft["decoder"])
    runner = PlanRunner(trt, bundle / entry.file)
    if draft is None:
        has_tap = bool(manifest.draft["feature_layers"])
        return TensorRTEngine(runner, entry, spec, has_features_out=has_tap, max_batch=max_batch)
    token_ids_V = draft.token_ids.cuda()
    return TensorRTEngine(
        runner,
        entry,
        spec,
        draft=draft.spec,
        token_ids_V=token_ids_V,
        has_scorer=manifest.has_scorer,
        max_batch=max_batch,
    )


def choose_entry(bundle: Path, manifest: Manifest, role: str, precision: str | None) -> EngineEntry:
    """The engine of a role, in a precision if one is asked for, that runs on this machine.

    Raises:
        EngineError: there is none; if there is one for another machine, the message says what does not match.
    """
    entries = [e for e in manifest.engines.values() if e.role == role and precision in (None, e.precision)]
    if not entries:
        raise EngineError(
            f"{bundle} has no {role} engine{f' in {precision}' if precision else ''}",
            f"build one with `ssv-build compile --role {role} --precision {precision or 'fp16'} "
            f"--compute-capability YOURS --bundle {bundle}`",
        )
    problem: EngineError | None = None
    for entry in entries:
        try:
            check_entry(bundle, manifest, entry, *_machine(entry.flavor))
            return entry
        except EngineError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _machine(flavor: Flavor) -> tuple[str, str]:
    """Version of TensorRT and compute capability of this machine."""
    if not torch.cuda.is_available():
        raise EngineError("TensorRT engines run on an NVIDIA GPU and this machine has none", "use the torch engine")
    try:
        version = load_tensorrt(flavor).__version__
    except EngineBuildError as error:
        raise EngineError(error.what, error.cure) from error
    return version, local_capability()


def check_entry(bundle: Path, manifest: Manifest, entry: EngineEntry, version: str, capability: str) -> None:
    """Raises EngineError if a plan is not for this TensorRT, this GPU or these weights."""
    quantized = " --checkpoint ITS_QUANTIZED_CHECKPOINT" if entry.checkpoint is not None else ""
    without = " --plugins off" if entry.flavor == "tensorrt" and not entry.plugins else ""
    rebuild = (
        f"build it again with `ssv-build compile --role {entry.role} --precision {entry.precision} "
        f"--flavor {entry.flavor} --compute-capability {capability} --max-rows {entry.max_batch} "
        f"--max-length {entry.max_length} --max-pending {entry.max_pending} "
        f"--prefill-chunk {entry.prefill_chunk}{quantized}{without} --bundle {bundle}`"
    )
    plan = bundle / entry.file
    if entry.tensorrt != version:
        raise EngineError(f"{plan} was built by {entry.flavor} {entry.tensorrt}, installed is {version}", rebuild)
    if capability not in entry.compute_capabilities:
        built_for = ", ".join(entry.compute_capabilities)
        raise EngineError(f"{plan} is for compute capability {built_for}, this GPU has {capability}", rebuild)
    if entry.source != engine_source(manifest, entry.role):
        raise EngineError(f"{plan} was built from other weights than the bundle holds now", rebuild)


# --- execution on a GPU ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bound:
    """An execution context with its buffers, for one set of shapes and caches.

    Attributes:
        inputs: what is copied before each run; caches are bound where they lie.
        graph: of the run, once it has been captured.
        can_capture: False once that has failed.
    """

    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph | None = None
    can_capture: bool = True


class PlanRunner:
    """Executes a plan on the current GPU, everything on one stream of its own.

    Every set of shapes has a context, as a captured graph needs one that is not changed any more; their scratch memory
    is shared, since no two of them run at a time. The least recently used go first.
    """

    def __init__(self, trt: ModuleType, plan: Path) -> None:
        self._trt, self._log = trt, logger(trt)
        self._runtime = trt.Runtime(self._log)
        try:
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        except OSError as error:
            raise EngineError(f"{plan} cannot be read ({error.strerror})", "build the engine again") from error
        if self._engine is None:
            raise EngineError(f"{plan} cannot be loaded ({self._log.last()})", "build the engine again")
        self._stream = torch.cuda.Stream()
        self._scratch = torch.empty(self._engine.device_memory_size_v2, dtype=torch.uint8, device="cuda")
        self._bound: OrderedDict[tuple[object, ...], _Bound] = OrderedDict()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = [self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
        if "mask" not in names:
            raise EngineError(f"{plan} was compiled by an earlier version of ssv", "build the engine again")
        self._outputs = [name for name, known in zip(names, is_input, strict=True) if not known]

    def run(self, profile: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner.run`."""
        caches = {name: x for name, x in inputs.items() if _is_cache(name)}
        given = {name: x for name, x in inputs.items() if not _is_cache(name)}
        first_cache = next(iter(caches.values())).data_ptr()
        key = (profile, first_cache, *(tuple(x.shape) for x in given.values()))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if key not in self._bound:
                self._bound[key] = self._bind(profile, given, caches)
                while len(self._bound) > _MAX_GRAPHS:
                    self._bound.popitem(last=False)
            self._bound.move_to_end(key)
            bound = self._bound[key]
            for name, x in given.items():
                bound.inputs[name].copy_(x, non_blocking=True)
            self._execute(bound)
            found = {name: x.clone() for name, x in bound.outputs.items()}
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def _execute(self, bound: _Bound) -> None:
        if bound.graph is not None:
            bound.graph.replay()
            return
        # The first run is not captured: TensorRT may still allocate and compile in it.
        if not bound.context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"TensorRT cannot run this step: {self._log.last()}")
        self._stream.synchronize()
        # TensorRT for RTX knows whether this can be captured; TensorRT does not say, and its loop-free networks can.
        capturable = getattr(bound.context, "is_stream_capturable", None)
        if bound.can_capture and (capturable is None or capturable(self._stream.cuda_stream)):
            graph, bound.can_capture = torch.cuda.CUDAGraph(), False
            # Where it fails, each run goes through TensorRT: slower, and right.
            with contextlib.suppress(RuntimeError):
                with torch.cuda.graph(graph, stream=self._stream):
                    enqueued = bound.context.execute_async_v3(self._stream.cuda_stream)
                bound.graph = graph if enqueued else None

    def _bind(self, profile: int, given: Mapping[str, Tensor], caches: Mapping[str, Tensor]) -> _Bound:
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"TensorRT gives no execution context: {self._log.last()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in given.items()}
        for name, x in (*inputs.items(), *caches.items()):
            if not context.set_input_shape(name, tuple(x.shape)):
                raise EngineError(f"TensorRT refuses {name} of shape {tuple(x.shape)}: {self._log.last()}")
            context.set_tensor_address(name, x.data_ptr())
        outputs = {}
        for name in self._outputs:
            if _is_cache(name):
                context.set_tensor_address(name, caches[name.removesuffix("_out")].data_ptr())
                continue
            dtype = torch.int32 if name == "token" else torch.float32
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        return _Bound(context, inputs, outputs)


def _is_cache(name: str) -> bool:
    return name.startswith(("keys_", "values_"))
