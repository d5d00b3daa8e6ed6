"""Any language model with the target's vocabulary as a standalone draft.

Models of one family often differ in how far their embedding is padded: rows beyond the tokenizer's tokens. The draft's
embedding gets as many rows as the target's, zeros where it had none, so that whatever the target chooses has one; its
LM head covers the tokens that both have rows for.

Shapes: V rows of the LM head, U the target's vocabulary, H hidden of the draft.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssv.model.checkpoint import DecoderSpec, Weights
from ssv.model.decoder import fused_state
from ssv.model.draft import DraftSpec, StoredDraft


def standalone_draft(spec: DecoderSpec, weights: Weights, target: DecoderSpec) -> StoredDraft:
    """The draft that a checkpoint is for a target; that their tokens are the same is the caller's to check.

    Args:
        spec, weights: as `load_checkpoint` gives them.
    """
    head_size = min(spec.vocab_size, target.vocab_size)
    state = {f"decoder.{name}": weight for name, weight in fused_state(spec, weights).items()}
    state["decoder.embed.weight"] = _with_rows(weights["model.embed_tokens.weight"], target.vocab_size)
    if not spec.tie_embeddings:
        state["decoder.lm_head.weight"] = state["decoder.lm_head.weight"][:head_size]
    else:
        state.pop("decoder.lm_head.weight", None)  # it may repeat the embedding
    draft = DraftSpec(
        kind="standalone",
        decoder=replace(spec, vocab_size=target.vocab_size),
        feature_layers=(),
        head_size=head_size,
        own_embedding=True,
        own_lm_head=not spec.tie_embeddings,
    )
    return StoredDraft(draft, {"token_ids": torch.arange(head_size, dtype=torch.int32), **state})


def _with_rows(embedding_UH: Tensor, rows: int) -> Tensor:
    padding = embedding_UH.new_zeros(max(rows - len(embedding_UH), 0), embedding_UH.shape[1])
    return torch.cat((embedding_UH[:rows], padding))
