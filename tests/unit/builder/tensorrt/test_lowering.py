"""The ops in TensorRT networks compute what their definition computes.

Built from TensorRT's own layers they are interpreted, and compiled by TensorRT for RTX. As plugins they are driven by
TensorRT's plugin library (tests/support/qdp.py), which has to find their shapes, kernels and launches.

Shapes: see `ssv.plugins.contract`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import qdp
import tensorrt_rtx as trt
import torch
from interpreted import new_graph
from network_interpreter import NetworkInterpreter
from torch import Tensor

from ssv.builder.tensorrt.graph import Graph
from ssv.builder.tensorrt.lowering import NativeOps, PluginOps
from ssv.builder.tensorrt.spill import Spill
from ssv.bundle.tensorrt_api import data_type
from ssv.plugins import reference
from ssv.plugins.contract import OpError, Score
from ssv.plugins.registration import register_plugins

FP32, FP16, BF16, INT32 = torch.float32, torch.float16, torch.bfloat16, torch.int32
HIDDEN, VOCAB, EPS = 24, 99, 1e-5
VOCABS = (1, 2, 99, 5000)

# Inputs of each op with a letter for each axis; H and V are fixed with the network.
INPUTS: dict[str, dict[str, str]] = {
    "score": {"hidden": "RH", "logits": "RV"},
    "sparse_gather": {"hidden": "MH", "row": "R"},
}
PROFILE = {"R": (1, 9, 36), "M": (1, 10, 36)}


def input_types(op: str, hidden: torch.dtype, logits: torch.dtype) -> list[torch.dtype]:
    types = {"hidden": hidden, "logits": logits}
    return [types.get(name, INT32) for name in INPUTS[op]]


def fixed_arguments(op: str, dtype: torch.dtype = FP32, uses_hidden: bool = True) -> tuple[Any, ...]:
    """Those that are fixed with the network: weights, and epsilon."""
    noise = torch.randn(HIDDEN + 3, generator=torch.Generator().manual_seed(3))
    if op == "score":
        return noise[0 if uses_hidden else HIDDEN :] * 0.3, torch.tensor([0.2])
    return (1 + 0.3 * noise[:HIDDEN]).to(dtype), EPS


def members(result: Any) -> Sequence[Any]:
    """The tensors that an op returns."""
    return [getattr(result, field.name) for field in fields(result)] if is_dataclass(result) else result


def expected(op: str, *arguments: Any) -> Sequence[Tensor]:
    return members(getattr(reference, op)(*arguments))


class Native:
    """A network of one op by TensorRT's own layers."""

    def __init__(self, op: str, vocab: int, dtype: torch.dtype, given: torch.dtype, uses_hidden: bool) -> None:
        graph, self.network, (self.log, self.builder, self._spill) = new_graph(dtype)
        fixed_sizes = {"H": HIDDEN, "V": vocab}
        inputs = []
        for (name, letters), each in zip(INPUTS[op].items(), input_types(op, given, given), strict=True):
            inputs.append(graph.input(name, each, tuple(fixed_sizes.get(letter, -1) for letter in letters)))
        self.fixed = fixed_arguments(op, dtype, uses_hidden)
        self.outputs = members(getattr(NativeOps(graph), op)(*inputs, *self.fixed))
        for index, tensor in enumerate(self.outputs):
            graph.output(f"y{index}", tensor)
        self.op, self.shapes = op, graph.inputs

    @property
    def interpreter(self) -> NetworkInterpreter:
        if not hasattr(self, "_interpreter"):
            self._interpreter = NetworkInterpreter(trt, self.network)
        return self._interpreter

    def check(self, *tensors: Tensor) -> list[Tensor]:
        """Runs it; whole numbers have to be the definition's, others as good as."""
        found = self.run(*tensors)
        for one, other in zip(found, expected(self.op, *tensors, *self.fixed), strict=True):
            same(one, other)
        return found

    def run(self, *tensors: Tensor) -> list[Tensor]:
        found = self.interpreter.run(dict(zip(self.shapes, tensors, strict=True)))
        return [found[f"y{index}"] for index in range(len(self.outputs))]


@cache
def native(
    op: str, vocab: int = VOCAB, dtype: torch.dtype = FP32, given: torch.dtype = FP32, uses_hidden: bool = True
) -> Native:
    return Native(op, vocab, dtype, given, uses_hidden)


def same(found: Tensor, other: Tensor) -> None:
    tolerance = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}.get(other.dtype, 0)  # of halves, one rounding
    torch.testing.assert_close(found, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=INT32)


# --- score ----------------------------------------------------------------------------------------------------------


def awkward_rows(vocab: int) -> Tensor:
    """[R, V]: ties, -inf, and a largest logit near and far from the others, up to differences that exceed fp32."""
    rows = normal(11, vocab) * 3
    rows[1] = 0.5
    rows[2, vocab // 2] = rows[2, -1] = 20.0
    rows[3, 1:] = -torch.inf
    rows[4, ::2] = -torch.inf
    rows[4, -1] = 1.0
    for row, above in ((5, 9.0), (6, 17.0), (7, 200.0), (8, 3e4)):
        rows[row, vocab // 3] += above
    rows[9] = -1.9e38
    rows[9, -1] = 1.9e38
    rows[10] -= 1e4
    return rows


@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("vocab", VOCABS)
def test_score(vocab: int, uses_hidden: bool) -> None:
    network, logits = native("score", vocab, uses_hidden=uses_hidden), awkward_rows(vocab)
    hidden = normal(len(logits), HIDDEN) * torch.logspace(-4, 4, len(logits))[:, None]
    token, prob, *_ = network.check(hidden, logits)
    assert token[1] == 0
    assert token[2] == vocab // 2
    assert prob[3] == 1
    network.check(hidden[:1], logits[:1])


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_score_of_halves(dtype: torch.dtype) -> None:
    logits = awkward_rows(VOCAB)[:8].to(dtype)
    native("score", dtype=dtype, given=dtype).check(normal(8, HIDDEN).to(dtype), logits)


@pytest.mark.parametrize("vocab", [1, 2, 99])
def test_rows_without_a_distribution_have_a_token_and_nothing_else(vocab: int) -> None:
    logits = normal(7, vocab)
    logits[0] = -torch.inf
    logits[1, vocab // 2] = torch.inf
    logits[2, vocab // 2] = torch.nan
    logits[3, 0] = torch.inf
    logits[3, -1] = torch.nan
    logits[4, vocab // 2] = 2.1e38
    logits[5] = -2.1e38
    token, *numbers = native("score", vocab).run(normal(7, HIDDEN), logits)
    assert ((token >= 0) & (token < vocab)).all()
    for number in numbers:
        assert number.isnan().tolist() == [True] * 6 + [False]


# --- sparse_gather --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [FP32, FP16, BF16])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_sparse_gather(dtype: torch.dtype, given: torch.dtype) -> None:
    network, hidden = native("sparse_gather", dtype=dtype, given=given), normal(7, HIDDEN)
    hidden[3], hidden[4, 0] = 0, 24_000.0  # as in the first token of SmolLM2: its square exceeds fp16
    hidden = hidden.to(given)
    gathered, _ = network.check(hidden, ints(6, 0, 3, 3, 4))
    assert torch.equal(gathered, hidden[[6, 0, 3, 3, 4]])
    network.check(hidden[:1], ints(0))


# --- plans ----------------------------------------------------------------------------------------------------------


def plan_of(network: Native) -> bytes:
    """What TensorRT for RTX makes of a network, for compute capability 8.9."""
    builder = network.builder
    settings, profile = builder.create_builder_config(), builder.create_optimization_profile()
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for name, letters in INPUTS[network.op].items():
        shapes = [
            tuple(
                PROFILE[letter][i] if size < 0 else size
                for letter, size in zip(letters, network.shapes[name], strict=True)
            )
            for i in range(3)
        ]
        profile.set_shape(name, *shapes)
    assert settings.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network.network, settings)
    assert plan is not None, network.log.last()
    return bytes(plan)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("vocab", [1, VOCAB])
@pytest.mark.parametrize("op", INPUTS)
def test_tensorrt_for_rtx_takes_the_layers(op: str, vocab: int, dtype: torch.dtype) -> None:
    given = FP32 if op == "sparse_gather" else dtype  # of the network, whose residual stream is fp32
    assert len(plan_of(Native(op, vocab, dtype, given, True))) > 10_000


def test_tensorrt_for_rtx_takes_no_layers_that_are_wrong() -> None:
    graph, network, (log, builder, _) = new_graph(FP32)
    x = graph.input("x", INT32, (4,))
    place, update = graph.input("place", INT32, (3,)), graph.input("update", INT32, (2,))
    graph.output("y", network.add_scatter(x, place, update, trt.ScatterMode.ELEMENT).get_output(0))
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "Scatter" in log.last()


# --- plugins --------------------------------------------------------------------------------------------------------

# Of each op its types: the network's, that of hidden states, that of logits.
PLUGINS = [
    ("score", FP32, FP32, FP32),
    ("score", FP16, FP16, FP16),
    ("score", BF16, BF16, BF16),
    ("score", BF16, FP32, FP16),
    ("sparse_gather", FP32, FP32, FP32),
    ("sparse_gather", FP16, FP32, FP32),
    ("sparse_gather", BF16, FP16, FP32),
    ("sparse_gather", FP32, BF16, FP32),
]
SIZES: list[dict[str, int]] = [
    {"R": 1, "M": 1},
    {"R": 17, "M": 11},
]
# Programs of each op, and its kernel's int32 arguments, for such sizes.
Number = Callable[[dict[str, int]], int]
GRID: dict[str, Number] = {
    "score": lambda n: n["R"],
    "sparse_gather": lambda n: n["R"],
}
SCALARS: dict[str, dict[str, Number]] = {
    "score": {},
    "sparse_gather": {"num_rows": lambda n: n["M"]},
}
WEIGHTS = {"score": ("weight", "bias"), "sparse_gather": ("weight",)}
OUTPUTS = {
    "score": [field.name for field in fields(Score)],
    "sparse_gather": ["gathered_RH", "normed_RH"],
}
TYPES = {"FLOAT": FP32, "HALF": FP16, "BF16": BF16, "INT32": INT32}


def plugin_facts() -> dict[str, Any]:
    """What TensorRT's plugin library makes of our plugins on compute capability 9.0, for a process of its own."""
    played, library = qdp.load()
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    refused = without_triton(library)
    facts: dict[str, Any] = {"refused": [refused, without_plugins(played)]}
    facts["is_once"] = register_plugins(library) is register_plugins(library)
    facts["plugins"] = [plugin(played, *case) for case in PLUGINS]
    facts["static"] = plugin(played, *PLUGINS[0], letters={"R": 5})["launches"]
    torch.cuda.get_device_capability = lambda *_: (8, 9)
    facts["ada"] = plugin(played, *PLUGINS[0])["target"]
    return facts


def without_triton(library: Any) -> str:
    held = sys.modules.get("triton")
    sys.modules["triton"] = None  # type: ignore[assignment] - how Python says that there is none
    try:
        register_plugins(library)
    except OpError as error:
        return str(error)
    finally:
        del sys.modules["triton"]
        if held is not None:
            sys.modules["triton"] = held
    return "taken"


def without_plugins(played: Any) -> str:
    """What is said of a TensorRT that does not take a plugin."""
    network = qdp.Network(played)

    def add_plugin(*_: Any, **settings: Any) -> None:
        assert settings["aot"], "not ahead of time"

    network.add_plugin = add_plugin  # type: ignore[attr-defined]
    try:
        plugin_layer(played, network, *PLUGINS[0], {})
    except OpError as error:
        return str(error)
    return "taken"


def plugin_layer(
    played: Any,
    network: qdp.Network,
    op: str,
    dtype: torch.dtype,
    hidden: torch.dtype,
    logits: torch.dtype,
    letters: dict[str, int],
) -> Sequence[qdp.Tensor]:
    graph = Graph(played, network, dtype, lambda: "for no reason", Spill(Path(tempfile.gettempdir())))
    fixed_sizes, inputs = {"H": HIDDEN, "V": VOCAB, **letters}, []
    for (name, axes), each in zip(INPUTS[op].items(), input_types(op, hidden, logits), strict=True):
        shape = [fixed_sizes.get(letter, letter) for letter in axes]
        inputs.append(network.add_input(name, data_type(played, each), shape))
    return members(getattr(PluginOps(graph), op)(*inputs, *fixed_arguments(op, dtype)))


def plugin(
    played: Any,
    op: str,
    dtype: torch.dtype,
    hidden: torch.dtype,
    logits: torch.dtype,
    letters: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The facts of one."""
    from ssv.plugins import aot

    network = qdp.Network(played)
    outputs = plugin_layer(played, network, op, dtype, hidden, logits, letters or {})
    layer = network.layers[-1]
    assert isinstance(layer, qdp.PluginLayer)
    launch = layer.launch(PROFILE)
    spec = {
        "score": lambda: aot.score_spec(HIDDEN, VOCAB, hidden, logits, HIDDEN + 3),
        "sparse_gather": lambda: aot.sparse_gather_spec(HIDDEN, hidden, dtype, EPS),
    }[op]()
    own = aot.compile_ahead(spec, "9.0")
    target, threads = re.search(r"\.target (\w+)", launch.ptx), re.search(r"\.reqntid (\d+)", launch.ptx)
    return {
        "inputs": [[tensor.name, tensor.dtype.name, list(tensor.shape)] for tensor in layer.inputs],
        "outputs": [[tensor.dtype.name, [tensor.at(sizes) for sizes in SIZES]] for tensor in outputs],
        "launches": [{name: size.at(sizes) for name, size in launch.parameters.items()} for sizes in SIZES],
        "scalars": [[size.at(sizes) for size in launch.scalars] for sizes in SIZES],
        "arguments": spec.kernel.arg_names,
        "parameters": qdp.entry_parameters(launch.ptx),
        "target": target and target.group(1),
        "threads": threads and int(threads.group(1)),
        "shared_bytes": own.shared_bytes,
        "is_own": (launch.entry, launch.ptx) == (own.entry, own.ptx),
    }


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qdp.apart(Path(__file__), "plugin_facts", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=range(len(PLUGINS)), ids=lambda i: " ".join(str(x).removeprefix("torch.") for x in PLUGINS[i]))
def case(request: pytest.FixtureRequest, facts: Any) -> tuple[Any, ...]:
    """Op, types and facts of a plugin."""
    return (*PLUGINS[request.param], facts["plugins"][request.param])


def test_outputs_of_plugins_have_the_definitions_shapes_and_types(case: Any) -> None:
    op, dtype, hidden, logits, found = case
    for index, sizes in enumerate(SIZES):
        all_sizes = {"H": HIDDEN, "V": VOCAB, **sizes}
        given = [
            torch.zeros([all_sizes[letter] for letter in axes], dtype=each)
            for axes, each in zip(INPUTS[op].values(), input_types(op, hidden, logits), strict=True)
        ]
        tensors = expected(op, *given, *fixed_arguments(op, dtype))
        types_and_shapes = [(TYPES[name], shapes[index]) for name, shapes in found["outputs"]]
        assert types_and_shapes == [(tensor.dtype, list(tensor.shape)) for tensor in tensors]


def test_arguments_of_plugins_stand_in_the_kernels_order(case: Any) -> None:
    op, dtype, hidden, logits, found = case
    names = [*INPUTS[op], *WEIGHTS.get(op, ())]
    results = [name.rpartition("_")[0] for name in OUTPUTS[op]]
    assert found["arguments"][: len(names + results) + len(SCALARS[op])] == [*names, *SCALARS[op], *results]
    assert found["parameters"] == ["u64"] * len(names) + ["u32"] * len(SCALARS[op]) + ["u64"] * len(results)
    # The library passes what the layer has as inputs, in their order.
    given_types = [*input_types(op, hidden, logits), *(FP32 if op == "score" else dtype for _ in WEIGHTS.get(op, ()))]
    assert [TYPES[name] for _, name, _ in found["inputs"]] == given_types
    assert [name for name, _, _ in found["inputs"]] == [*INPUTS[op], *("constant" for _ in WEIGHTS.get(op, ()))]
    shapes = {"score": [[HIDDEN + 3], [1]], "sparse_gather": [[HIDDEN]]}
    assert [shape for _, _, shape in found["inputs"]][len(INPUTS[op]) :] == shapes.get(op, [])


def test_launches_of_plugins(case: Any) -> None:
    op, *_, found = case
    for sizes, launch, scalars in zip(SIZES, found["launches"], found["scalars"], strict=True):
        assert scalars == [number(sizes) for number in SCALARS[op].values()]
        rest = {"grid_y": 1, "grid_z": 1, "block_x": found["threads"], "block_y": 1, "block_z": 1}
        assert launch == {"grid_x": GRID[op](sizes), **rest, "shared_mem": found["shared_bytes"]}
        assert launch["shared_mem"] <= 48 * 1024


def test_kernels_of_plugins_are_specialised_to_their_types_and_sizes(case: Any) -> None:
    *_, found = case
    assert found["is_own"]
    assert found["target"] == "sm_90a"


def test_plugins_are_registered_once(facts: Any) -> None:
    assert facts["is_once"]


def test_a_plugin_of_sizes_that_are_all_known(facts: Any) -> None:
    assert [launch["grid_x"] for launch in facts["static"]] == [5, 5]


def test_kernels_are_for_the_gpu_that_is_there(facts: Any) -> None:
    assert facts["ada"] == "sm_89"


def test_plugins_that_cannot_be(facts: Any) -> None:
    without, refused = facts["refused"]
    assert re.fullmatch(
        r"plugins: Triton: expected an installed one, got .*: pip install triton, or --plugins off", without
    )
    assert refused == "score: plugin: expected one that TensorRT takes, got for no reason"
