"""Kernels compiled ahead of time, for GPUs that are not here: what is in them, and which are refused.

Triton compiles nothing in a process that interprets its kernels, as other tests do: all is compiled in one of its own.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import qdp
import torch
from checkout import ROOT

from ssv.plugins.contract import OpError

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HIDDEN, VOCAB, DRAFTED, EPS = 192, 5000, 6, 1e-5
TARGETS = {"8.0": "sm_80", "8.9": "sm_89", "9.0": "sm_90a", "10.0": "sm_100a", "12.0": "sm_120a"}

# Arguments of each kernel: inputs, int32 scalars, outputs; x is the type it is compiled for.
ARGUMENTS = {
    "score": ("hidden:x logits:x weight:float32 bias:float32", "",
              "token:int32 prob:float32 entropy:float32 margin:float32 reject_prob:float32"),
    "sparse_gather": ("hidden:float32 row:int32 weight:x", "num_rows", "gathered:float32 normed:x"),
}  # fmt: skip
LAUNCHES = {
    "score": ("R", {}),
    "sparse_gather": ("R", {"num_rows": "M"}),
}
KERNELS = [
    (op, capability, BF16 if capability in ("8.9", "10.0") else FP16) for op in ARGUMENTS for capability in TARGETS
]


def specs(dtype: torch.dtype) -> dict[str, Any]:
    from ssv.plugins import aot

    return {
        "score": aot.score_spec(HIDDEN, VOCAB, dtype, dtype, HIDDEN + 3),
        "sparse_gather": aot.sparse_gather_spec(HIDDEN, FP32, dtype, EPS),
    }


def compiled() -> dict[str, Any]:
    """All facts, for a process of its own."""
    from ssv.plugins import aot

    artefacts = [aot.compile_ahead(specs(dtype)[op], capability) for op, capability, dtype in KERNELS]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for artefact in artefacts:
            path = aot.write_artefact(artefact, Path(folder) / "new")
            kernel = {
                "file": path.name,
                "ptx": path.read_text(),
                "written": json.loads(path.with_suffix(".json").read_text()),
            }
            kernel |= {"entry": artefact.entry, "threads": artefact.threads, "shared_bytes": artefact.shared_bytes}
            kernels.append({**kernel, "arguments": artefact.arguments, "warps": artefact.spec.num_warps})
    return {"kernels": kernels, "refusals": refusals(aot, artefacts[0]), "assembled": aot.assemble(artefacts[0])}


def refusals(aot: Any, artefact: Any) -> dict[str, str]:
    from triton.runtime.interpreter import InterpretedFunction

    spec = artefact.spec
    interpreted = replace(spec, kernel=InterpretedFunction(spec.kernel.fn))
    damaged = artefact.ptx.replace("ret;", "return;")
    found = {
        "interpreted": told(lambda: aot.compile_ahead(interpreted, "9.0")),
        "damaged": told(lambda: aot.assemble(replace(artefact, ptx=damaged))),
        "other GPU": told(lambda: aot.assemble(replace(artefact, ptx=artefact.ptx.replace("sm_80", "sm_999")))),
        "hidden": told(lambda: aot._without_hidden_arguments(artefact.ptx, len(artefact.arguments) - 1)),
        "shared": told(lambda: with_memory(aot, spec, shared=49153)),
        "scratch": told(lambda: with_memory(aot, spec, global_scratch_size=16)),
    }
    with mock.patch.object(aot, "_without_hidden_arguments", return_value=damaged):
        found["damaged on the way"] = told(lambda: aot.compile_ahead(spec, "8.0"))
    # LLVM ends the process for a GPU that it does not know.
    with mock.patch.object(aot.triton, "compile", side_effect=RuntimeError("compiled")):
        for capability in ("9", "99.9"):
            found[capability] = told(lambda capability=capability: aot.compile_ahead(spec, capability))
    return found


def with_memory(aot: Any, spec: Any, **sizes: int) -> None:
    """Compiles a kernel that needs so much."""
    compile_ = aot.triton.compile

    def demanding(*args: Any, **settings: Any) -> Any:
        kernel = compile_(*args, **settings)
        kernel.metadata = kernel.metadata._replace(**sizes)
        return kernel

    with mock.patch.object(aot.triton, "compile", demanding):
        aot.compile_ahead(spec, "8.0")


def told(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (OpError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qdp.apart(Path(__file__), "compiled", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=range(len(KERNELS)), ids=lambda i: " ".join(str(x).removeprefix("torch.") for x in KERNELS[i]))
def case(request: pytest.FixtureRequest, facts: Any) -> tuple[Any, ...]:
    """Op, capability, type and facts of a kernel."""
    return (*KERNELS[request.param], facts["kernels"][request.param])


def test_kernels_are_for_their_gpu_and_for_drivers_that_know_it(case: Any) -> None:
    _, capability, _, found = case
    assert re.findall(r"^\.target (\w+)$", found["ptx"], re.MULTILINE) == [TARGETS[capability]]
    (version,) = re.findall(r"^\.version (\d+)\.(\d+)$", found["ptx"], re.MULTILINE)
    assert tuple(map(int, version)) <= (8, 7)


def test_kernels_take_inputs_then_scalars_then_outputs_and_nothing_else(case: Any) -> None:
    op, _, _, found = case
    inputs, scalars, outputs = (len(group.split()) for group in ARGUMENTS[op])
    assert qdp.entry_parameters(found["ptx"]) == ["u64"] * inputs + ["u32"] * scalars + ["u64"] * outputs
    assert found["arguments"] == [each.partition(":")[0] for group in ARGUMENTS[op] for each in group.split()]
    assert found["ptx"].count(".entry") == 1
    assert f".entry {found['entry']}(" in found["ptx"]


def test_kernels_are_launched_with_the_threads_and_memory_that_they_have(case: Any) -> None:
    *_, found = case
    assert found["threads"] == 32 * found["warps"]
    assert re.findall(r"^\.reqntid (.*)$", found["ptx"], re.MULTILINE) == [str(found["threads"])]
    assert 0 <= found["shared_bytes"] <= 48 * 1024
    assert (".shared" in found["ptx"]) == (found["shared_bytes"] > 0)


def test_kernels_tell_nothing_of_the_machine_that_compiled_them(case: Any) -> None:
    *_, found = case
    for trace in (".file", ".loc", ".section", "/root", "/home", "/tmp", str(ROOT), ".py"):
        assert trace not in found["ptx"]


def test_what_is_written_says_how_a_kernel_is_launched(case: Any) -> None:
    op, capability, dtype, found = case
    assert found["file"] == f"{op}-sm_{capability.replace('.', '')}.ptx"
    written, (grid, scalars) = dict(found["written"]), LAUNCHES[op]
    assert re.fullmatch(r"\d+\.\d+\.\d+", written.pop("triton"))
    constants = written.pop("constants")
    arguments = [
        {"name": name, "kind": kind, "type": kept.replace("x", str(dtype).removeprefix("torch.")) or "int32"}
        for kind, group in zip(("input", "scalar", "output"), ARGUMENTS[op], strict=True)
        for name, _, kept in (each.partition(":") for each in group.split())
    ]
    launched = {"entry": f"{op}_kernel", "threads": found["threads"], "shared_bytes": found["shared_bytes"]}
    assert written == {**launched, "capability": capability, "grid": grid, "arguments": arguments, "scalars": scalars}
    known = {"HIDDEN": HIDDEN, "VOCAB": VOCAB, "EPS": EPS, "SPLITS": 1, "partial": None, "arrived": None}
    assert {name: value for name, value in constants.items() if name in known}.items() <= known.items()
    assert constants.keys() >= ({"HIDDEN", "EPS"} if "gather" in op else {"VOCAB", "SPLITS", "partial", "arrived"})


def test_the_assembler_tells_of_registers(facts: Any) -> None:
    assert re.search(r"Used \d+ registers", facts["assembled"])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("9", r"score: compute capability: expected .*, got 9"),
        ("99.9", r"score: compute capability: expected one of 7\.5, .*12\.1.*, got 99\.9"),
        ("interpreted", r"score: kernel: expected one that Triton compiles, got .*: unset TRITON_INTERPRET"),
        ("hidden", r"score_kernel: arguments: expected 8, got a kernel that reads argument 9"),
        (
            "shared",
            r"score: memory: expected at most 49152 bytes shared and no scratch, got 49153 bytes and 0 of scratch",
        ),
        ("scratch", r"score: memory: expected at most 49152 bytes .*, got \d+ bytes and 16 of scratch"),
        ("damaged", r"score: PTX for 8\.0: expected one that ptxas takes, got .*return.*"),
        ("damaged on the way", r"score: PTX for 8\.0: expected one that ptxas takes, got .*return.*"),
        ("other GPU", r"score: PTX for 8\.0: expected one that ptxas takes, got .*sm_999.*"),
    ],
)
def test_refused_kernels(facts: Any, kernel: str, message: str) -> None:
    assert re.fullmatch(f"OpError: {message}", facts["refusals"][kernel], re.DOTALL), facts["refusals"][kernel]
