"""Awkward arguments for the ops, and how results are compared: for the interpreter and the GPU alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.ops import Ops

EPS = 1e-5


@dataclass(frozen=True)
class ScoreCase:
    """Sizes of a `score`, and what its logits are."""

    rows: int
    vocab: int
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    logits: str = "random"
    uses_hidden: bool = True


def score_arguments(case: ScoreCase, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.vocab)
    logits_RV = torch.randn(case.rows, case.vocab, generator=generator) * 5
    if case.logits == "ties":
        logits_RV[:, :: max(case.vocab // 3, 1)] = 30.0
    elif case.logits == "coarse":  # so few values that the largest stands in many places
        logits_RV = (logits_RV / 5).round().clamp(max=2)
    elif case.logits == "-inf":
        logits_RV[:, torch.rand(case.vocab, generator=generator) < 0.9] = -torch.inf
        logits_RV[:, case.vocab // 2] = 1.0
    elif case.logits == "large":
        logits_RV = (logits_RV * 2000).clamp(-60000, 60000)
    elif case.logits == "peaked":
        logits_RV[:, case.vocab // 2] = logits_RV.max() + 8 + 2 * torch.arange(case.rows) % 12
    elif case.logits == "equal":
        logits_RV = torch.full_like(logits_RV, -3.0)
    hidden_RH = torch.randn(case.rows, case.hidden, generator=generator) * 20
    weight_F = torch.randn(3 + case.hidden * case.uses_hidden, generator=generator) / 4
    bias_1 = torch.randn(1, generator=generator)
    arguments = hidden_RH.to(case.dtype), logits_RV.to(case.dtype), weight_F, bias_1
    return tuple(x.to(device) for x in arguments)


@dataclass(frozen=True)
class GatherCase:
    """Sizes of a `sparse_gather`: rows of a step, and how many of them are named (some twice)."""

    rows: int
    named: int
    hidden: int = 64
    dtype: torch.dtype = torch.float32


def gather_arguments(case: GatherCase, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """States, rows in any order, of which the last two are not there, and the norm's weight."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.named)
    hidden_MH = torch.randn(case.rows, case.hidden, generator=generator).to(case.dtype)
    weight_H = (torch.rand(case.hidden, generator=generator) + 0.5).to(case.dtype)
    named_R = torch.randint(0, max(case.rows, 1), (case.named,), generator=generator)
    row_R = torch.cat((named_R, torch.tensor([-1, case.rows]))).int()
    return hidden_MH.to(device), row_R.to(device), weight_H.to(device)


@dataclass(frozen=True)
class ChooseCase:
    """Sizes of a `choose`, the share of its columns that can be chosen, and whether columns are other tokens."""

    rows: int
    vocab: int
    kept: float = 1.0
    subset: bool = False


def choose_arguments(case: ChooseCase, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.vocab)
    x_RV = torch.randn(case.rows, case.vocab, generator=generator) * 3
    is_left_out_RV = torch.rand(case.rows, case.vocab, generator=generator) >= case.kept
    is_left_out_RV[:, case.vocab // 2] = False
    x_RV[is_left_out_RV] = -torch.inf
    seed_R = torch.randint(-(2**63), 2**63 - 1, (case.rows,), generator=generator)
    position_R = torch.randint(0, 2**17, (case.rows,), generator=generator)
    token_V = torch.randperm(2 * case.vocab, generator=generator)[: case.vocab] if case.subset else None
    return x_RV.to(device), seed_R.to(device), position_R.to(device), token_V if token_V is None else token_V.to(device)


SCORE_CASES = [
    ScoreCase(1, 1),
    ScoreCase(99, 2, uses_hidden=False),
    ScoreCase(2, 49_152, hidden=576, dtype=torch.float16),
    ScoreCase(1, 128_256, dtype=torch.bfloat16),
    ScoreCase(1, 151_936, logits="-inf"),
    ScoreCase(1, 262_144, hidden=1, dtype=torch.bfloat16),
    ScoreCase(3, 989, logits="ties"),
    ScoreCase(3, 5000, logits="ties", dtype=torch.bfloat16),
    ScoreCase(2, 4099, logits="equal"),
    ScoreCase(5, 9000, logits="coarse", dtype=torch.bfloat16),
    ScoreCase(5, 3000, logits="coarse"),
    ScoreCase(3, 5000, logits="large", dtype=torch.float16),
    ScoreCase(3, 5000, logits="large"),
    ScoreCase(4, 5000, logits="peaked"),
    ScoreCase(3, 300, logits="-inf", dtype=torch.float16),
]
GATHER_CASES = [
    GatherCase(0, 0),
    GatherCase(1, 1),
    GatherCase(9, 9),
    GatherCase(9, 1),
    GatherCase(27, 0),
    GatherCase(99, 50),
    GatherCase(132, 70, dtype=torch.bfloat16, hidden=100),
    GatherCase(27, 20, dtype=torch.float16),
]
CHOOSE_CASES = [
    ChooseCase(1, 1),
    ChooseCase(7, 2),
    ChooseCase(5, 99, kept=0.5),
    ChooseCase(99, 17, subset=True),
    ChooseCase(3, 989, kept=0.01, subset=True),
    ChooseCase(2, 4099),
    ChooseCase(2, 49_152, kept=0.001),
    ChooseCase(1, 151_936),
]


def check_score(ops: Ops, case: ScoreCase, device: str) -> None:
    arguments = score_arguments(case, device)
    assert_same(ops.score(*arguments), reference.score(*arguments))


def check_sparse_gather(ops: Ops, case: GatherCase, device: str) -> None:
    arguments = gather_arguments(case, device)
    assert_same_rows(ops.sparse_gather(*arguments, EPS), reference.sparse_gather(*arguments, EPS))


def check_choose(ops: Ops, case: ChooseCase, device: str) -> None:
    arguments = choose_arguments(case, device)
    assert ops.choose(*arguments).tolist() == reference.choose(*arguments).tolist()


def assert_same_rows(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Gathered rows exactly, normed ones to a rounding of their dtype."""
    assert torch.equal(found[0], expected[0])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[expected[1].dtype]
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=1e-5)


def assert_same(found: Any, expected: Any) -> None:
    """Integers exactly, floats to 1e-5."""
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        if a.dtype == torch.int32:
            assert a.tolist() == b.tolist(), field.name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=field.name: f"{name}: {m}")
