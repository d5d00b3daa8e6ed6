"""Steps that every engine must answer alike, and rows brought to decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from tiny import tiny_ids
from torch import Tensor

from fakes import FakeDraft
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.engines.contract import Engine, StepOutput
from ssv.runtime.llm import LLM
from ssv.runtime.request import Output, Request


def drive(engine: Engine, features_out: bool = False) -> list[StepOutput]:
    """Prefill, decoding, a ragged verification, a rollback, a second verification, a step of many chunks."""
    features = engine.num_features
    outputs = []

    def step(shape: tuple[int, int], position: list[int], gather: list[int], first_row: int = 0) -> None:
        seed = len(outputs) + 10
        generator = torch.Generator().manual_seed(seed)
        given = torch.randn(*shape, features, generator=generator) if features else None
        first_slot_B, rows_R = torch.tensor(position, dtype=torch.int32), torch.tensor(gather, dtype=torch.long)
        ids_BT = tiny_ids(*shape, seed=seed)
        out = engine.step(ids_BT, first_slot_B, rows_R, given, features_out=features_out, first_row=first_row)
        held = {field.name: getattr(out, field.name) for field in fields(out)}
        outputs.append(StepOutput(**{name: None if x is None else x.clone() for name, x in held.items()}))

    step((1, 9), [0], [8])
    step((1, 5), [0], [4, 1], first_row=1)
    for t in range(3):
        step((2, 1), [9 + t, 5 + t], [0, 1])
    step((2, 4), [12, 8], [0, 3, 4, 5])  # row 1 has two tokens, the others are padding
    step((2, 5), [10, 9], [9, 2, 5])  # both rolled back, gathered out of order
    step((1, 40), [15], list(range(3, 40)))  # wider than any profile, more rows than any gathers
    step((2, 1), [55, 14], [1])
    return outputs


def names(features_out: bool = False) -> tuple[str, ...]:
    return ("hidden_RH", "logits_RV", *(["features_BTF"] if features_out else []))


def flat(outputs: list[StepOutput], name: str) -> Tensor:
    """One output of several steps, one after another, as one vector."""
    return torch.cat([getattr(out, name).flatten() for out in outputs])


def start(batch: DecodeBatch, prompt_ids: Sequence[int], row: Row) -> int:
    """Runs the whole prompt of a row; returns its first token."""
    batch.members.begin(prompt_ids, row)
    while (first := batch.members.prefill()) is None:
        pass
    return first


def text_of(output: Output) -> tuple[tuple[int, ...], str, str]:
    """All that a caller may compare, costs aside."""
    return output.token_ids, output.text, output.finish_reason


def run(llm: LLM, requests: Sequence[Request]) -> list[Output]:
    """Decodes requests over a fake draft, which must have had the target's features."""
    outputs = llm.generate(requests)
    assert isinstance(llm.draft, FakeDraft)
    assert llm.draft.wrong_features == 0
    return outputs
