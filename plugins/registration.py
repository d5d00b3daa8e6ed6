"""Registers the ops with TensorRT's plugin library, as "quickly deployable plugins".

TensorRT's documentation describes these under "Adding custom operators in Python". The kernels are compiled ahead of
time: they end up inside the plan, and nothing has to be installed where it runs. Only full TensorRT has plugins;
`ssv.builder.tensorrt.lowering` adds them to a network.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ssv.plugins.contract import OpError

if TYPE_CHECKING:
    from ssv.plugins.aot import Spec


@dataclass(frozen=True, slots=True)
class _Plugin:
    """An op as TensorRT's plugin library wants it described.

    Attributes:
        attributes: numbers that are fixed with the network, by name.
        outputs: describes the outputs, given TensorRT's descriptions of the inputs.
        spec: the kernel, given dtypes and static sizes of the inputs, and the attributes.
        sizes: a step's sizes by their letter, given the inputs' symbolic shapes.
    """

    inputs: Sequence[str]
    attributes: Mapping[str, type]
    num_outputs: int
    outputs: Callable[..., tuple[Any, ...]]
    spec: Callable[..., "Spec"]
    sizes: Callable[..., dict[str, Any]]


def register_plugins(trtp: Any) -> Any:
    """Registers the ops with TensorRT's plugin library, once; returns the namespace of the functions that add them.

    Raises:
        OpError: Triton is missing.
    """
    import numpy.typing  # noqa: F401 - the library reads numpy.typing without importing it

    try:
        from ssv.plugins import aot
    except ModuleNotFoundError as error:
        raise OpError(
            "plugins: Triton", "an installed one", f"{error}: pip install triton, or --plugins off"
        ) from error
    for name, plugin in _plugins(trtp, aot).items():
        if not hasattr(trtp.op, "ssv") or not hasattr(trtp.op.ssv, name):
            _register(trtp, aot, name, plugin)
    return trtp.op.ssv


def _register(trtp: Any, aot: Any, name: str, plugin: _Plugin) -> None:
    def parameters(names: Sequence[str], kind: Any) -> list[inspect.Parameter]:
        return [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for n in names]

    # The library gives the attributes by name here, and by place to `implement`.
    def describe(*given: Any, **attributes: Any) -> Any:
        described = plugin.outputs(*given)
        return described if len(described) > 1 else described[0]

    def implement(*given: Any) -> Any:
        inputs, rest = given[: len(plugin.inputs)], given[len(plugin.inputs) :]
        spec = plugin.spec(*map(_Described, inputs), *rest[: len(plugin.attributes)])
        artefact = aot.compile_ahead(spec, ".".join(map(str, torch.cuda.get_device_capability())))
        sizes = plugin.sizes(*(x.shape_expr for x in inputs))
        launch = trtp.KernelLaunchParams()
        launch.grid_x = spec.grid(sizes)
        launch.block_x, launch.shared_mem = artefact.threads, artefact.shared_bytes
        values = spec.scalar_values(sizes)
        scalars = trtp.SymIntExprs(len(values))
        for index, value in enumerate(values):
            scalars[index] = trtp.SymInt32(value)
        return artefact.entry, artefact.ptx, launch, scalars

    # The library reads the parameters off the signature; functions that differ in nothing else are written once.
    inputs = parameters(plugin.inputs, trtp.TensorDesc)
    attributes = [p for n, kind in plugin.attributes.items() for p in parameters([n], kind)]
    several = tuple.__class_getitem__((trtp.TensorDesc,) * plugin.num_outputs)
    described = inspect.Signature([*inputs, *attributes], return_annotation=several)
    describe.__signature__ = described  # type: ignore[attr-defined]
    tail = [*parameters(["outputs"], tuple[trtp.TensorDesc]), *parameters(["tactic"], int)]
    returned = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    implemented = inspect.Signature([*inputs, *attributes, *tail], return_annotation=returned)
    implement.__signature__ = implemented  # type: ignore[attr-defined]
    trtp.register(f"ssv::{name}")(describe)
    trtp.aot_impl(f"ssv::{name}")(implement)


class _Described:
    """What a kernel is specialised to in TensorRT's description of a tensor.

    That is its dtype, and the largest size of each axis.
    """

    def __init__(self, desc: Any) -> None:
        names = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}
        self.dtype = names[desc.dtype.name]
        self.sizes = [int(n) if n >= 0 else int(desc.shape.max[axis]) for axis, n in enumerate(desc.shape)]


def _plugins(trtp: Any, aot: Any) -> dict[str, _Plugin]:
    trt = importlib.import_module(trtp.__name__.rpartition(".")[0])

    def described(dtype: Any, *shape: Any) -> Any:
        return trtp.from_shape_expr(shape, dtype=dtype)

    def score_outputs(hidden: Any, logits: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        rows = logits.shape_expr[0]
        return described(trt.int32, rows), *(described(trt.float32, rows) for _ in range(4))

    def sparse_gather_outputs(hidden: Any, row: Any, weight: Any) -> tuple[Any, ...]:
        shape = row.shape_expr[0], hidden.shape_expr[1]
        return described(hidden.dtype, *shape), described(weight.dtype, *shape)

    return {
        "score": _Plugin(
            inputs=("hidden", "logits", "weight", "bias"),
            attributes={},
            num_outputs=5,
            outputs=score_outputs,
            spec=lambda hidden, logits, weight, bias: aot.score_spec(
                hidden.sizes[1], logits.sizes[1], hidden.dtype, logits.dtype, weight.sizes[0]
            ),
            sizes=lambda hidden, logits, weight, bias: {"R": logits[0]},
        ),
        "sparse_gather": _Plugin(
            inputs=("hidden", "row", "weight"),
            attributes={"eps": float},
            num_outputs=2,
            outputs=sparse_gather_outputs,
            spec=lambda hidden, row, weight, eps: aot.sparse_gather_spec(
                hidden.sizes[1], hidden.dtype, weight.dtype, eps
            ),
            sizes=lambda hidden, row, weight: {"M": hidden[0], "R": row[0]},
        ),
    }
