"""Heads beside a target's engine: the same logits in every precision, and the module that was given stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_heads, relative_error, tiny_decoder

from ssv.model.heads import heads_spec, start_heads
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.torch_engine import heads_engine

HIDDEN = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 3e-2), ("int8", 3e-2), ("int4", 0.3)])
def test_precisions(precision: Any, tolerance: float) -> None:
    heads = random_heads(tiny_decoder(), 2)
    before, expected = {n: p.clone() for n, p in heads.state_dict().items()}, heads.logits(HIDDEN)
    engine = heads_engine(heads, precision=precision)
    found = engine.logits(HIDDEN)
    assert engine.num_heads == 3 and found.dtype == torch.float32
    assert engine.token_ids_V is not None and torch.equal(engine.token_ids_V, heads.token_ids)
    assert relative_error(found, expected) < tolerance
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())


def test_columns_are_tokens_where_all_are_covered_in_their_order() -> None:
    target = tiny_decoder()
    heads = start_heads(heads_spec(target.spec, 2, 1, None), target, torch.arange(112))
    assert heads_engine(heads, precision="fp32").token_ids_V is None


def test_unknown_precision() -> None:
    with pytest.raises(EngineError, match="precision 'fp8' is unknown"):
        heads_engine(random_heads(tiny_decoder()), precision="fp8")  # type: ignore[arg-type]
