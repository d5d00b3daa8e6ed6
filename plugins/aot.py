"""Kernels compiled ahead of time: PTX for a GPU that need not be there, and how TensorRT launches it.

A kernel of TensorRT's "quickly deployable plugins" is launched with pointers to its inputs, then int32 scalars, then
pointers to its outputs, and nothing else: no scratch memory, no floats. So these are the kernels with SPLITS = 1,
specialised to a model's sizes.

Shapes: see `contract.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ssv.plugins import kernels, launch
from ssv.plugins.contract import NUM_CONFIDENCE, OpError

_PTX_VERSIONS = {
    **dict.fromkeys(("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"), 87),
    **dict.fromkeys(("10.3", "12.1"), 88),
    "11.0": 90,
}
"""Compute capabilities, and the PTX for each: 8.7, of CUDA 12.8, or the first that knows it.

A driver refuses PTX newer than itself.
"""

_MAX_SHARED_BYTES = 48 * 1024
"""A kernel may use this much without asking for more, which TensorRT's interface has no place for."""

_ALONE = {"SPLITS": 1, "partial": None, "arrived": None}
"""Constants of a kernel of which each program has a whole row, and which so needs no scratch memory."""

Sizes = Mapping[str, Any]
"""A step's sizes by their letter, as numbers or as TensorRT's symbolic expressions: M and R."""

_LETTERS: Sizes = {"M": "M", "R": "R"}
"""The sizes in what is written down."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A kernel to be compiled.

    Attributes:
        inputs, outputs: dtypes of the tensors, in the order of the kernel's arguments.
        scalars: names of the int32 arguments between them.
        constants: what the kernel is specialised to.
        num_warps: of a program.
        grid, scalar_values: number of programs, and values of the scalars, for a step's sizes.
    """

    name: str
    kernel: JITFunction
    inputs: Mapping[str, torch.dtype]
    scalars: Sequence[str]
    outputs: Mapping[str, torch.dtype]
    constants: Mapping[str, int | float | bool | None]
    num_warps: int
    grid: Callable[[Sizes], Any]
    scalar_values: Callable[[Sizes], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Artefact:
    """A compiled kernel.

    Attributes:
        entry: its name in the PTX.
        arguments: names, in the order of a launch.
        threads: of a block; blocks lie along x.
        shared_bytes: dynamic shared memory of a block.
    """

    spec: Spec
    capability: str
    entry: str
    ptx: str
    threads: int
    shared_bytes: int

    @property
    def arguments(self) -> list[str]:
        return [*self.spec.inputs, *self.spec.scalars, *self.spec.outputs]


def score_spec(hidden: int, vocab: int, hidden_type: torch.dtype, logits_type: torch.dtype, num_features: int) -> Spec:
    """`score` of [R, H] hidden states and [R, V] logits."""
    f, i = torch.float32, torch.int32
    return Spec(
        name="score",
        kernel=kernels.score_kernel,
        inputs={"hidden": hidden_type, "logits": logits_type, "weight": f, "bias": f},
        scalars=(),
        outputs={"token": i, "prob": f, "entropy": f, "margin": f, "reject_prob": f},
        constants={
            **launch.score_constants(hidden, vocab, logits_type, num_features > NUM_CONFIDENCE, 1, launch.LANES),
            **_ALONE,
        },
        num_warps=launch.WARPS,
        grid=lambda sizes: sizes["R"],
        scalar_values=lambda sizes: (),
    )


def sparse_gather_spec(hidden: int, hidden_type: torch.dtype, norm_type: torch.dtype, eps: float) -> Spec:
    """`sparse_gather` of [M, H] hidden states and R rows."""
    return Spec(
        name="sparse_gather",
        kernel=kernels.sparse_gather_kernel,
        inputs={"hidden": hidden_type, "row": torch.int32, "weight": norm_type},
        scalars=("num_rows",),
        outputs={"gathered": hidden_type, "normed": norm_type},
        constants=launch.gather_constants(hidden, eps),
        num_warps=launch.row_warps(hidden),
        grid=lambda sizes: sizes["R"],
        scalar_values=lambda sizes: (sizes["M"],),
    )


def compile_ahead(spec: Spec, capability: str) -> Artefact:
    """Compiles a kernel for a compute capability such as "9.0", and assembles it once to see that it can be.

    Raises:
        OpError: the capability is unknown, kernels are being interpreted, or the kernel cannot be launched as TensorRT
            does.
    """
    if capability not in _PTX_VERSIONS:  # the compiler would end the process
        raise OpError(f"{spec.name}: compute capability", f"one of {', '.join(_PTX_VERSIONS)}", capability)
    if not isinstance(spec.kernel, JITFunction):
        raise OpError(f"{spec.name}: kernel", "one that Triton compiles", "an interpreted one: unset TRITON_INTERPRET")
    names = spec.kernel.arg_names
    types = {name: f"*{_triton_type(dtype)}" for name, dtype in (*spec.inputs.items(), *spec.outputs.items())}
    types |= {name: "i32" for name in spec.scalars}
    assert [name for name in names if name in types] == [*spec.inputs, *spec.scalars, *spec.outputs]
    source = ASTSource(
        fn=spec.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in spec.constants.items()},
        # TensorRT's tensors begin at multiples of 256 bytes.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, t in types.items() if t[0] == "*"},
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # paths of this machine
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", int(capability.replace(".", "")), 32),
            options={"num_warps": spec.num_warps, "ptx_version": _PTX_VERSIONS[capability]},
        )
    meta = compiled.metadata
    if meta.global_scratch_size or meta.profile_scratch_size or meta.shared > _MAX_SHARED_BYTES:
        found = f"{meta.shared} bytes and {meta.global_scratch_size} of scratch"
        raise OpError(f"{spec.name}: memory", f"at most {_MAX_SHARED_BYTES} bytes shared and no scratch", found)
    ptx = _without_hidden_arguments(compiled.asm["ptx"], len(types))
    artefact = Artefact(spec, capability, meta.name, ptx, 32 * spec.num_warps, meta.shared)
    assemble(artefact)
    return artefact


def assemble(artefact: Artefact) -> str:
    """Runs NVIDIA's assembler on a compiled kernel; returns what it says of registers and memory.

    Raises:
        OpError: it refuses the kernel.
    """
    target = re.search(r"^\.target (sm_\w+)", artefact.ptx, re.MULTILINE)
    assert target is not None
    tools = triton.knobs.nvidia
    # From 3.7 on Triton has an assembler of its own for Blackwell.
    is_blackwell = float(artefact.capability) >= 10
    ptxas = getattr(tools, "ptxas_blackwell", tools.ptxas) if is_blackwell else tools.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(artefact.ptx)
        command = [ptxas.path, f"-arch={target.group(1)}", "-v", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise OpError(
            f"{artefact.spec.name}: PTX for {artefact.capability}", "one that ptxas takes", done.stderr.strip()
        )
    return done.stderr


def write_artefact(artefact: Artefact, folder: Path) -> Path:
    """Writes a kernel's PTX and, beside it, a JSON file that says how it is launched; returns the PTX's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{artefact.spec.name}-sm_{artefact.capability.replace('.', '')}.ptx"
    spec = artefact.spec
    types = {**spec.inputs, **dict.fromkeys(spec.scalars, torch.int32), **spec.outputs}
    facts = {
        "entry": artefact.entry,
        "capability": artefact.capability,
        "threads": artefact.threads,
        "shared_bytes": artefact.shared_bytes,
        "grid": str(spec.grid(_LETTERS)),
        "arguments": [
            {"name": name, "kind": kind, "type": str(types[name]).removeprefix("torch.")}
            for kind, group in (("input", spec.inputs), ("scalar", spec.scalars), ("output", spec.outputs))
            for name in group
        ],
        "scalars": dict(zip(spec.scalars, map(str, spec.scalar_values(_LETTERS)), strict=True)),
        "constants": dict(spec.constants),
        "triton": triton.__version__,
    }
    path.write_text(artefact.ptx)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    return path


def _without_hidden_arguments(ptx: str, num_arguments: int) -> str:
    """Takes from an entry's arguments the pointers to scratch memory, which TensorRT does not pass.

    Triton adds them, and a kernel without scratch does not read them.

    Raises:
        OpError: the kernel does read them.
    """
    head = re.search(r"\.entry (\w+)\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert head is not None
    lines = head.group(2).split(",\n")
    for index in range(num_arguments, len(lines)):
        if len(re.findall(rf"\b{head.group(1)}_param_{index}\b", ptx)) > 1:
            raise OpError(
                f"{head.group(1)}: arguments", f"{num_arguments}", f"a kernel that reads argument {index + 1}"
            )
    return ptx.replace(head.group(2), ",\n".join(lines[:num_arguments]), 1)


def _triton_type(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}[dtype]
