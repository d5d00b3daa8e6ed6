"""Fits the criticality scorer: which of the draft's tokens would the target reject?

The samples are the draft's own proposals along text that the target wrote greedily, several steps deep, as long as
every step before was right: what the draft meets when it drafts.

Shapes: N samples, F features, B rows, T tokens, H hidden, V draft vocab.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssv.builder.config import ScorerConfig
from ssv.builder.training.corpus import Conversations
from ssv.builder.training.passes import draft_passes, judged, view_target
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.scorer import CONFIDENCE_FEATURES, Scorer
from ssv.plugins.reference import confidence, normalized
from ssv.support.errors import UserError


@dataclass(frozen=True, slots=True)
class Samples:
    """Drafted tokens with their features and labels.

    Attributes:
        features_NF: fp32, the normalised hidden state, then the confidence features.
        rejected_N: bool, the label.
        one_minus_p1_N: fp32, the training-free baseline.
    """

    features_NF: Tensor
    rejected_N: Tensor
    one_minus_p1_N: Tensor


@dataclass(frozen=True, slots=True)
class ScorerReport:
    """How good a scorer is, on samples it was not fitted on.

    Attributes:
        num_fit, num_held_out: samples.
        rejected: share of the held-out samples with a positive label.
        auc: area under the ROC curve, of the scorer and of the training-free baseline 1 - p1.
        reliability: per tenth of the samples by predicted probability: mean prediction and share rejected.
    """

    num_fit: int
    num_held_out: int
    rejected: float
    auc: float
    auc_baseline: float
    reliability: list[tuple[float, float]]

    @property
    def beats_baseline(self) -> bool:
        """Whether it tells right guesses from wrong ones better than `1 - p1` does."""
        return self.auc > self.auc_baseline

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as JSON can hold them."""
        return asdict(self)


@torch.no_grad()
def collect_samples(
    target: Decoder, draft: Draft, conversations: Conversations, config: ScorerConfig, batch_rows: int = 32
) -> Samples:
    """Samples of the assistant's tokens in conversations that the target wrote greedily."""
    device = target.embed.weight.device
    parts: list[Samples] = []
    for start in range(0, len(conversations.tokens), batch_rows):
        rows = slice(start, start + batch_rows)
        tokens_BT = conversations.tokens[rows].to(device).long()
        is_assistant_BT = conversations.is_assistant[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts.extend(_window_samples(target, draft, tokens_BT, is_assistant_BT, config))
    return _joined(parts)


def _window_samples(
    target: Decoder, draft: Draft, tokens_BT: Tensor, is_assistant_BT: Tensor, config: ScorerConfig
) -> Iterable[Samples]:
    view = view_target(target, draft, tokens_BT)
    alive: Tensor | None = None
    for step in draft_passes(draft, tokens_BT, view, config.depth):
        rows, counts_BT = judged(step, view, is_assistant_BT)
        # A draft that has gone astray is rolled back: what it says after that is not a sample.
        alive = counts_BT if alive is None else counts_BT & F.pad(alive[:, :-1], (1, 0))
        token_BT = draft.token_ids[step.logits_BTV.argmax(-1)]
        wrong_BT = token_BT != view.argmax_BT[:, rows]
        hidden_NH, logits_NV = step.hidden_BTH[alive], step.logits_BTV[alive]
        rejected_N = wrong_BT[alive]
        if config.label == "divergence":
            rejected_N = rejected_N & (view.gap(token_BT, rows)[alive] > config.margin)
        _, _, confidence_N3 = confidence(logits_NV)
        yield Samples(torch.cat((normalized(hidden_NH), confidence_N3), dim=-1), rejected_N, confidence_N3[:, 0].exp())
        alive = alive & ~wrong_BT


def fit_scorer(samples: Samples, config: ScorerConfig) -> tuple[Scorer, ScorerReport]:
    """Logistic regression on a part of the samples, measured on the rest.

    Samples keep the order of their conversations and the split is by position, so that no conversation is on both
    sides.

    Raises:
        UserError: too few samples, or all with the same label.
    """
    num = len(samples.rejected_N)
    num_fit = int(num * (1 - config.held_out_share))
    if num_fit < 10 or num - num_fit < 10 or len(samples.rejected_N.unique()) < 2:
        raise UserError(f"{num} samples cannot be fitted: they need both labels and a number of each")
    features_NF = samples.features_NF if config.use_hidden else samples.features_NF[:, -len(CONFIDENCE_FEATURES) :]
    mean_F = features_NF[:num_fit].mean(dim=0)
    scale_F = features_NF[:num_fit].std(dim=0).clamp(min=1e-6)
    fit_NF = (features_NF[:num_fit] - mean_F) / scale_F
    weight_F, bias = _logistic_regression(fit_NF, samples.rejected_N[:num_fit].float(), config.weight_decay)
    # The standardisation is folded into the layer.
    weight_F = weight_F / scale_F
    scorer = Scorer(weight_F, bias - weight_F @ mean_F, config.use_hidden)
    held_out = slice(num_fit, None)
    predicted_N = torch.sigmoid(features_NF[held_out] @ scorer.weight_F + scorer.bias)
    rejected_N = samples.rejected_N[held_out]
    report = ScorerReport(
        num_fit=num_fit,
        num_held_out=num - num_fit,
        rejected=float(rejected_N.float().mean()),
        auc=auc(predicted_N, rejected_N),
        auc_baseline=auc(samples.one_minus_p1_N[held_out], rejected_N),
        reliability=reliability(predicted_N, rejected_N),
    )
    return scorer, report


def _logistic_regression(features_NF: Tensor, label_N: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    weight_F = torch.zeros(features_NF.shape[1], device=features_NF.device, requires_grad=True)
    bias = torch.zeros((), device=features_NF.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_F, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(features_NF @ weight_F + bias, label_N)
        loss = loss + weight_decay * weight_F.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight_F.detach(), bias.detach()


def auc(score_N: Tensor, positive_N: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    _, rank_N, count = score_N.double().unique(return_inverse=True, return_counts=True)
    # Mid-rank of each distinct score.
    mid = count.cumsum(0).double() - (count.double() - 1) / 2
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    above = mid[rank_N][positive_N].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def reliability(predicted_N: Tensor, positive_N: Tensor, num_bins: int = 10) -> list[tuple[float, float]]:
    """Mean prediction and share of positives in each equal-sized bin, by rising prediction."""
    order = predicted_N.argsort()
    bins = zip(predicted_N[order].chunk(num_bins), positive_N[order].float().chunk(num_bins), strict=True)
    return [(float(p.mean()), float(y.mean())) for p, y in bins]


def _joined(parts: list[Samples]) -> Samples:
    return Samples(
        torch.cat([p.features_NF for p in parts]),
        torch.cat([p.rejected_N for p in parts]),
        torch.cat([p.one_minus_p1_N for p in parts]),
    )
