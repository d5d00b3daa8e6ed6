"""Which token a row chooses: temperature, top-k and top-p, then the noise of its seed and position.

One choice serves all: what a draft proposes, what the target would have chosen, and plain decoding. A drafted token is
right when it is the target's own choice, so that a seed gives the same text with every lossless method.

Shapes: R rows, V vocab.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.reference import gumbel
from ssv.runtime.request import SamplingParams

# Missing where there was no C compiler; one that is there and does not load is an error to be seen.
if importlib.util.find_spec("ssv.runtime.decode._sampling") is not None:
    from ssv.runtime.decode import _sampling
else:
    _sampling = None  # type: ignore[assignment]

FIRST_SELECTED = 256
"""Tokens of a row that are selected at first: as a rule more than top-k or top-p keep."""

LEAST_TEMPERATURE = 1e-6
"""A tiny temperature must not divide into infinities."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the tokens that are to be chosen, one per row.

    Attributes:
        temperature_R: fp32, 0 is greedy.
        top_k_R: int64, 0 keeps all.
        top_p_R: fp32, 1 keeps all.
        seed_R: int64, 64 bits in two's complement.
        position_R: int64, the token's place in its sequence.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], positions: Sequence[int]) -> Sampling:
        """What requests ask for, at places of their texts."""
        return cls(
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.top_p for p in params], dtype=torch.float32),
            # 64 bits, of which the highest is a sign here.
            torch.tensor([(p.seed + 2**63) % 2**64 - 2**63 for p in params]),
            torch.tensor(positions),
        )

    def of_rows(self, row_S: Tensor) -> Sampling:
        """Those of some rows."""
        return Sampling(*(getattr(self, name)[row_S] for name in self.__slots__))

    def to(self, device: torch.device) -> Sampling:
        """The same on another device."""
        return Sampling(*(getattr(self, name).to(device) for name in self.__slots__))


def choose(logits_RV: Tensor, sampling: Sampling, token_V: Tensor | None = None) -> Tensor:
    """The column that each row chooses, int32 [R], on the logits' device; -1 where they are no distribution.

    Args:
        sampling: on the CPU.
        token_V: int64, the token of each column, where it is another number than the column's.
    """
    rows, vocab = logits_RV.shape
    temperature_R = _divisor(sampling.temperature_R)
    if logits_RV.device.type == "cuda":
        # Where there is no GPU there need be no NVRTC.
        from ssv.runtime.engines.cuda.drawing import drawn

        s = sampling
        return drawn(logits_RV, temperature_R, s.top_k_R, s.top_p_R, s.seed_R, s.position_R, token_V)
    if _sampling is None:
        return reference.choose(filtered(logits_RV, sampling), sampling.seed_R, sampling.position_R, token_V)
    logits_RV = logits_RV.float().contiguous()
    index_R = torch.empty(rows, dtype=torch.int32)
    _sampling.choose(*_addresses(logits_RV, token_V, temperature_R, sampling), index_R.data_ptr(), rows, vocab)
    return index_R


def ranked(logits_RV: Tensor, sampling: Sampling, count: int, token_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The columns that each row would choose first, second and so on if those before could not be chosen, and the share
    of each.

    With l a logit and g the noise of its token, the order is that of l + T g. Shares are the softmax of that: what
    another model would choose under the same noise, if its logits are these and some error about as large as one nat.
    What top-k and top-p leave out counts there with l alone, since another model may keep it. At temperature 0 shares
    are the softmax of the logits.

    Args:
        sampling: on the CPU.
        token_V: int64, the token of each column, where it is another number than the column's.

    Returns:
        int32 [R, K] and fp32 [R, K] on the CPU, K being `count` or V; -1 and 0 where a row can choose no more, or has
        no distribution.
    """
    rows, vocab = logits_RV.shape
    count = min(count, vocab)
    if logits_RV.device.type == "cpu" and _sampling is not None:
        index_RK, share_RK = torch.empty(rows, count, dtype=torch.int32), torch.empty(rows, count)
        logits_RV = logits_RV.float().contiguous()
        temperature_R = _divisor(sampling.temperature_R)
        _sampling.rank(
            *_addresses(logits_RV, token_V, temperature_R, sampling), index_RK.data_ptr(), share_RK.data_ptr(),
            rows, vocab, count,
        )  # fmt: skip
        return index_RK, share_RK
    score_RV = scores(logits_RV, sampling, token_V)
    below_RV = logits_RV.float() - logits_RV.float().amax(dim=1, keepdim=True)
    all_RV = torch.where(score_RV.isinf(), below_RV.double(), score_RV)
    valid_R1 = logits_RV.amax(dim=1, keepdim=True).isfinite()
    score_RK, index_RK = score_RV.topk(count, dim=1)
    share_RK = (score_RK - all_RV.logsumexp(dim=1, keepdim=True)).exp().where(valid_R1, 0.0)
    index_RK = index_RK.where(score_RK.isfinite() & valid_R1, -1)
    return index_RK.int().cpu(), share_RK.float().cpu()


def scores(logits_RV: Tensor, sampling: Sampling, token_V: Tensor | None = None) -> Tensor:
    """What each row chooses the largest of: l + T g of `ranked`, counted from the largest logit, fp64 [R, V]; -inf for
    what top-k or top-p leaves out. At temperature 0 the logits.

    Arguments as for `ranked`.
    """
    sampling = sampling.to(logits_RV.device)
    # Where temperature is 0 `filtered` leaves one token; here all are in order.
    greedy_R1 = (sampling.temperature_R == 0)[:, None]
    scale_R1 = _divisor(sampling.temperature_R)[:, None].where(~greedy_R1, 1.0)
    if token_V is None:
        token_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    noise_RV = gumbel(token_V[None], sampling.position_R[:, None], sampling.seed_R[:, None])
    below_RV = logits_RV.float() - logits_RV.float().amax(dim=1, keepdim=True)
    noisy_RV = (filtered(logits_RV, sampling).double() + noise_RV) * scale_R1
    return torch.where(greedy_R1, below_RV.double(), noisy_RV)


def gaps(logits_RV: Tensor, sampling: Sampling, token_R: Tensor) -> list[float]:
    """By how much what each row chooses is ahead of another token, in the scores of `scores` (nats): 0 where it is that
    token, or a tie.

    Args:
        sampling: on the CPU.
        token_R: int64, on the CPU.
    """
    gap_R = torch.zeros(len(token_R), dtype=torch.float64)
    if len(other_R := (choose(logits_RV, sampling).cpu() != token_R).nonzero()[:, 0]):
        score_RV = scores(logits_RV[other_R.to(logits_RV.device)], sampling.of_rows(other_R))
        own_R = score_RV.gather(1, token_R[other_R, None].to(score_RV.device))[:, 0]
        gap_R[other_R] = (score_RV.amax(dim=1) - own_R).cpu()
    return gap_R.tolist()


def _addresses(
    logits_RV: Tensor, token_V: Tensor | None, temperature_R: Tensor, sampling: Sampling
) -> tuple[int, int, int, int, int, int, int]:
    """What the compiled stages take first. The caller holds the tensors."""
    return (
        logits_RV.data_ptr(),
        0 if token_V is None else token_V.data_ptr(),
        temperature_R.data_ptr(),
        sampling.top_k_R.data_ptr(),
        sampling.top_p_R.data_ptr(),
        sampling.seed_R.data_ptr(),
        sampling.position_R.data_ptr(),
    )


def filtered(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Logits over the temperature, counted from the largest, fp32 [R, V]; -inf for what temperature 0, top-k or top-p
    leaves out.

    Top-k comes first. Top-p keeps the most likely tokens whose mass, without the least likely of them, is below top_p:
    always at least one. Of equal logits the lower column comes first, at the edges too. A row does not depend on the
    others.
    """
    vocab = logits_RV.shape[1]
    logits_RV = logits_RV.float()
    greedy_R = sampling.temperature_R == 0
    top_k_R, top_p_R = sampling.top_k_R.where(~greedy_R, 1), sampling.top_p_R.where(~greedy_R, 1.0)
    temperature_R1 = _divisor(sampling.temperature_R).where(~greedy_R, 1.0)[:, None]
    x_RV = (logits_RV - logits_RV.amax(dim=1, keepdim=True)) / temperature_R1
    rows = (((top_k_R > 0) & (top_k_R < vocab)) | (top_p_R < 1)).nonzero()[:, 0]
    if len(rows):
        x_RV[rows] = _selected(logits_RV[rows], x_RV[rows], top_k_R[rows], top_p_R[rows])
    return x_RV


def _divisor(temperature_R: Tensor) -> Tensor:
    """Temperatures to divide by, those of greedy rows being 0 still."""
    return temperature_R.clamp(min=LEAST_TEMPERATURE).where(temperature_R > 0, 0.0)


def _selected(logits_RV: Tensor, x_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """`filtered` of rows that do not keep all tokens.

    Few of many thousand tokens are kept: to put only the C most likely in order takes a tenth of the time of sorting
    all. C grows until it holds what every row keeps, and all equals of the least likely of these.
    """
    vocab = logits_RV.shape[1]
    top_k_R1, top_p_R1 = top_k_R.where(top_k_R > 0, vocab).clamp(max=vocab)[:, None], top_p_R[:, None]
    of_all_R1 = top_k_R1 == vocab
    most = int(top_k_R1.where(~of_all_R1, 0).max())
    count = max(FIRST_SELECTED, most + 1)
    # 1 over the largest probability: that sum of a row is the same beside any other rows.
    all_mass_R1 = 1 / x_RV.softmax(dim=1).amax(dim=1, keepdim=True).double() if bool(of_all_R1.any()) else None
    while True:
        count = min(count, vocab)
        value_RC, token_RC = logits_RV.topk(count, dim=1)
        weight_RC = x_RV.gather(1, token_RC).double().exp()
        mass_RC = weight_RC.cumsum(dim=1)  # one after the other, so that C does not change it
        rank_C = torch.arange(count, device=logits_RV.device)
        mass_R1 = mass_RC.gather(1, (top_k_R1 - 1).clamp(max=count - 1))
        if all_mass_R1 is not None:
            mass_R1 = torch.where(of_all_R1, all_mass_R1, mass_R1)
        # A top_p of 1 keeps all, also where rounding has the mass before the last tokens reach the whole.
        kept_RC = (mass_RC - weight_RC < top_p_R1 * mass_R1) | (rank_C == 0) | (top_p_R1 == 1)
        num_kept_R1 = (kept_RC & (rank_C < top_k_R1)).sum(dim=1, keepdim=True)
        edge_R1 = value_RC.gather(1, num_kept_R1 - 1)
        if count == vocab or bool((value_RC[:, -1:] < edge_R1).all()):
            break
        count *= 8
    above_RC, equal_RC = value_RC > edge_R1, value_RC == edge_R1
    # The selection is in no order among equals.
    equals_RC = token_RC.where(equal_RC, vocab).sort(dim=1).values
    last_R1 = equals_RC.gather(1, num_kept_R1 - above_RC.sum(dim=1, keepdim=True) - 1)
    kept_RC = above_RC | (equal_RC & (token_RC <= last_R1))
    kept_x_RC = x_RV.gather(1, token_RC).where(kept_RC, -torch.inf)
    return torch.full_like(x_RV, -torch.inf).scatter_(1, token_RC, kept_x_RC)
