"""What the ops take and return, and the one error for what they do not: shared by the definition and the kernels.

Shapes: M rows of a step (the tokens of all its sequences), R of them that are scored, gathered or chosen for, H hidden,
V vocab, F features of the scorer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_VOCAB = 262_144
MAX_HIDDEN = 65_536
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NUM_CONFIDENCE = 3
"""Features of a scorer beside the hidden state: log(1 - p1), entropy, margin."""


class OpError(ValueError):
    """An argument that an op does not take.

    Attributes:
        name: the argument, as "score: logits".
        expected, got: in words.
    """

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(f"{name}: expected {expected}, got {got}")
        self.name, self.expected, self.got = name, expected, got


@dataclass(frozen=True, slots=True)
class Score:
    """How sure a draft is of each row's most likely token, and what the scorer makes of it.

    Attributes:
        token_R: int32, index of the largest logit, the first of equals.
        prob_R: fp32, its probability at temperature 1.
        entropy_R: fp32, in nats.
        margin_R: fp32, difference of the two largest logits, at most 1e4.
        reject_prob_R: fp32, probability that the target would reject the token.
    """

    token_R: Tensor
    prob_R: Tensor
    entropy_R: Tensor
    margin_R: Tensor
    reject_prob_R: Tensor


def check_score(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> None:
    """Checks the arguments of `score`.

    Raises:
        OpError: it does not take them.
    """
    rows, vocab = _matrix("score: logits", logits_RV)
    _, hidden = _matrix("score: hidden", hidden_RH)
    device = logits_RV.device
    _tensor("score: logits", logits_RV, (rows, vocab), FLOATS, device)
    _columns("score: logits", vocab, MAX_VOCAB)
    _tensor("score: hidden", hidden_RH, (rows, hidden), FLOATS, device)
    _columns("score: hidden", hidden, MAX_HIDDEN)
    features = weight_F.shape[0] if weight_F.dim() == 1 else None
    if features not in (NUM_CONFIDENCE, hidden + NUM_CONFIDENCE):
        expected = f"shape ({NUM_CONFIDENCE},) or ({hidden + NUM_CONFIDENCE},)"
        raise OpError("score: weight", expected, _shape(weight_F))
    _tensor("score: weight", weight_F, tuple(weight_F.shape), (torch.float32,), device)
    _tensor("score: bias", bias_1, (1,), (torch.float32,), device)


def check_sparse_gather(hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float) -> None:
    """Checks the arguments of `sparse_gather`.

    Raises:
        OpError: it does not take them.
    """
    rows, hidden = _matrix("sparse_gather: hidden", hidden_MH)
    device = hidden_MH.device
    _tensor("sparse_gather: hidden", hidden_MH, (rows, hidden), FLOATS, device)
    _columns("sparse_gather: hidden", hidden, MAX_HIDDEN)
    gathered = _vector("sparse_gather: rows", row_R)
    _tensor("sparse_gather: rows", row_R, (gathered,), (torch.int32,), device)
    _tensor("sparse_gather: weight", weight_H, (hidden,), FLOATS, device)
    _positive("sparse_gather: eps", eps)


def check_choose(x_RV: Tensor, seed_R: Tensor, position_R: Tensor, token_V: Tensor | None) -> None:
    """Checks the arguments of `choose`.

    Raises:
        OpError: it does not take them.
    """
    rows, vocab = _matrix("choose: logits", x_RV)
    _tensor("choose: logits", x_RV, (rows, vocab), (torch.float32,), x_RV.device)
    _columns("choose: logits", vocab, MAX_VOCAB)
    _tensor("choose: seeds", seed_R, (rows,), (torch.int64,), x_RV.device)
    _tensor("choose: positions", position_R, (rows,), (torch.int64,), x_RV.device)
    if token_V is not None:
        _tensor("choose: tokens", token_V, (vocab,), (torch.int64,), x_RV.device)


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise OpError(name, "two axes", _shape(tensor))
    return tensor.shape[0], tensor.shape[1]


def _vector(name: str, tensor: Tensor) -> int:
    if tensor.dim() != 1:
        raise OpError(name, "one axis", _shape(tensor))
    return tensor.shape[0]


def _tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != shape:
        raise OpError(name, f"shape {shape}", _shape(tensor))
    if tensor.dtype not in dtypes:
        raise OpError(name, " or ".join(map(_dtype, dtypes)), _dtype(tensor.dtype))
    if tensor.device != device:
        raise OpError(name, f"a tensor on {device}", f"one on {tensor.device}")
    if not tensor.is_contiguous():
        raise OpError(name, "a contiguous tensor", f"strides {tensor.stride()} for {_shape(tensor)}")


def _columns(name: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise OpError(name, f"1 to {most} columns", str(number))


def _positive(name: str, number: float) -> None:
    if not number > 0:
        raise OpError(name, "a number above 0", str(number))


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
