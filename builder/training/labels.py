"""What a draft learns from the target at one step: for the places that count, the target's logits.

Only places where the assistant speaks next are looked at: elsewhere neither the target's nor the draft's LM head runs.

Shapes: B rows, T tokens of a window, E entries of a draft's row, M = B * T, N places that count, U the target's
vocabulary, V head rows of the draft, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssv.builder.training.passes import CausalAttend, entry_shift
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft

_CHUNK = 8192
_MULTIPLE = 512
"""Numbers of places are rounded up to this, so that memory of few sizes is used over and over."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The target's view of the places that count.

    Attributes:
        features_MX: [M, X] the tapped hidden states joined; None for a standalone draft.
        place_N: index of each place among the draft's B * E entries.
        entry_N: its entry within its row.
        row_N: its row.
        counts_N: False where a place only fills up.
        covered_N: whether the draft's LM head has the target's choice.
        logits_NV: the target's, of the tokens that the draft's LM head covers.
    """

    features_MX: Tensor | None
    place_N: Tensor
    entry_N: Tensor
    row_N: Tensor
    counts_N: Tensor
    covered_N: Tensor
    logits_NV: Tensor

    def weights(self, depth: int, num_rows: int, mean: Literal["token", "conversation"]) -> Tensor:
        """What the loss of each place counts for in the pass of a depth, fp32 [N]."""
        # A token that the head does not cover cannot be learned, and an entry too early in a row has not seen what it
        # would when drafting.
        counts_N = (self.counts_N & self.covered_N & (self.entry_N >= depth)).float()
        if mean == "token":
            return counts_N / counts_N.sum().clamp(min=1)
        of_row_B = torch.zeros(num_rows, device=counts_N.device).index_add_(0, self.row_N, counts_N)
        return counts_N / (of_row_B.clamp(min=1) * (of_row_B > 0).sum().clamp(min=1))[self.row_N]

    def agreement(self, agrees_N: Tensor, depth: int) -> Tensor:
        """Share of the places that a pass is judged at where its argmax is the target's."""
        counts_N = self.counts_N & (self.entry_N >= depth)
        return (agrees_N.bool() & self.covered_N & counts_N).sum() / counts_N.sum().clamp(min=1)


class Labeller:
    """Runs a target for a draft's training."""

    def __init__(self, target: Decoder, draft: Draft) -> None:
        self._target, self._draft = target, draft
        is_covered_U = torch.zeros(target.spec.vocab_size, dtype=torch.bool, device=draft.token_ids.device)
        is_covered_U[draft.token_ids] = True
        self._covered_VH = target.head_rows(draft.token_ids)
        self._others_H = target.head_rows((~is_covered_U).nonzero()[:, 0])

    @torch.no_grad()
    def labels(self, tokens_BT: Tensor, is_assistant_BT: Tensor) -> Labels:
        """The labels of a step.

        Args:
            tokens_BT: int64, on the target's device.
            is_assistant_BT: on the CPU, so that how many places there are is known without waiting for the device.
        """
        target, device = self._target, tokens_BT.device
        rows, length = tokens_BT.shape
        shift = entry_shift(self._draft)
        entries = length - shift
        # The entry at t is about the target's choice after token t + shift.
        speaks_BE = is_assistant_BT.new_zeros(rows, entries)
        speaks_BE[:, : entries - 1] = is_assistant_BT[:, shift + 1 :]
        place_N = speaks_BE.flatten().nonzero()[:, 0]
        num = len(place_N)
        filled = max(_MULTIPLE, -(-num // _MULTIPLE) * _MULTIPLE)
        place_N = torch.cat((place_N, place_N.new_zeros(filled - num))).to(device, non_blocking=True)
        row_N, entry_N = place_N // entries, place_N % entries

        position_M = torch.arange(length, device=device).repeat(rows)
        taps = self._draft.spec.feature_layers
        hidden_MH, features_MX = target.run_layers(
            target.embed(tokens_BT.flatten()), position_M, CausalAttend(rows), taps
        )  # fmt: skip
        normed_NH = target.norm(hidden_MH[row_N * length + entry_N + shift])
        logits_NV = normed_NH @ self._covered_VH.T
        covered_N = torch.ones(filled, dtype=torch.bool, device=device)
        if len(self._others_H):
            for at in range(0, filled, _CHUNK):
                part = slice(at, at + _CHUNK)
                # Equal logits are common in bf16; of equals it does not matter which is the target's choice.
                best_other = (normed_NH[part] @ self._others_H.T).amax(dim=-1)
                covered_N[part] = logits_NV[part].amax(dim=-1) >= best_other
        return Labels(
            features_MX=features_MX,
            place_N=place_N,
            entry_N=entry_N,
            row_N=row_N,
            counts_N=torch.arange(filled, device=device) < num,
            covered_N=covered_N,
            logits_NV=logits_NV,
        )
