"""The Triton kernels in Triton's interpreter, against the definition."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    CHOOSE_CASES,
    GATHER_CASES,
    SCORE_CASES,
    ChooseCase,
    GatherCase,
    ScoreCase,
    assert_same,
    check_choose,
    check_score,
    check_sparse_gather,
    choose_arguments,
    score_arguments,
)

from ssv.plugins import launch, reference
from ssv.plugins.contract import OpError
from ssv.plugins.ops import on


def shrink(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """Small programs, so that small rows have several tiles; for long rows large ones, or they would take minutes."""
    is_long = vocab > 10_000
    monkeypatch.setattr(launch, "LANES", 256 if is_long else 16)
    monkeypatch.setattr(launch, "SCORE_LANES", 256 if is_long else 16)


@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_score(monkeypatch: pytest.MonkeyPatch, case: ScoreCase) -> None:
    shrink(monkeypatch, case.vocab)
    check_score(launch, case, "cpu")


@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_shared_by_programs_is_one_row(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    # With four shares the last is shorter, and its last tile too.
    monkeypatch.setattr(launch, "_score_splits", lambda rows, vocab, dtype, device: splits)
    monkeypatch.setattr(launch, "LANES", 128)
    for logits in ("random", "ties"):
        check_score(launch, ScoreCase(2, 20_000, logits=logits, dtype=torch.bfloat16), "cpu")


def test_score_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1)
    check_score(launch, ScoreCase(989, 3, uses_hidden=False), "cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
def test_a_row_without_a_distribution_is_nan_and_alone(monkeypatch: pytest.MonkeyPatch, bad: float | str) -> None:
    shrink(monkeypatch, 1)
    hidden_RH, logits_RV, weight_F, bias_1 = score_arguments(ScoreCase(3, 300), "cpu")
    expected = launch.score(hidden_RH, logits_RV, weight_F, bias_1)
    logits_RV[1, 200 if isinstance(bad, float) else slice(None)] = bad if isinstance(bad, float) else -torch.inf
    found = launch.score(hidden_RH, logits_RV, weight_F, bias_1)
    for name in ("prob_R", "entropy_R", "margin_R", "reject_prob_R"):
        assert getattr(found, name)[1].isnan()
        assert torch.equal(getattr(found, name)[::2], getattr(expected, name)[::2])
    assert 0 <= int(found.token_R[1]) < 300


@pytest.mark.parametrize("case", GATHER_CASES, ids=str)
def test_sparse_gather(case: GatherCase) -> None:
    check_sparse_gather(launch, case, "cpu")


@pytest.mark.parametrize("case", CHOOSE_CASES, ids=str)
def test_choose(monkeypatch: pytest.MonkeyPatch, case: ChooseCase) -> None:
    monkeypatch.setattr(launch, "CHOOSE_BLOCK", 16_384 if case.vocab > 10_000 else 64)
    check_choose(launch, case, "cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
def test_a_row_without_a_distribution_chooses_nothing(monkeypatch: pytest.MonkeyPatch, bad: float | str) -> None:
    monkeypatch.setattr(launch, "CHOOSE_BLOCK", 64)
    arguments = choose_arguments(ChooseCase(3, 300), "cpu")
    expected = launch.choose(*arguments).tolist()
    arguments[0][1, 200 if isinstance(bad, float) else slice(None)] = bad if isinstance(bad, float) else -torch.inf
    assert launch.choose(*arguments).tolist() == [expected[0], -1, expected[2]]


def test_989_rows_are_gathered() -> None:
    hidden_MH = torch.randn(989, 8, generator=torch.Generator().manual_seed(0))
    row_R = torch.arange(989, dtype=torch.int32).flip(0)
    assert torch.equal(launch.sparse_gather(hidden_MH, row_R, torch.ones(8), 1e-5)[0], hidden_MH.flip(0))


def test_no_rows() -> None:
    score = launch.score(torch.empty(0, 8), torch.empty(0, 30), torch.zeros(11), torch.zeros(1))
    assert score.token_R.shape == score.reject_prob_R.shape == (0,)
    empty = torch.empty(0, dtype=torch.int32)
    gathered, normed = launch.sparse_gather(torch.zeros(3, 8), empty, torch.ones(8), 1e-5)
    assert gathered.shape == normed.shape == (0, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    assert launch.choose(torch.empty(0, 30), nothing, nothing).shape == (0,)


def test_counters_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launch, "_arrivals", lambda num, device: counters)
    monkeypatch.setattr(launch, "_score_splits", lambda rows, vocab, dtype, device: 2)
    arguments = score_arguments(ScoreCase(3, 9000, dtype=torch.bfloat16), "cpu")
    for _ in range(2):
        assert_same(launch.score(*arguments), reference.score(*arguments))
        assert not counters.any()


def test_kernels_refuse_what_the_definition_refuses() -> None:
    hidden_RH, logits_RV, weight_F, bias_1 = score_arguments(ScoreCase(3, 30), "cpu")
    with pytest.raises(OpError, match=r"score: logits: expected a contiguous tensor, got strides \(1, 3\)"):
        launch.score(hidden_RH, logits_RV.t().contiguous().t(), weight_F, bias_1)
    with pytest.raises(OpError, match="score: weight: expected float32, got float16"):
        launch.score(hidden_RH, logits_RV, weight_F.half(), bias_1)


def test_the_definition_runs_on_the_cpu_and_kernels_on_cuda() -> None:
    assert on(torch.device("cpu")) is reference
    assert on(torch.device("cuda")) is launch
