"""Trees that an engine grows by itself, as they are defined: a step of the engine for each level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fakes import FakeDraft
from ssv.bundle.survival import log_odds
from ssv.runtime.decode.tree import branches_of
from ssv.runtime.engines.contract import Corrections, Engine, Grown, TreeShape

Guesses = Callable[[Tensor, int, int], tuple[list[int], list[float]]]
"""Of logits [V], the columns that are chosen first, second and so on, and their shares; how many are wanted, and how
many nodes stand between the root and them."""


def likeliest(logits_V: Tensor, count: int, depth: int) -> tuple[list[int], list[float]]:
    """Guesses of a greedy row."""
    # The first of equals first.
    order = logits_V.sort(descending=True, stable=True).indices[:count].tolist()
    return order, logits_V.float().softmax(dim=0)[order].tolist()


def grow_by_stepping(
    engine: Engine,
    input_ids_BT: Tensor,
    first_slot_B: Tensor,
    count_B: Tensor,
    features_in_BTF: Tensor | None,
    shape: TreeShape,
    corrections: Corrections,
    sampled: Sequence[tuple[Guesses, Corrections] | None] = (),
) -> list[Grown | None]:
    """`GrowingEngine.grow`, a row at a time, by the steps of any engine.

    Args:
        corrections: of greedy rows.
        sampled: of each row that samples its guesses, of which the scorer knows nothing, and their corrections.
    """
    batch, tokens = input_ids_BT.shape
    growing = [b for b in range(batch) if count_B[b]]
    rows_R = torch.tensor([b * tokens + int(count_B[b]) - 1 for b in growing])
    out = engine.step(input_ids_BT, first_slot_B, rows_R, features_in_BTF, count_B=count_B)
    # Copies: the steps of the first tree overwrite them.
    out = replace(out, logits_RV=out.logits_RV.clone(), reject_prob_R=_copied(out.reject_prob_R))
    found: list[Grown | None] = [None] * batch
    for r, b in enumerate(growing):
        reject = None if out.reject_prob_R is None else out.reject_prob_R[r : r + 1]
        end = int(first_slot_B[b] + count_B[b])
        guesses, own = (sampled[b] if sampled else None) or (likeliest, corrections)
        found[b] = _grown(
            engine, b, end, out.hidden_RH[r : r + 1], out.logits_RV[r : r + 1], reject, shape, own, guesses
        )
    return found


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _grown(
    engine: Engine,
    b: int,
    start: int,
    hidden_RH: Tensor,
    logits_RV: Tensor,
    reject_prob_R: Tensor | None,
    shape: TreeShape,
    corrections: Corrections,
    guesses: Guesses,
) -> Grown:
    tokens: list[int] = []
    parents: list[int] = []
    said: list[float] = []
    risks: list[float] = []
    opened: list[tuple[int, float, list[int]]] = [(-1, 1.0, [])]  # candidate, survival, slots of its path
    end = start
    for level in range(shape.levels):
        children = []
        for r, (candidate, survival, path) in enumerate(opened):
            order, shares = guesses(logits_RV[r], shape.children, level)
            order += [-1] * (shape.children - len(order))
            shares += [0.0] * (shape.children - len(shares))
            scored = reject_prob_R is not None and guesses is likeliest
            reject = float(reject_prob_R[r]) if scored else 1 - shares[0]
            left = reject / max(1 - shares[0], 1e-6)
            for rank, (column, share) in enumerate(zip(order, shares, strict=True)):
                offset, slope = corrections[min(rank, len(corrections) - 1)]
                corrected = 1 / (1 + math.exp(-(offset + slope * log_odds(1 - reject if not rank else share * left))))
                token = column if column < 0 or engine.token_ids_V is None else int(engine.token_ids_V[column])
                own = survival * corrected if token >= 0 else 0.0
                children.append((len(tokens), own, path, r))
                tokens.append(token)
                parents.append(candidate)
                said.append(corrected)
                risks.append(reject if not rank and scored else 1 - corrected)
        if level == shape.levels - 1:
            break
        best = sorted(children, key=lambda child: -child[1])[: shape.opened(level + 1)]
        opened = [(i, survival, [*path, end + n]) for n, (i, survival, path, _) in enumerate(best)]
        width, rows = len(opened), b + 1
        ids_BT = torch.zeros(rows, width, dtype=torch.long)
        ids_BT[b] = torch.tensor([max(tokens[i], 0) for i, _, _ in opened])
        features_BTF = None
        if engine.num_features:
            features_BTF = torch.zeros(rows, width, engine.num_features, device=hidden_RH.device)
            features_BTF[b] = hidden_RH[[r for *_, r in best]]
        # Rows before this one are padding, behind what they may hold.
        ends = [engine.max_length - width] * b + [end]
        paths: list[list[list[int]]] = [[] for _ in range(b)] + [[path for *_, path in opened]]
        out = engine.step(
            ids_BT,
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor([b * width + n for n in range(width)]),
            features_BTF,
            branches=branches_of([*ends[:b], start], paths, ends),
            count_B=torch.tensor([0] * b + [width], dtype=torch.int32),
        )
        hidden_RH, logits_RV, reject_prob_R = out.hidden_RH, out.logits_RV, out.reject_prob_R
        end += width
    floats = (np.array(values, dtype=np.float32) for values in (said, risks))
    return Grown(np.array(tokens, dtype=np.int32), np.array(parents, dtype=np.int32), *floats)


class GrowingFakeDraft(FakeDraft):
    """A fake draft that grows trees by itself."""

    most_growing = 64
    num_grown = 0

    def grow(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        count_B: Tensor,
        features_in_BTF: Tensor | None,
        shape: TreeShape,
        corrections: Corrections,
    ) -> list[Grown | None]:
        self.num_grown += 1
        assert shape.has_room
        assert int(count_B.sum()) <= self.most_growing
        assert int((count_B > 0).sum()) * shape.opened(shape.levels) <= self.most_growing
        return grow_by_stepping(self, input_ids_BT, first_slot_B, count_B, features_in_BTF, shape, corrections)
