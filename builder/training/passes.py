"""The target and a draft run over whole windows of a corpus, as training, fitting and quantizing need them.

A conditioned draft runs several of its own steps deep (training-time test of EAGLE-3): pass 0 sees the target's
features everywhere, pass k sees features only up to k tokens before, and its own hidden states since, as it will when
it drafts k + 1 tokens.

Shapes: B rows, T tokens of a window, M = B * T, H hidden, X tapped features, U the target's vocabulary, V head rows of
the draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft


class CausalAttend:
    """Attention within whole windows, one after the other in the flattened tokens."""

    def __init__(self, batch_rows: int) -> None:
        self.batch_rows = batch_rows

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        q, k, v = (x.view(self.batch_rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q_MND, k_MKD, v_MKD))
        return self.attend(layer, q, k, v).transpose(1, 2).reshape(q_MND.shape[0], -1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a layer, each token to those up to it: queries, keys and values [rows, heads, tokens, size]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PassAttend(CausalAttend):
    """The same for the layers of a conditioned draft, pass after pass.

    Pass k's query at position i sees the keys of pass 0 up to i - k, and of each pass j in between the one at i - k +
    j.
    """

    def __init__(self, batch_rows: int) -> None:
        super().__init__(batch_rows)
        self._seen: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a layer in its next pass, over the keys and values of the earlier ones, too."""
        seen_k, seen_v = self._seen.setdefault(layer, ([], []))
        depth = len(seen_k)
        seen_k.append(k)
        seen_v.append(v)
        if depth == 0:
            return super().attend(layer, q, k, v)
        mask = _pass_mask(q.shape[2], depth, q.device)
        groups = q.shape[1] // k.shape[1]
        # Repeated, not enable_gqa: with a mask that has no fused kernel on CUDA.
        keys, values = (torch.cat(x, dim=2).repeat_interleave(groups, dim=1) for x in (seen_k, seen_v))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def _pass_mask(num_tokens: int, depth: int, device: torch.device) -> Tensor:
    query = torch.arange(num_tokens, device=device)[:, None]
    key = torch.arange(num_tokens, device=device)[None, :]
    # The first key stays visible to queries too early in the window to have any: softmax over nothing is NaN,
    # and those positions carry no loss.
    masks = [(key <= query - depth) | ((query < depth) & (key == 0))]
    masks += [key == query - depth + j for j in range(1, depth + 1)]
    return torch.cat(masks, dim=1)


@dataclass(frozen=True, slots=True)
class TargetView:
    """What the target says of a batch of windows.

    Attributes:
        features_MX: [M, X] the tapped hidden states joined, not yet projected; None for a standalone draft.
        argmax_BT: the token that the target would choose after each token.
        logits_BTU: over its whole vocabulary.
    """

    features_MX: Tensor | None
    argmax_BT: Tensor
    logits_BTU: Tensor

    def gap(self, token_BT: Tensor, rows: slice) -> Tensor:
        """By how many nats the target prefers its own choice to the given tokens, after the given rows of tokens."""
        logits_BTU = self.logits_BTU[:, rows]
        chosen_BT = logits_BTU.gather(2, token_BT[:, :, None])[:, :, 0]
        return (logits_BTU.amax(dim=-1) - chosen_BT).float()


@torch.no_grad()
def view_target(target: Decoder, draft: Draft, tokens_BT: Tensor) -> TargetView:
    """Runs the target over whole windows."""
    rows, length = tokens_BT.shape
    position_M = torch.arange(length, device=tokens_BT.device).repeat(rows)
    hidden_MH, features_MX = target.run_layers(
        target.embed(tokens_BT.flatten()), position_M, CausalAttend(rows), draft.spec.feature_layers
    )
    logits_BTU = target.logits(hidden_MH).view(rows, length, -1)
    return TargetView(features_MX, logits_BTU.argmax(-1), logits_BTU)


@dataclass(frozen=True, slots=True)
class DraftPass:
    """One pass of the draft over a batch of windows.

    Attributes:
        hidden_BTH: the draft's hidden states.
        logits_BTV: over its head tokens.
        shift: the row at t is about the token after t + shift.
        first: rows before this one had no chance to see what they would when drafting.
    """

    hidden_BTH: Tensor
    logits_BTV: Tensor
    shift: int
    first: int


def draft_passes(draft: Draft, tokens_BT: Tensor, view: TargetView, depth: int) -> Iterator[DraftPass]:
    """Runs the draft over whole windows: a standalone one once, a conditioned one `depth` times.

    The head of this module says why.
    """
    shift = entry_shift(draft)
    for k, hidden_BTH in enumerate(hidden_passes(draft, tokens_BT, view.features_MX, depth)):
        logits_BTV = draft.logits(hidden_BTH.flatten(0, 1)).unflatten(0, hidden_BTH.shape[:2])
        yield DraftPass(hidden_BTH, logits_BTV, shift=shift, first=k)


def entry_shift(draft: Draft) -> int:
    """A row at t of the draft's is about the token after t + this one."""
    return 0 if draft.tap is None else 1


def hidden_passes(draft: Draft, tokens_BT: Tensor, features_MX: Tensor | None, depth: int) -> Iterator[Tensor]:
    """The hidden states of each of `draft_passes`, [B, T - shift, H].

    Args:
        features_MX: the tapped hidden states joined, not yet projected; None for a standalone draft.
    """
    rows, length = tokens_BT.shape
    if draft.tap is None:
        position_M = torch.arange(length, device=tokens_BT.device).repeat(rows)
        yield draft.run_layers(tokens_BT.flatten(), None, position_M, CausalAttend(rows)).view(rows, length, -1)
        return
    # Entry i joins token i + 1 with the features of token i, and predicts token i + 2.
    assert features_MX is not None
    entries = length - 1
    input_M = tokens_BT[:, 1:].flatten()
    position_M = torch.arange(entries, device=tokens_BT.device).repeat(rows)
    features_BTF = draft.tap(features_MX).view(rows, length, -1)[:, :entries]
    attend = PassAttend(rows)
    for _ in range(depth):
        hidden = draft.run_layers(input_M, features_BTF.flatten(0, 1), position_M, attend)
        hidden_BTH = hidden.view(rows, entries, -1)
        yield hidden_BTH
        features_BTF = F.pad(draft.carried(hidden_BTH[:, :-1]), (0, 0, 1, 0))


def judged(step: DraftPass, view: TargetView, is_assistant_BT: Tensor) -> tuple[slice, Tensor]:
    """The target rows that a pass's rows are about, and which of them count: those after which the assistant speaks."""
    length = is_assistant_BT.shape[1]
    rows = slice(step.shift, step.shift + step.logits_BTV.shape[1])
    speaks = torch.zeros_like(is_assistant_BT)
    speaks[:, : length - 1] = is_assistant_BT[:, 1:]
    counts = speaks[:, rows].clone()
    counts[:, : step.first] = False
    return rows, counts


def share_agreed(draft: Draft, step: DraftPass, view: TargetView, rows: slice, counts: Tensor) -> Tensor:
    """Share of the rows that count where the draft's argmax is the target's; `rows` and `counts` are `judged`'s."""
    agrees = draft.token_ids[step.logits_BTV.argmax(-1)] == view.argmax_BT[:, rows]
    return (agrees & counts).sum() / counts.sum().clamp(min=1)
