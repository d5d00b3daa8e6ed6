"""Awkward arguments for the ops, and how results are compared: for the interpreter and the GPU alike."""

from __future__ import annotations

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
class StepCase:
    """Sizes of a verification step: sequences, tokens of each, and which of them are judged."""

    batch: int
    tokens: int
    judged: str = "some"  # all, none (but the bonus rows), some (and ragged), or empty (no sequence has rows)
    hidden: int = 64
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Step:
    """Arguments of the ops in a verification step."""

    hidden_BTH: Tensor
    zone_BT: Tensor
    length_B: Tensor
    weight_H: Tensor
    row_R: Tensor


def step_arguments(case: StepCase, device: str) -> Step:
    generator = torch.Generator().manual_seed(case.batch * 1000 + case.tokens)
    batch, tokens = case.batch, case.tokens
    hidden_BTH = torch.randn(batch, tokens, case.hidden, generator=generator).to(case.dtype)
    weight_H = (torch.rand(case.hidden, generator=generator) + 0.5).to(case.dtype)
    zone_BT = {"all": torch.ones, "none": torch.zeros}.get(case.judged, torch.zeros)(batch, tokens).int()
    length_B = torch.full((batch,), 0 if case.judged == "empty" else tokens, dtype=torch.int32)
    if case.judged == "some":
        zone_BT = torch.randint(0, 3, (batch, tokens), generator=generator).int()
        length_B = torch.randint(0, tokens + 1, (batch,), generator=generator).int()
    judged = reference.sparse_gather(hidden_BTH, zone_BT, length_B, weight_H, EPS)
    arguments = hidden_BTH, zone_BT, length_B, weight_H, judged.row_M[: int(judged.start_B1[-1])].clone()
    return Step(*(x.to(device) for x in arguments))


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
STEP_CASES = [
    StepCase(1, 1, judged="all"),
    StepCase(1, 9, judged="all"),
    StepCase(1, 9, judged="none"),
    StepCase(3, 9, judged="empty"),
    StepCase(11, 9),
    StepCase(4, 33, dtype=torch.bfloat16, hidden=100),
    StepCase(3, 9, dtype=torch.float16),
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


def check_step(ops: Ops, case: StepCase, device: str) -> None:
    """All ops of a step, against the definition."""
    s = step_arguments(case, device)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]
    found = ops.sparse_gather(s.hidden_BTH, s.zone_BT, s.length_B, s.weight_H, EPS)
    expected = reference.sparse_gather(s.hidden_BTH, s.zone_BT, s.length_B, s.weight_H, EPS)
    rows = len(s.row_R)
    assert found.start_B1.tolist() == expected.start_B1.tolist()
    assert found.row_M[:rows].tolist() == s.row_R.tolist()
    torch.testing.assert_close(found.normed_MH[:rows], expected.normed_MH[:rows], rtol=tolerance, atol=1e-5)

    hidden_MH = s.hidden_BTH.flatten(0, 1)
    row_R = torch.cat((s.row_R, s.row_R.new_tensor([-1, len(hidden_MH)])))  # two that give zeros
    gathered = ops.gather_norm(hidden_MH, row_R, s.weight_H, EPS)
    wanted = reference.gather_norm(hidden_MH, row_R, s.weight_H, EPS)
    assert torch.equal(gathered[0], wanted[0])
    torch.testing.assert_close(gathered[1], wanted[1], rtol=tolerance, atol=1e-5)


def check_choose(ops: Ops, case: ChooseCase, device: str) -> None:
    arguments = choose_arguments(case, device)
    assert ops.choose(*arguments).tolist() == reference.choose(*arguments).tolist()


def assert_same(found: Any, expected: Any) -> None:
    """Integers exactly, floats to 1e-5."""
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        if a.dtype == torch.int32:
            assert a.tolist() == b.tolist(), field.name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=field.name: f"{name}: {m}")
