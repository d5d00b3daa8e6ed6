"""The loss of an LM head and its gradient: against autograd, and the kernels, in Triton's interpreter, against both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error
from torch import Tensor

from ssv.builder.training import head_loss, kernels
from ssv.builder.training.head_loss import HeadLoss, head_loss_

every_share = pytest.mark.parametrize("tv_share", [0.0, 0.9, 1.0])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(logits_RV: Tensor, label_RV: Tensor, weight_R: Tensor, tv_share: float) -> Tensor:
    """Losses of the rows, as they are defined."""
    p, q = label_RV.softmax(-1), logits_RV.softmax(-1)
    variation = (p - q).abs().sum(-1) / 2
    return weight_R * (tv_share * variation + (1 - tv_share) * -(p * q.log()).sum(-1))


@every_share
def test_loss_and_gradient_are_autograds(tv_share: float) -> None:
    logits, label, weight = random(7, 50) * 2, random(7, 50, seed=1) * 2, torch.rand(7)
    label[3] = 2 * logits[3]  # where both are the same, the variation has no gradient
    weight[4] = 0
    leaf = logits.double().requires_grad_()
    expected = by_hand(leaf, label.double(), weight.double(), tv_share)
    expected.sum().backward()
    loss, agrees = torch.empty(7), torch.empty(7, dtype=torch.int8)
    wanted_agrees = logits.argmax(-1) == label.argmax(-1)
    head_loss_(logits, label, weight, loss, agrees, tv_share)
    assert leaf.grad is not None
    assert torch.allclose(loss.double(), expected.detach(), atol=1e-5)
    assert torch.allclose(logits.double(), leaf.grad, atol=1e-6)
    assert torch.equal(agrees.bool(), wanted_agrees) and agrees[3]


@every_share
@pytest.mark.parametrize("rank", [0, 6])
def test_what_is_trained_gets_autograds_gradient(tv_share: float, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hidden state and of the trained columns, with rows that take several turns."""
    monkeypatch.setattr(head_loss, "_CHUNK", 4)
    x, fixed, trained = random(11, 8 + rank), random(30, 8, seed=1), random(30, rank, seed=2)
    label, weight = random(11, 30, seed=3) * 2, torch.rand(11)
    mine = [x.clone().requires_grad_(), trained.clone().requires_grad_()]
    loss, agrees = HeadLoss.apply(mine[0], fixed, mine[1] if rank else None, label, weight, tv_share)
    (3 * loss).backward()
    theirs = [x.clone().requires_grad_(), trained.clone().requires_grad_()]
    logits = theirs[0] @ torch.cat((fixed, theirs[1]), dim=1).T
    expected = by_hand(logits, label, weight, tv_share).sum()
    (3 * expected).backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.equal(agrees.bool(), logits.argmax(-1) == label.argmax(-1))
    for one, other in zip(mine[: 1 + bool(rank)], theirs, strict=False):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


def test_in_bf16_it_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    x, fixed, trained, label = random(9, 70), random(40, 64, seed=1), random(40, 6, seed=2), random(9, 40, seed=3)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.clone().requires_grad_(), trained.clone().requires_grad_()]
        loss, _ = HeadLoss.apply(leaves[0], fixed.to(dtype), leaves[1], label, torch.ones(9), 0.9)
        loss.backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and relative_error(other, one) < 0.05


@every_share
@pytest.mark.parametrize("vocab", [2, 33, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_definition(tv_share: float, vocab: int, dtype: torch.dtype) -> None:
    logits, label = (random(5, vocab) * 3).to(dtype), (random(5, vocab, seed=1) * 3).to(dtype)
    label[2] = 2 * logits[2]
    logits[3], label[3] = 1.0, 1.0  # all are equal: the first of them is the argmax
    label[3, vocab - 1] = 2.0
    found, results = (logits.clone(), logits.clone()), []
    for mine, compute in zip(found, (head_loss_, kernels.head_loss_), strict=True):
        loss, agrees = torch.empty(5), torch.empty(5, dtype=torch.int8)
        compute(mine, label, torch.tensor([1.0, 0.5, 2.0, 0.1, 0.0]), loss, agrees, tv_share)
        results.append((loss, agrees))
    assert torch.allclose(found[0].float(), found[1].float(), atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.allclose(results[0][0], results[1][0], atol=1e-4)
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1].tolist()[2:4] == [1, 0]


@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize("at", [0, 1, 63, 64, 100])
def test_attention_over_a_cache(groups: int, at: int) -> None:
    """What lies behind the place that the cache is filled to is not looked at."""
    rows, kv_heads, length, dim = 2, 2, 101, 16
    keys, values = random(rows, kv_heads, length, dim), random(rows, kv_heads, length, dim, seed=1)
    q = random(rows, kv_heads * groups, dim, seed=2)
    seen = slice(0, at + 1)
    expected = F.scaled_dot_product_attention(
        q.view(rows, kv_heads, groups, dim), keys[:, :, seen], values[:, :, seen]
    ).reshape(rows, -1)
    keys[:, :, at + 1 :] = 1e6
    values[:, :, at + 1 :] = 1e6
    found = kernels.attend_cache(q, keys, values, torch.tensor([at]))
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("dim", "groups", "can"), [(64, 3, True), (16, 16, True), (8, 1, False), (80, 1, False)])
def test_for_what_there_is_a_kernel(dim: int, groups: int, can: bool) -> None:
    assert kernels.can_attend(dim, groups) == can
    assert not kernels.can_attend(64, 17)
