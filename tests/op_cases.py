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
    vocab: int = 99
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    accepted: float = 0.8
    coarse: bool = False


@dataclass(frozen=True)
class Step:
    """Arguments of the ops in a verification step."""

    hidden_BTH: Tensor
    zone_BT: Tensor
    length_B: Tensor
    weight_H: Tensor
    logits_RV: Tensor
    target_prob_RV: Tensor
    draft_prob_BKV: Tensor
    row_R: Tensor
    start_B1: Tensor
    drafted_BK: Tensor
    accept_uniform_BK: Tensor
    next_uniform_B: Tensor


def step_arguments(case: StepCase, device: str) -> Step:
    """Drafted tokens are the target's argmax with probability `accepted`."""
    generator = torch.Generator().manual_seed(case.batch * 1000 + case.tokens)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    batch, tokens, vocab = case.batch, case.tokens, case.vocab
    hidden_BTH = torch.randn(batch, tokens, case.hidden, generator=generator).to(case.dtype)
    weight_H = (rand(case.hidden) + 0.5).to(case.dtype)
    zone_BT = {"all": torch.ones, "none": torch.zeros}.get(case.judged, torch.zeros)(batch, tokens).int()
    length_B = torch.full((batch,), 0 if case.judged == "empty" else tokens, dtype=torch.int32)
    if case.judged == "some":
        zone_BT = torch.randint(0, 3, (batch, tokens), generator=generator).int()
        length_B = torch.randint(0, tokens + 1, (batch,), generator=generator).int()
    judged = reference.sparse_gather(hidden_BTH, zone_BT, length_B, weight_H, EPS)
    rows = int(judged.start_B1[-1])
    row_R = judged.row_M[:rows].clone()
    logits_RV = (torch.randn(rows, vocab, generator=generator) * 4).to(case.dtype)
    if case.coarse:  # the largest stands in many places
        logits_RV = (logits_RV / 4).round().clamp(max=2)
    drafted_BK = torch.randint(0, vocab, (batch, tokens - 1), generator=generator).int()
    best_R = reference.most_likely(logits_RV)
    for r, row in enumerate(row_R.tolist()):
        b, k = divmod(row, tokens)
        if k < tokens - 1 and rand(1) < case.accepted:
            drafted_BK[b, k] = best_R[r]
    draft_prob_BKV = (torch.randn(batch, tokens - 1, vocab, generator=generator) * 2).softmax(dim=2)
    arguments = (
        hidden_BTH, zone_BT, length_B, weight_H, logits_RV, logits_RV.float().softmax(dim=1), draft_prob_BKV,
        row_R, judged.start_B1, drafted_BK, rand(batch, tokens - 1), rand(batch),
    )  # fmt: skip
    return Step(*(x.to(device) for x in arguments))


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
    StepCase(3, 9, dtype=torch.float16, accepted=1.0),
    StepCase(3, 9, vocab=3000, coarse=True),
    StepCase(2, 4, vocab=9000, judged="all", coarse=True, dtype=torch.bfloat16),
    StepCase(2, 3, vocab=1, judged="all"),
    StepCase(2, 3, vocab=49_152, judged="all"),
    StepCase(1, 2, vocab=151_936, judged="all", dtype=torch.bfloat16),
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

    judged = s.row_R, s.start_B1, s.drafted_BK
    assert_same(ops.verify_greedy(s.logits_RV, *judged), reference.verify_greedy(s.logits_RV, *judged))
    sampled = s.target_prob_RV, s.draft_prob_BKV, *judged, s.accept_uniform_BK, s.next_uniform_B
    assert_same(ops.verify_sampled(*sampled), reference.verify_sampled(*sampled))
    # Where p and q are the same nothing is rejected; where p is nowhere above q, what is rejected is drawn from p.
    nothing = s.target_prob_RV * 0, *sampled[1:]
    assert_same(ops.verify_sampled(*nothing), reference.verify_sampled(*nothing))
    strange = torch.where(s.drafted_BK % 2 == 0, s.drafted_BK - case.vocab - 1, s.drafted_BK + case.vocab)
    unknown = *sampled[:4], strange, *sampled[5:]
    assert_same(ops.verify_sampled(*unknown), reference.verify_sampled(*unknown))
    uniform_R = torch.linspace(0, 1, rows, device=device)
    assert torch.equal(ops.draw(s.target_prob_RV, uniform_R), reference.draw(s.target_prob_RV, uniform_R))


def assert_same(found: Any, expected: Any) -> None:
    """Integers exactly, floats to 1e-5."""
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        if a.dtype == torch.int32:
            assert a.tolist() == b.tolist(), field.name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=field.name: f"{name}: {m}")
