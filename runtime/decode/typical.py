"""Typical acceptance: which drafted tokens a target might have said just as well
(`ssv.bundle.policy.TypicalAcceptance`).

Shapes: N nodes of a row's tree, J = N + 1 rows of the target, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssv.bundle.policy import TypicalAcceptance
from ssv.runtime.decode.tree import Tree


def judge(x_JV: Tensor, tree: Tree, rule: TypicalAcceptance) -> tuple[list[bool], list[float]]:
    """Tells of each node whether it is typical of what the target says behind its parent, and the log of the
    probability that the target gives it.

    Args:
        x_JV: logits over the temperature behind root and nodes, fp32, -inf for what top-k or top-p leaves out.
    """
    if not len(tree):
        return [], []
    log_prob_JV = x_JV.double().log_softmax(dim=1)
    entropy_J = torch.special.entr(log_prob_JV.exp()).sum(dim=1)
    least_J = (rule.posterior_alpha * (-entropy_J).exp()).clamp(max=rule.posterior_threshold)
    row_N = torch.tensor(tree.parents, device=x_JV.device) + 1
    log_prob_N = log_prob_JV[row_N, torch.tensor(tree.tokens, device=x_JV.device)]
    return (log_prob_N.exp() > least_J[row_N]).tolist(), log_prob_N.tolist()
