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
    SCORE_CASES,
    STEP_CASES,
    ChooseCase,
    ScoreCase,
    StepCase,
    assert_same,
    check_choose,
    check_score,
    check_step,
    choose_arguments,
    score_arguments,
    step_arguments,
)
from torch import Tensor

from ssv.plugins import aot, launch, reference
from ssv.plugins.contract import Score

LARGE_SCORES = [
    ScoreCase(rows, vocab, hidden=hidden, dtype=dtype, logits=logits)
    for rows, vocab, hidden in ((99, 49_152, 576), (64, 128_256, 4096), (989, 151_936, 512), (1, 262_144, 8192))
    for dtype, logits in ((torch.bfloat16, "random"), (torch.float16, "ties"), (torch.float32, "peaked"))
]
LARGE_STEPS = [
    StepCase(64, 9, judged="all", hidden=4096, dtype=torch.bfloat16),
    StepCase(256, 8, hidden=4096, dtype=torch.bfloat16),
    StepCase(99, 10, hidden=576, dtype=torch.float16),
]


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # the definition's


@pytest.mark.parametrize("case", [*SCORE_CASES, ScoreCase(989, 3, uses_hidden=False), *LARGE_SCORES], ids=str)
def test_score(case: ScoreCase) -> None:
    check_score(launch, case, "cuda")


@pytest.mark.parametrize("case", [*STEP_CASES, *LARGE_STEPS], ids=str)
def test_step(case: StepCase) -> None:
    check_step(launch, case, "cuda")


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


@pytest.mark.parametrize("case", [StepCase(11, 9, hidden=576), LARGE_STEPS[0]], ids=str)
def test_step_ahead_of_time(capability: str, case: StepCase) -> None:
    s = step_arguments(case, "cuda")
    rows, places, hidden = len(s.row_R), case.batch * case.tokens, case.hidden
    sizes = {"B": case.batch, "T": case.tokens, "K": case.tokens - 1, "M": places, "R": rows}
    tolerance = {"rtol": 1.6e-2 if case.dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}

    spec = aot.sparse_gather_spec(hidden, case.dtype, case.dtype, EPS)
    inputs = [s.hidden_BTH, s.zone_BT, s.length_B, s.weight_H]
    normed, row, start = run_ahead(spec, capability, inputs, [(places, hidden), (places,), (case.batch + 1,)], **sizes)
    expected = reference.sparse_gather(s.hidden_BTH, s.zone_BT, s.length_B, s.weight_H, EPS)
    assert start.tolist() == expected.start_B1.tolist()
    assert row[:rows].tolist() == s.row_R.tolist()
    torch.testing.assert_close(normed[:rows], expected.normed_MH[:rows], **tolerance)

    spec = aot.gather_norm_spec(hidden, case.dtype, case.dtype, EPS)
    hidden_MH = s.hidden_BTH.flatten(0, 1)
    outputs = run_ahead(spec, capability, [hidden_MH, s.row_R, s.weight_H], [(rows, hidden)] * 2, **sizes)
    wanted = reference.gather_norm(hidden_MH, s.row_R, s.weight_H, EPS)
    assert torch.equal(outputs[0], wanted[0])
    torch.testing.assert_close(outputs[1], wanted[1], **tolerance)
