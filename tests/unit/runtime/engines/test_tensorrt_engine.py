"""Which plans are refused, and how a plan is executed: on a TensorRT and a CUDA that are played by the CPU.

The played execution context reads and writes memory at the addresses it was given, and nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import entry as interpreted_entry
from tiny import random_draft, tiny_decoder, tiny_spec
from torch import Tensor

from ssv.bundle.manifest import EngineEntry, FileEntry, Manifest, engine_source
from ssv.bundle.tensorrt_api import EngineBuildError
from ssv.model.draft import DraftHead
from ssv.runtime.engines import tensorrt_engine
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.tensorrt_engine import PlanRunner, TensorRTEngine, check_entry, choose_entry, load_engine

OUTPUTS = {"hidden": (torch.float32, 2), "logits": (torch.float32, 3), "token": (torch.int32, None)}
WIDEST = 8


class Cuda:
    """What happens on the streams, in order; kernels run at once, but for those that are captured."""

    def __init__(self) -> None:
        self.current = Stream(self, "current")
        self.events: list[str] = []
        self.graph: Graph | None = None


class Stream:
    cuda_stream = 7

    def __init__(self, cuda: Cuda, name: str = "own") -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.events.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._cuda.events.append("synchronize")


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.captured = cuda, list[Callable[[], None]]()

    def replay(self) -> None:
        self._cuda.events.append("replay")
        for kernel in self.captured:
            kernel()


class Plan:
    """A network that writes each row's first token into the caches; `hidden` and `token` of a gathered row are its
    input token, `logits` the sum of the first row's keys.

    Attributes:
        created: execution contexts so far; `contexts` those that are still there.
        runs: results of the next executions, True when there are no more.
        capturable: None for a TensorRT that cannot tell.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.caches = ["keys_0", "values_0"]
        self.created = 0
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.scratch: set[tuple[int, int]] = set()
        self.runs: list[bool] = []
        self.capturable: bool | None = True
        self.gives_contexts = True


class Context:
    def __init__(self, plan: Plan, log: Any) -> None:
        self._plan, self._log = plan, log
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        if plan.capturable is not None:
            self.is_stream_capturable = lambda stream: bool(plan.capturable)

    def set_device_memory(self, address: int, size: int) -> None:
        self._plan.scratch.add((address, size))

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == Stream.cuda_stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "shapes belong to a profile"
        self.shapes[name] = shape
        if name == "input_ids" and shape[1] > WIDEST:
            self._log.log(ILogger.ERROR, f"{shape[1]} is out of range")
            return False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        width = OUTPUTS[name][1]
        return self.shapes["gather_rows"] + ((width,) if width else ())

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == Stream.cuda_stream
        if not (self._plan.runs.pop(0) if self._plan.runs else True):
            self._log.log(ILogger.ERROR, "out of luck")
            return False
        graph = self._plan.cuda.graph
        if graph is not None:
            graph.captured.append(self._compute)
        else:
            self._plan.cuda.events.append("execute")
            self._compute()
        return True

    def _at(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _compute(self) -> None:
        ids = self._at("input_ids", torch.int32, self.shapes["input_ids"])
        rows = self._at("gather_rows", torch.int32, self.shapes["gather_rows"])
        first_slot = self._at("first_slot", torch.int32, self.shapes["first_slot"])
        for name in self._plan.caches:
            cache = self._at(f"{name}_out", torch.float16, self.shapes[name])
            for b, p in enumerate(first_slot.tolist()):
                cache[b, :, p] = ids[b, 0].half()
        keys = self._at("keys_0", torch.float16, self.shapes["keys_0"])
        found = ids.flatten()[rows.long()]
        for name, (dtype, _) in OUTPUTS.items():
            output = self._at(name, dtype, self.get_tensor_shape(name))
            value = keys[0, 0, :, 0].sum().expand(len(rows)) if name == "logits" else found
            output.copy_(value.to(dtype).view(-1, *[1] * (output.ndim - 1)).expand_as(output))


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


def played_tensorrt(plan: Plan) -> Any:
    """A module that reads plans which are `b"whole"`."""

    class Engine:
        device_memory_size_v2 = 4096

        def __init__(self, log: Any) -> None:
            inputs = ["input_ids", "first_slot", "position", "mask", "gather_rows", *plan.caches]
            self._names = [*inputs, *OUTPUTS, *(f"{name}_out" for name in plan.caches)]
            self._num_inputs, self._log = len(inputs), log
            self.num_io_tensors = len(self._names)

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> str:
            return "input" if self._names.index(name) < self._num_inputs else "output"

        def create_execution_context(self, strategy: str) -> Context | None:
            assert strategy == "user managed"
            if not plan.gives_contexts:
                self._log.log(ILogger.ERROR, "no memory")
                return None
            plan.created += 1
            context = Context(plan, self._log)
            plan.contexts.add(context)
            return context

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            if content == b"whole":
                return Engine(self._log)
            self._log.log(ILogger.ERROR, "magic tag does not match")
            return None

    return SimpleNamespace(
        __version__="1.7",
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Plays `torch.cuda`, and puts what is for CUDA into memory."""
    cuda = Cuda()

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        cuda.events.append(f"on {entered.name}")
        yield
        cuda.events.append(f"off {entered.name}")

    @contextmanager
    def capture(graph: Graph, stream: Stream) -> Iterator[None]:
        cuda.events.append("capture")
        cuda.graph = graph
        yield
        cuda.graph = None

    def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: torch.device | str | None = None, **settings: Any) -> Tensor:
            played = device is not None and torch.device(device).type == "cuda"
            return make(*args, **settings, device="cpu" if played else device)

        return made

    for name in ("empty", "zeros", "arange"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda.current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(cuda))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return cuda


@pytest.fixture
def plan(cuda: Cuda) -> Plan:
    return Plan(cuda)


@pytest.fixture
def runner(plan: Plan, tmp_path: Path) -> PlanRunner:
    file = tmp_path / "plan"
    file.write_bytes(b"whole")
    return PlanRunner(played_tensorrt(plan), file)


@pytest.fixture
def cache() -> Tensor:
    """Keys and values of three rows: [2, B, K, S, D]."""
    return torch.zeros(2, 3, 2, 16, 4, dtype=torch.float16)


def step(
    cache: Tensor, ids: list[list[int]], position: int = 0, gather: tuple[int, ...] = (0,), first_row: int = 0
) -> Any:
    used = slice(first_row, first_row + len(ids))
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "first_slot": torch.full((len(ids),), position, dtype=torch.int32),
        "position": torch.full((len(ids), len(ids[0])), position, dtype=torch.int32),
        "mask": torch.ones(len(ids), len(ids[0]), 16, dtype=torch.bool),
        "gather_rows": torch.tensor(gather, dtype=torch.int32),
        "keys_0": cache[0, used],
        "values_0": cache[1, used],
    }


# --- Which plans are refused ----------------------------------------------------------------------------------------


def manifest_of(*entries: EngineEntry, weights: str = "0") -> Manifest:
    """Of a bundle of such weights, tiny target and draft."""
    spec = tiny_spec().to_dict()
    names = ("target/model.safetensors", "draft/draft.safetensors", "scorer.safetensors")
    return Manifest(
        name="tiny",
        target=spec,
        draft={"decoder": spec, "feature_layers": [0, 1]},
        eos_token_ids=[1],
        default_precision="fp32",
        tiers={},
        files={name: FileEntry(size=1, sha256=weights * 64) for name in (*names, "plan")},
        engines={f"engine {i}": made for i, made in enumerate(entries)},
        sources={},
        versions={},
    )


def entry(role: str, **changes: object) -> EngineEntry:
    """An engine of that bundle."""
    made = interpreted_entry(role, torch.float16)
    return made.model_copy(update={"source": engine_source(manifest_of(), role), "tensorrt": "1.7", **changes})


def checked(version: str = "1.7", capability: str = "8.9", weights: str = "0") -> None:
    check_entry(Path("b"), manifest_of(weights=weights), entry("target"), version, capability)


def test_a_plan_that_fits_is_taken() -> None:
    checked()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.7.1"}, "b/plan was built by tensorrt_rtx 1.7, installed is 1.7.1"),
        ({"capability": "12.0"}, "b/plan is for compute capability 8.9, this GPU has 12.0"),
        ({"weights": "1"}, "b/plan was built from other weights than the bundle holds now"),
    ],
)
def test_a_plan_that_does_not_fit_names_both_sides_and_the_command(changes: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError) as caught:
        checked(**changes)
    what, _, cure = str(caught.value).rpartition(": ")
    assert what == message
    command = "ssv-build compile --role target --precision fp16 --flavor tensorrt_rtx"
    command += f" --compute-capability {changes.get('capability', '8.9')}"
    command += " --max-rows 3 --max-length 64 --max-pending 4 --prefill-chunk 16 --bundle b"
    assert cure == f"build it again with `{command}`"


def test_a_quantized_plan_is_built_again_from_a_checkpoint() -> None:
    quantized = entry("target", precision="int4", checkpoint="0" * 64)
    with pytest.raises(EngineError, match=r"--precision int4 .*--checkpoint ITS_QUANTIZED_CHECKPOINT --bundle b`"):
        check_entry(Path("b"), manifest_of(), quantized, "1.8", "8.9")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flavor": "tensorrt", "plugins": True}, False),
        ({"flavor": "tensorrt", "plugins": False}, True),
        ({"flavor": "tensorrt_rtx", "plugins": False}, False),  # which has none anyway
    ],
)
def test_a_plan_is_built_again_with_or_without_plugins(changes: dict[str, Any], expected: bool) -> None:
    with pytest.raises(EngineError, match=rf"--flavor {changes['flavor']} .*--bundle b`") as caught:
        check_entry(Path("b"), manifest_of(), entry("target", **changes), "1.8", "8.9")
    assert ("--plugins" in str(caught.value)) == expected
    assert (" --prefill-chunk 16 --plugins off --bundle b`" in str(caught.value)) == expected


def played_machine(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(tensorrt_engine, "load_tensorrt", lambda _: played_tensorrt(plan))


def test_the_first_engine_that_fits_is_chosen(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    played_machine(monkeypatch, plan)
    old, other_gpu = entry("target", tensorrt="1.6"), entry("target", compute_capabilities=["12.0"])
    fits, also = entry("target", compute_capabilities=["12.0", "8.9"]), entry("target", precision="int4")
    manifest = manifest_of(entry("draft"), old, other_gpu, fits, also)
    assert choose_entry(Path("b"), manifest, "target", None) == fits
    assert choose_entry(Path("b"), manifest, "target", "int4") == also


def test_if_no_engine_fits_the_first_ones_problem_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    played_machine(monkeypatch, plan)
    manifest = manifest_of(entry("target", tensorrt="1.6"), entry("target", compute_capabilities=["12.0"]))
    with pytest.raises(EngineError, match=r"built by tensorrt_rtx 1\.6, installed is 1\.7"):
        choose_entry(Path("b"), manifest, "target", None)


def test_no_engine_of_a_role_or_precision() -> None:
    manifest = manifest_of(entry("target"))
    with pytest.raises(EngineError, match="b has no draft engine: build one with `ssv-build compile --role draft"):
        choose_entry(Path("b"), manifest, "draft", None)
    with pytest.raises(EngineError, match="b has no target engine in int4: build one"):
        choose_entry(Path("b"), manifest, "target", "int4")


def load(bundle: Path, made: EngineEntry) -> TensorRTEngine:
    draft = random_draft(tiny_decoder(), "conditioned") if made.role == "draft" else None
    head = DraftHead(draft.spec, draft.token_ids) if draft is not None else None
    return load_engine(bundle, manifest_of(), made, head)


def test_without_a_gpu_no_engine_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt_engine, "load_tensorrt", lambda _: pytest.fail("imported"))
    with pytest.raises(EngineError, match="run on an NVIDIA GPU and this machine has none: use the torch engine"):
        load(tmp_path, entry("target"))


def test_without_tensorrt_no_engine_is_loaded(cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flavor: str) -> None:
        raise EngineBuildError(f"{flavor} is not installed: pip install it")

    monkeypatch.setattr(tensorrt_engine, "load_tensorrt", missing)
    with pytest.raises(EngineError, match="tensorrt_rtx is not installed: pip install it"):
        load(tmp_path, entry("target"))


def test_a_plan_of_another_version_is_not_even_read(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played_machine(monkeypatch, plan)
    with pytest.raises(EngineError, match=r"built by tensorrt_rtx 1\.6, installed is 1\.7"):
        load(tmp_path, entry("target", tensorrt="1.6"))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_an_engine_is_loaded(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    played_machine(monkeypatch, plan)
    (tmp_path / "plan").write_bytes(b"whole")
    engine = load(tmp_path, entry(role))
    assert (engine.max_batch, engine.max_length) == (3, 64)
    assert (engine.vocab_size, engine.num_features) == ((48, 64) if role == "draft" else (112, 0))
    assert (engine.token_ids_V is None) == (role == "target")
    assert engine.cache.keys.dtype == torch.float16


def test_a_loaded_engine_steps(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.caches = [f"{kind}_{layer}" for layer in range(tiny_spec().num_layers) for kind in ("keys", "values")]
    played_machine(monkeypatch, plan)
    (tmp_path / "plan").write_bytes(b"whole")
    engine = load(tmp_path, entry("target"))
    position, rows = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([2, 1, 0])
    out = engine.step(torch.tensor([[7, 8], [9, 10]]), position, rows, first_row=1)
    assert out.token_R is not None
    assert out.token_R.tolist() == [9, 8, 7]
    assert engine.cache.values[1, :, 0, 2:4, 0].tolist() == [[0, 0], [7, 0], [0, 9]]


@pytest.mark.parametrize("content", [b"", b"who"])
def test_a_truncated_plan(plan: Plan, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan"
    file.write_bytes(content)
    with pytest.raises(
        EngineError, match=r"plan cannot be loaded \(magic tag does not match\): build the engine again"
    ):
        PlanRunner(played_tensorrt(plan), file)


def test_a_plan_that_cannot_be_read(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be read \(No such file or directory\): build the engine again"):
        PlanRunner(played_tensorrt(plan), tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"cannot be read \(Is a directory\)"):
        PlanRunner(played_tensorrt(plan), tmp_path)


# --- How a plan is executed -----------------------------------------------------------------------------------------


def test_outputs_without_the_caches(runner: PlanRunner, cache: Tensor) -> None:
    found = runner.run(0, step(cache, [[3, 4], [5, 6]], gather=(2, 1)))
    assert found.keys() == OUTPUTS.keys()
    assert {name: x.dtype for name, x in found.items()} == {name: dtype for name, (dtype, _) in OUTPUTS.items()}
    assert found["token"].tolist() == [5, 4]
    assert found["hidden"].tolist() == [[5, 5], [4, 4]]


def test_caches_are_input_and_output_where_they_lie(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    runner.run(0, step(cache, [[3]], position=5))
    (context,) = plan.contexts
    for index, name in enumerate(plan.caches):
        assert context.addresses[name] == context.addresses[f"{name}_out"] == cache[index].data_ptr()
        assert context.shapes[name] == (1, 2, 16, 4)
    assert cache[:, 0, :, 5].unique().tolist() == [3]
    assert int(cache.count_nonzero()) == 2 * 2 * 4


def test_a_run_sees_what_earlier_ones_wrote(runner: PlanRunner, cache: Tensor) -> None:
    seen = [runner.run(0, step(cache, [[2]], position))["logits"][0, 0].item() for position in range(4)]
    assert seen == [2, 4, 6, 8]


def test_inputs_are_copied(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    inputs = step(cache, [[3, 4]])
    runner.run(0, inputs)
    (context,) = plan.contexts
    given = [inputs[name].data_ptr() for name in ("input_ids", "first_slot", "position", "mask", "gather_rows")]
    assert not set(given) & set(context.addresses.values())
    del inputs  # the graph must not read what is gone
    assert runner.run(0, step(cache, [[8, 9]], gather=(1,)))["token"].tolist() == [9]


def test_what_a_run_returned_stays_as_it_was(runner: PlanRunner, cache: Tensor) -> None:
    first = runner.run(0, step(cache, [[3]]))
    before = {name: x.clone() for name, x in first.items()}
    runner.run(0, step(cache, [[9]]))
    assert all(torch.equal(first[name], x) for name, x in before.items())


def test_a_graph_is_captured_behind_the_first_run_and_replayed(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    found = [runner.run(0, step(cache, [[token]]))["token"].item() for token in (3, 4, 5)]
    assert found == [3, 4, 5]
    work = [event for event in plan.cuda.events if event in ("execute", "synchronize", "capture", "replay")]
    assert work == ["execute", "synchronize", "capture", "replay", "replay"]


def test_what_cannot_be_captured_is_executed_each_time(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    plan.capturable = False
    found = [runner.run(0, step(cache, [[token]]))["token"].item() for token in (3, 4, 5)]
    assert found == [3, 4, 5]
    assert (plan.cuda.events.count("execute"), plan.cuda.events.count("capture")) == (3, 0)
    assert plan.created == 1


def test_a_tensorrt_that_cannot_tell_what_is_capturable(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    plan.capturable = None
    assert [runner.run(0, step(cache, [[token]]))["token"].item() for token in (3, 4)] == [3, 4]
    assert (plan.cuda.events.count("execute"), plan.cuda.events.count("replay")) == (1, 1)


def test_a_capture_that_failed_is_not_replayed(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    plan.runs = [True, False]
    assert [runner.run(0, step(cache, [[token]]))["token"].item() for token in (3, 4)] == [3, 4]
    assert (plan.cuda.events.count("execute"), plan.cuda.events.count("replay")) == (2, 0)


def test_work_is_on_the_own_stream_between_what_comes_before_and_after(
    runner: PlanRunner, plan: Plan, cache: Tensor
) -> None:
    runner.run(0, step(cache, [[3]]))
    events = plan.cuda.events
    assert events[:2] == ["own waits for current", "on own"]
    assert events[-2:] == ["off own", "current waits for own"]
    assert events.index("on own") < events.index("execute") < events.index("off own")


def test_equal_shapes_share_a_context(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    for position in (0, 3, 7):
        runner.run(0, step(cache, [[1, 2]], position))
    assert plan.created == 1


@pytest.mark.parametrize(
    ("profile", "other"),
    [
        (0, {"ids": [[1, 2, 3]]}),
        (0, {"ids": [[1, 2], [3, 4]]}),
        (0, {"ids": [[1, 2]], "gather": (0, 1)}),
        (0, {"ids": [[1, 2]], "first_row": 1}),
        (1, {"ids": [[1, 2]]}),
    ],
    ids=["tokens", "rows", "gathered", "first row", "profile"],
)
def test_another_shape_row_or_profile_has_a_context_of_its_own(
    runner: PlanRunner, plan: Plan, cache: Tensor, profile: int, other: dict[str, Any]
) -> None:
    for _ in range(2):
        assert runner.run(0, step(cache, [[8, 9]]))["token"].tolist() == [8]
        assert runner.run(profile, step(cache, **other))["token"].tolist() == list(
            range(1, 1 + len(other.get("gather", [0])))
        )
    assert plan.created == 2
    assert {context.profile for context in plan.contexts} == {0, profile}
    assert cache[0, other.get("first_row", 0), 0, 0, 0] == 1


def test_contexts_share_their_scratch_memory(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    for tokens in (1, 2, 3):
        runner.run(0, step(cache, [[1] * tokens]))
    ((address, size),) = plan.scratch
    assert address and size == 4096


def test_the_least_recently_used_context_goes_first(
    runner: PlanRunner, plan: Plan, cache: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "_MAX_GRAPHS", 2)
    created = []
    for tokens in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, then 2 that of 3
        runner.run(0, step(cache, [[5] * tokens]))
        created.append(plan.created)
    assert created == [1, 2, 2, 3, 3, 4]
    gc.collect()
    assert sorted(context.shapes["input_ids"] for context in plan.contexts) == [(1, 1), (1, 2)]


def test_a_shape_that_is_refused(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    for _ in range(2):  # and it stays refused
        with pytest.raises(EngineError, match=r"refuses input_ids of shape \(1, 9\): 9 is out of range"):
            runner.run(0, step(cache, [[1] * 9]))
    assert runner.run(0, step(cache, [[3]]))["token"].tolist() == [3]


def test_a_run_that_fails(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    plan.runs = [False]
    with pytest.raises(EngineError, match="TensorRT cannot run this step: out of luck"):
        runner.run(0, step(cache, [[3]]))
    assert [runner.run(0, step(cache, [[token]]))["token"].item() for token in (3, 4)] == [3, 4]


def test_no_context(runner: PlanRunner, plan: Plan, cache: Tensor) -> None:
    plan.gives_contexts = False
    with pytest.raises(EngineError, match="gives no execution context: no memory"):
        runner.run(0, step(cache, [[3]]))
