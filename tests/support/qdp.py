"""TensorRT's own plugin library without TensorRT: "quickly deployable plugins" as its builder would take them.

The library is Python, in the wheel of the bindings (`tensorrt_bindings/plugin`). What it needs of the native module is
played here: enumerations, symbolic sizes, networks to which plugins are added. It checks declarations, infers shapes
and asks for kernels as in a real build; the order of these calls is that of NVIDIA's interfaces
(`IPluginV3QuickAOTBuild`), not observed. No kernel is launched.

`load` puts the played module into sys.modules, and kernels are compiled only where nothing has set TRITON_INTERPRET:
both are for a process of its own, see `apart`.
"""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

Sizes = Mapping[str, int]
"""What letters in shapes stand for."""

Ranges = Mapping[str, tuple[int, int, int]]
"""The least, the usual and the largest of them: an optimization profile."""


def apart(module: Path, function: str, cache: Path) -> Any:
    """What a function of a test module returns in a process of its own, as JSON gives it back.

    Triton caches kernels in `cache`.
    """
    code = f"import json, {module.stem} as m; print(json.dumps(m.{function}()))"
    paths = [str(module.parent), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
    settings.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def entry_parameters(ptx: str) -> list[str]:
    """Types of the parameters of a PTX file's one entry: pointers are u64."""
    (head,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return re.findall(r"\.param \.(\w+)", head)


# --- symbolic sizes -------------------------------------------------------------------------------------------------


class Size:
    """`trt.IDimensionExpr`: a size that depends on letters."""

    def __init__(self, value: Callable[[Sizes], int], *, constant: bool) -> None:
        self.at, self._constant = value, constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        return self.at({})

    def is_size_tensor(self) -> bool:
        return False


def size_of(size: int | str) -> Size:
    return (
        Size(operator.itemgetter(size), constant=False)
        if isinstance(size, str)
        else Size(lambda _: size, constant=True)
    )


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": operator.add,
    "SUB": operator.sub,
    "PROD": operator.mul,
    "FLOOR_DIV": operator.floordiv,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "MAX": max,
    "MIN": min,
    "EQUAL": operator.eq,
    "LESS": operator.lt,
}


class _Builder:
    """`trt.IExprBuilder`."""

    def constant(self, value: int) -> Size:
        return size_of(value)

    def operation(self, op: IntEnum, a: Size, b: Size) -> Size:
        function = _OPERATIONS[op.name]
        return Size(lambda sizes: int(function(a.at(sizes), b.at(sizes))), constant=a.is_constant() and b.is_constant())


# --- networks -------------------------------------------------------------------------------------------------------


class Tensor:
    """`trt.ITensor`; its sizes are numbers, or letters where they vary."""

    def __init__(self, name: str, dtype: Any, sizes: Sequence[Size]) -> None:
        self.name, self.dtype, self.sizes = name, dtype, sizes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size.get_constant_value() if size.is_constant() else -1 for size in self.sizes)

    def at(self, sizes: Sizes) -> list[int]:
        """Its shape for a step's sizes."""
        return [size.at(sizes) for size in self.sizes]


class _Layer:
    """`trt.ILayer`."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.name, self._outputs = "", outputs

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and how it is launched.

    Grid, block and shared memory have names; then come the scalars between inputs and outputs.
    """

    entry: str
    ptx: str
    parameters: dict[str, Size]
    scalars: list[Size]


class PluginLayer(_Layer):
    """A plugin in a network."""

    def __init__(self, trt: Any, create: Callable[..., Any], aot: bool) -> None:
        request = trt.QuickPluginCreationRequest
        self.inputs, _, self._plugin = create(request.STRICT_AOT if aot else request.STRICT_JIT)
        self._trt = trt
        types = self._plugin.get_output_data_types(
            [tensor.dtype for tensor in self.inputs], [len(tensor.sizes) for tensor in self.inputs]
        )
        shapes = self._plugin.get_output_shapes([tensor.sizes for tensor in self.inputs], [], _Builder())
        super().__init__([Tensor(f"y{i}", *each) for i, each in enumerate(zip(types, shapes, strict=True))])

    def launch(self, profile: Ranges) -> Launch:
        """Asks for the kernel, as building an engine with one profile does."""
        num_inputs, plugin = len(self.inputs), self._plugin
        tensors = [self._described(tensor, profile) for tensor in (*self.inputs, *self._outputs)]
        combinations = plugin.get_supported_format_combinations(tensors, num_inputs)
        assert [c.type for c in combinations] == [tensor.desc.type for tensor in tensors]
        plugin.configure_plugin(tensors[:num_inputs], tensors[num_inputs:])
        plugin.set_tactic(next(iter(plugin.get_valid_tactics()), 0))
        parameters, scalars = SimpleNamespace(), _Scalars()
        sizes = [tensor.sizes for tensor in self.inputs]
        plugin.get_launch_params(sizes, tensors, num_inputs, parameters, scalars, _Builder())
        plain = [tensor.desc for tensor in tensors]
        entry, ptx = plugin.get_kernel(plain[:num_inputs], plain[num_inputs:])
        assert all(each.dtype == self._trt.PluginArgDataType.INT32 for each in scalars.values())
        values = {name: value.expr for name, value in vars(parameters).items()}
        return Launch(entry, ptx.decode(), values, [scalars[i].expr for i in range(scalars.nbSymExprs)])

    def _described(self, tensor: Tensor, profile: Ranges) -> Any:
        described = self._trt.DynamicPluginTensorDesc()
        described.desc.dims, described.desc.type = self._trt.Dims(tensor.shape), tensor.dtype
        for index, name in enumerate(("min", "opt", "max")):
            sizes = {letter: bounds[index] for letter, bounds in profile.items()}
            setattr(described, name, self._trt.Dims(tensor.at(sizes)))
        return described


class _Scalars(dict[int, Any]):
    """`trt.ISymExprs`."""

    nbSymExprs = 0


class Network:
    """`trt.INetworkDefinition`, of inputs, constants and plugins.

    Attributes:
        layers: in the order of their creation.
    """

    def __init__(self, trt: Any) -> None:
        self._trt, self.layers = trt, list[_Layer]()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def add_input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> Tensor:
        return Tensor(name, dtype, [size_of(size) for size in shape])

    def add_constant(self, shape: Sequence[int], weights: Any) -> _Layer:
        return self._added(_Layer([Tensor("constant", weights.dtype, [size_of(size) for size in shape])]))

    def add_plugin(self, create: Callable[..., Any], aot: bool) -> _Layer:
        return self._added(PluginLayer(self._trt, create, aot))

    def _added(self, layer: _Layer) -> _Layer:
        self.layers.append(layer)
        return layer


# --- the module -----------------------------------------------------------------------------------------------------


class _Dims(tuple[int, ...]):
    MAX_DIMS = 8

    def __new__(cls, sizes: Sequence[int] | int = ()) -> _Dims:
        return super().__new__(cls, () if isinstance(sizes, int) else sizes)


class _Field:
    """`trt.PluginField`."""

    def __init__(self, name: str, data: Any = None, type: Any = None) -> None:
        self.name, self.data, self.type = name, data, type


class _Registry:
    """`trt.IPluginRegistry`."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self._creators[namespace, creator.name] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self._creators.get((namespace, name))


def load() -> tuple[ModuleType, ModuleType]:
    """`tensorrt`, played, and the real `tensorrt.plugin`, both imported by these names from now on."""
    trt = _played()
    bindings = importlib.util.find_spec("tensorrt_bindings")
    assert bindings is not None and bindings.submodule_search_locations
    folder = Path(bindings.submodule_search_locations[0]) / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    trt.plugin = library = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]
    sys.modules.update({"tensorrt": trt, "tensorrt.plugin": library})
    spec.loader.exec_module(library)
    return trt, library


def _played() -> ModuleType:
    """All that the library reads of the native module, and what `ssv.builder.tensorrt.graph.Graph` does."""
    registry = _Registry()
    trt: Any = ModuleType("tensorrt")
    trt.__path__ = []
    for name, members in {
        "DataType": "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8 INT4",
        "DimensionOperation": " ".join(_OPERATIONS),
        "PluginArgDataType": "INT8 INT16 INT32",
        "PluginArgType": "INT",
        "PluginFieldType": "CHAR FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 INT64 UNKNOWN",
        "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
        "TensorFormat": "LINEAR",
        "TensorRTPhase": "BUILD RUNTIME",
    }.items():
        setattr(trt, name, IntEnum(name, members, start=0))
    for name, dtype in {
        "float32": "FLOAT",
        "float16": "HALF",
        "bfloat16": "BF16",
        "int32": "INT32",
        "int64": "INT64",
    }.items():
        setattr(trt, name, trt.DataType[dtype])
    for name in (
        "IPluginCreatorV3Quick",
        "IPluginV3",
        "IPluginV3QuickAOTBuild",
        "IPluginV3QuickBuild",
        "IPluginV3QuickCore",
        "IPluginV3QuickRuntime",
        "ISymExpr",
    ):
        setattr(trt, name, type(name, (), {}))
    linear = trt.TensorFormat.LINEAR
    plain = type("PluginTensorDesc", (SimpleNamespace,), {"format": linear, "scale": 0.0})
    trt.PluginTensorDesc = plain
    trt.DynamicPluginTensorDesc = type(
        "DynamicPluginTensorDesc", (SimpleNamespace,), {"__init__": lambda self: setattr(self, "desc", plain())}
    )
    trt.Weights = lambda dtype, address, size: SimpleNamespace(dtype=dtype, address=address, size=size)
    trt.Logger = type("Logger", (), {"WARNING": 2, "log": lambda self, severity, message: None})
    trt.IDimensionExpr, trt.ITensor, trt.Dims, trt.PluginField = Size, Tensor, _Dims, _Field
    trt.PluginFieldCollection, trt.DimsExprs = list, lambda rank: [None] * rank
    trt.get_plugin_registry = lambda: registry
    return trt
