"""The Triton kernels on a GPU against the definition, compiled as they are called and compiled ahead of time. Needs any
NVIDIA GPU.

make test-gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_driver import launch as driver_launch
from op_cases import (
    CHOOSE_CASES,
    EPS,
    GATHER_CASES,
    SCORE_CASES,
    ChooseCase,
    GatherCase,
    ScoreCase,
    assert_same,
    assert_same_rows,
    check_choose,
    check_score,
    check_sparse_gather,
    choose_arguments,
    gather_arguments,
    score_arguments,
)
from torch import Tensor

from ssv.plugins import aot, launch, reference
from ssv.plugins.contract import Score

LARGE_SCORES = [
    ScoreCase(rows, vocab, hidden=hidden, dtype=dtype, logits=logits)
    for rows, vocab, hidden in ((99, 49_152, 576), (64, 128_256, 4096), (989, 151_936, 512), (1, 262_144, 8192))
    for dtype, logits in ((torch.bfloat16, "random"), (torch.float16, "ties"), (torch.float32, "peaked"))
]
LARGE_GATHERS = [
    GatherCase(576, 576, hidden=4096, dtype=torch.bfloat16),
    GatherCase(2048, 989, hidden=4096, dtype=torch.bfloat16),
    GatherCase(990, 300, hidden=576, dtype=torch.float16),
]


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # the definition's


@pytest.mark.parametrize("case", [*SCORE_CASES, ScoreCase(989, 3, uses_hidden=False), *LARGE_SCORES], ids=str)
def test_score(case: ScoreCase) -> None:
    check_score(launch, case, "cuda")


@pytest.mark.parametrize("case", [*GATHER_CASES, *LARGE_GATHERS], ids=str)
def test_sparse_gather(case: GatherCase) -> None:
    check_sparse_gather(launch, case, "cuda")


@pytest.mark.parametrize(
    "case", [*CHOOSE_CASES, ChooseCase(64, 128_256), ChooseCase(576, 49_152, kept=0.002, subset=True)], ids=str
)
def test_choose(case: ChooseCase) -> None:
    check_choose(launch, case, "cuda")


def test_many_launches_give_the_same() -> None:
    # What programs leave for the last of them has to be there when it looks, every time.
    arguments = score_arguments(ScoreCase(7, 128_256, dtype=torch.bfloat16), "cuda")
    chosen = choose_arguments(ChooseCase(5, 128_256), "cuda")
    score, index_R = reference.score(*arguments), reference.choose(*chosen)
    for _ in range(300):
        found = launch.score(*arguments)
        assert torch.equal(found.token_R, score.token_R)
        assert torch.allclose(found.entropy_R, score.entropy_R, rtol=1e-5, atol=1e-5)
        assert torch.equal(launch.choose(*chosen), index_R)


def test_two_streams_do_not_share_counters() -> None:
    arguments = score_arguments(ScoreCase(3, 128_256, dtype=torch.bfloat16), "cuda")
    expected = launch.score(*arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(launch.score(*arguments).reject_prob_R)
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected.reject_prob_R) for each in found)


def test_ops_in_a_cuda_graph() -> None:
    arguments = score_arguments(ScoreCase(9, 49_152, dtype=torch.bfloat16), "cuda")
    chosen = choose_arguments(ChooseCase(27, 49_152, kept=0.01), "cuda")

    def run() -> tuple[Score, Tensor]:
        return launch.score(*arguments), launch.choose(*chosen)

    expected = run()  # compiled before it is captured; no op may wait for the device in it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


# --- compiled ahead of time -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def capability() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory in which nothing looks like a result."""
    return torch.full(shape, -77, dtype=dtype, device="cuda")


def run_ahead(
    spec: aot.Spec, capability: str, inputs: list[Tensor], shapes: list[tuple[int, ...]], **sizes: int
) -> Any:
    outputs = [poisoned(*shape, dtype=dtype) for shape, dtype in zip(shapes, spec.outputs.values(), strict=True)]
    assert [x.dtype for x in inputs] == list(spec.inputs.values())
    driver_launch(aot.compile_ahead(spec, capability), inputs, outputs, sizes)
    return outputs


@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("rows", [1, 99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_score_ahead_of_time(capability: str, rows: int, dtype: torch.dtype, uses_hidden: bool) -> None:
    case = ScoreCase(rows, 128_256, hidden=4096, dtype=dtype, uses_hidden=uses_hidden)
    arguments = score_arguments(case, "cuda")
    spec = aot.score_spec(case.hidden, case.vocab, dtype, dtype, len(arguments[2]))
    outputs = run_ahead(spec, capability, [*arguments], [(rows,)] * 5, R=rows)
    assert_same(Score(*outputs), reference.score(*arguments))


@pytest.mark.parametrize("case", [GatherCase(99, 50, hidden=576), LARGE_GATHERS[0]], ids=str)
def test_sparse_gather_ahead_of_time(capability: str, case: GatherCase) -> None:
    hidden_MH, row_R, weight_H = gather_arguments(case, "cuda")
    spec = aot.sparse_gather_spec(case.hidden, case.dtype, case.dtype, EPS)
    shapes, sizes = [(len(row_R), case.hidden)] * 2, {"M": case.rows, "R": len(row_R)}
    outputs = run_ahead(spec, capability, [hidden_MH, row_R, weight_H], shapes, **sizes)
    assert_same_rows(outputs, reference.sparse_gather(hidden_MH, row_R, weight_H, EPS))
