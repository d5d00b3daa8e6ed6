"""Tokens per target pass of a conditioned draft, along text that the target has written greedily.

What a draft is good for is measured as decoding would: from where the text stands it drafts a tree, the text says how
far the tree is right, and the walk goes on there. Every row walks on its own, all at once, so that it takes seconds.
Only the draft runs; the target's features are made once.

A tree grows as EAGLE-2's does (Li et al. 2024, arXiv:2406.16858): the best nodes of a level, by the product of the
draft's probabilities, are gone on from, each with as many children; of all that was found the best are drafted.

Shapes: B rows, T tokens of a window, E = T - 1 entries (entry i joins token i + 1 with the features of token i and
predicts token i + 2), C nodes of a level that are gone on from, L levels, H hidden, V LM head rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssv.builder.training.corpus import Conversations
from ssv.builder.training.passes import CausalAttend
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft


@dataclass(frozen=True, slots=True)
class Shape:
    """What is drafted for a pass.

    Attributes:
        width: nodes of a level that are gone on from, and children of each.
        levels: how deep.
        nodes: that are drafted at most.
    """

    width: int
    levels: int
    nodes: int


CHAIN = Shape(width=1, levels=5, nodes=5)
TREE = Shape(width=8, levels=8, nodes=32)


@torch.no_grad()
def tokens_per_pass(
    target: Decoder, draft: Draft, data: Conversations, shapes: tuple[Shape, ...], batch_rows: int = 256
) -> list[float]:
    """Tokens that a target pass gives on average, of drafts of some shapes, over all assistant turns of `data`."""
    device = target.embed.weight.device
    emitted, passes = [0.0] * len(shapes), [0.0] * len(shapes)
    for start in range(0, len(data.tokens), batch_rows):
        rows = slice(start, start + batch_rows)
        tokens_BT = data.tokens[rows].to(device).long()
        spoken_BT = data.is_assistant[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            walk = _Walk(target, draft, tokens_BT, spoken_BT)
            for index, shape in enumerate(shapes):
                tokens, rounds = walk.run(shape)
                emitted[index] += tokens
                passes[index] += rounds
    return [tokens / max(rounds, 1) for tokens, rounds in zip(emitted, passes, strict=True)]


class _KeptAttend(CausalAttend):
    """Causal attention that keeps each layer's keys and values, [B, K, E, D]."""

    def __init__(self, batch_rows: int) -> None:
        super().__init__(batch_rows)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kept.append((k, v))
        return super().attend(layer, q, k, v)


class _TreeAttend:
    """Attention of a level's nodes: over the entries before the tree, and over their ancestors and themselves."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]], width: int) -> None:
        self._kept, self._width = kept, width
        self._grown: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in kept]
        self.sees_BE: Tensor
        self.ancestors: list[Tensor] = []

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self._kept[layer]
        (batch, kv_heads, _, dim), width = keys.shape, self._width
        grown_k, grown_v = self._grown[layer]
        for grown, new in ((grown_k, k_MKD), (grown_v, v_MKD)):
            grown.append(new.view(batch, width, kv_heads, dim).transpose(1, 2).to(keys.dtype))
        q = q_MND.view(batch, width, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).float() * dim**-0.5
        k = torch.cat((keys, *grown_k), dim=2).float()
        v = torch.cat((values, *grown_v), dim=2).float()
        prefix = self.sees_BE[:, None].expand(-1, width, -1)
        mask = torch.cat((prefix, *self.ancestors), dim=2)[:, None, None]  # [B, 1, 1, C, E + nodes]
        score = torch.einsum("bkgcd,bksd->bkgcs", q, k).masked_fill(~mask, -1e30)
        out = torch.einsum("bkgcs,bksd->bkgcd", score.softmax(-1), v)
        return out.permute(0, 3, 1, 2, 4).reshape(batch * width, -1).to(q_MND.dtype)


class _Walk:
    """A batch of rows, each at its own place of its own text."""

    def __init__(self, target: Decoder, draft: Draft, tokens_BT: Tensor, spoken_BT: Tensor) -> None:
        self.draft, self.tokens_BT = draft, tokens_BT
        batch, length = tokens_BT.shape
        device = tokens_BT.device
        position_M = torch.arange(length, device=device).repeat(batch)
        _, features_MX = target.run_layers(
            target.embed(tokens_BT.flatten()), position_M, CausalAttend(batch), draft.spec.feature_layers
        )
        assert draft.tap is not None and features_MX is not None
        features_BEF = draft.tap(features_MX).view(batch, length, -1)[:, :-1]
        attend = _KeptAttend(batch)
        entry_M = torch.arange(length - 1, device=device).repeat(batch)
        hidden = draft.run_layers(tokens_BT[:, 1:].flatten(), features_BEF.flatten(0, 1), entry_M, attend)
        self.hidden_BEH, self.kept = hidden.view(batch, length - 1, -1), attend.kept
        # The first of an answer comes with the prompt's pass, so that the walk starts on it.
        at_T = torch.arange(length, device=device)
        before_BT = F.pad(spoken_BT[:, :-1], (1, 0))
        self.is_start_BT = spoken_BT & ~before_BT & (at_T >= 2)
        # Where a run of the assistant's tokens ends, for each of them.
        end_BT = torch.where(spoken_BT, length, at_T)
        self.end_BT = end_BT.flip(1).cummin(dim=1).values.flip(1)

    def run(self, shape: Shape) -> tuple[float, float]:
        """Tokens given by passes, and passes."""
        batch, length = self.tokens_BT.shape
        row_B = torch.arange(batch, device=self.tokens_BT.device)
        at_T = torch.arange(length, device=self.tokens_BT.device)
        at_B = torch.zeros_like(row_B) - 1  # before the first answer
        tokens = passes = 0.0
        while True:
            # On to the next answer where one has ended.
            end_B = torch.where(at_B < 0, 0, self.end_BT[row_B, at_B.clamp(0, length - 1)])
            next_BT = torch.where(self.is_start_BT & (at_T > at_B[:, None]), at_T, length)
            over_B = at_B + 1 >= end_B
            at_B = torch.where(over_B, next_BT.amin(dim=1), at_B)
            alive_B = at_B < length
            if not alive_B.any():
                return tokens, passes
            at_B = at_B.clamp(max=length - 1)
            left_B = self.end_BT[row_B, at_B] - 1 - at_B
            # An answer of one token needs no pass after the prompt's.
            counts_B = alive_B & (left_B > 0)
            given_B = torch.minimum(self._accepted(at_B, shape) + 1, left_B)
            tokens += float(given_B[counts_B].sum())
            passes += float(counts_B.sum())
            at_B = torch.where(alive_B, at_B + torch.where(counts_B, given_B, 0), length)

    def _accepted(self, at_B: Tensor, shape: Shape) -> Tensor:
        """How many of the tokens after `at_B`'s a tree has that is drafted there, int64 [B]."""
        draft, width, device = self.draft, shape.width, at_B.device
        batch, length = self.tokens_BT.shape
        row_B = torch.arange(batch, device=device)
        entry_B = (at_B - 1).clamp(min=0)
        attend = _TreeAttend(self.kept, width)
        attend.sees_BE = torch.arange(length - 1, device=device) <= entry_B[:, None]
        hidden_BCH = self.hidden_BEH[row_B, entry_B][:, None]
        score_BC = torch.zeros(batch, 1, device=device)
        true_BC = torch.ones(batch, 1, dtype=torch.bool, device=device)
        found_score, found_true = [], []
        for level in range(shape.levels):
            logits_MV = draft.logits(hidden_BCH.flatten(0, 1)).float()
            best = logits_MV.log_softmax(-1).topk(min(width, logits_MV.shape[-1]), dim=-1)
            parents = score_BC.shape[1]
            score_BX = (score_BC[..., None] + best.values.view(batch, parents, -1)).flatten(1)
            token_BX = draft.token_ids[best.indices].view(batch, -1)
            text_B = self.tokens_BT[row_B, (at_B + 1 + level).clamp(max=length - 1)]
            true_BX = true_BC.repeat_interleave(best.indices.shape[-1], dim=1) & (token_BX == text_B[:, None])
            found_score.append(score_BX)
            found_true.append(true_BX)
            if level + 1 == shape.levels:
                break
            score_BC, picked_BC = score_BX.topk(width, dim=1)
            parent_BC = picked_BC // best.indices.shape[-1]
            true_BC, token_BC = true_BX.gather(1, picked_BC), token_BX.gather(1, picked_BC)
            features_BCF = draft.carried(hidden_BCH).gather(1, parent_BC[..., None].expand(-1, -1, hidden_BCH.shape[2]))
            itself = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
            attend.ancestors = [a.gather(1, parent_BC[..., None].expand(-1, -1, width)) for a in attend.ancestors]
            attend.ancestors.append(itself)
            position_M = (entry_B[:, None] + 1 + level).expand(-1, width).flatten()
            hidden = draft.run_layers(token_BC.flatten(), features_BCF.flatten(0, 1), position_M, attend)
            hidden_BCH = hidden.view(batch, width, -1)
        score_BX, true_BX = torch.cat(found_score, dim=1), torch.cat(found_true, dim=1)
        # A node's score is at most its parent's, so the best of all are a tree.
        least_B1 = score_BX.topk(min(shape.nodes, score_BX.shape[1]), dim=1).values[:, -1:]
        return (true_BX & (score_BX >= least_B1)).sum(dim=1)
