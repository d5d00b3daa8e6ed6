"""The torch engine on CUDA: the same steps as on the CPU, quantized checkpoints included. Needs any NVIDIA GPU.

make test-gpu
"""

from __future__ import annotations

import pytest
import torch
from drive import drive, flat, names, start
from quantized_weights import quantized_weights
from tiny import random_draft, relative_error, tiny_decoder, tiny_spec, tiny_weights

from ssv.builder.training.corpus import ChatPieces, write_conversations
from ssv.builder.training.recover import Recovery, _loss, recover
from ssv.bundle.policy import Policy
from ssv.model.decoder import Decoder
from ssv.model.scorer import Scorer
from ssv.runtime.counters import Counters
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.engines.torch_engine import TorchEngine, draft_engine, target_engine
from ssv.runtime.request import SamplingParams
from ssv.support.progress import silent

SIZES = {"max_batch": 3, "max_length": 64}


def engines(decoder: Decoder, precision: str) -> tuple[TorchEngine, TorchEngine]:
    """On CUDA in a precision, and on the CPU in fp32."""
    on_cuda = target_engine(decoder, precision=precision, device="cuda", **SIZES)  # type: ignore[arg-type]
    return on_cuda, target_engine(decoder, precision="fp32", **SIZES)  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 4e-2)])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "family": "qwen3"}, {"qkv_bias": True, "family": "qwen2"}])
def test_target(changes: dict[str, object], precision: str, tolerance: float) -> None:
    found, expected = map(drive, engines(tiny_decoder(**changes), precision))
    for name in names():
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < tolerance


@pytest.mark.parametrize("quantized", ["fp8", "int4"])
def test_quantized_target(quantized: str) -> None:
    spec = tiny_spec()
    decoder = Decoder.from_weights(spec, quantized_weights(spec, tiny_weights(spec), quantized))
    found, expected = map(drive, engines(decoder, "fp32"))
    for name in names():
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_draft(kind: str) -> None:
    draft = random_draft(tiny_decoder(), kind)  # type: ignore[arg-type]
    found = drive(draft_engine(draft, precision="fp32", device="cuda", **SIZES))  # type: ignore[arg-type]
    expected = drive(draft_engine(draft, precision="fp32", **SIZES))  # type: ignore[arg-type]
    for name in names():
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("accept_below", [0.0, 0.4])
def test_decoding_gives_the_same_tokens(temperature: float, accept_below: float) -> None:
    # A kernel chooses here, the compiled stage there: the tokens are equal, not only as likely.
    policy = Policy(accept_below=accept_below, verify_above=0.9, risk_budget=0.9, max_pending=5)
    params = [
        SamplingParams(max_tokens=30, temperature=temperature, top_p=p, seed=7, ignore_eos=True) for p in (1.0, 0.9)
    ]
    found, expected = (decoded(device, params, policy) for device in ("cuda", "cpu"))
    assert found == expected


def decoded(device: str, params: list[SamplingParams], policy: Policy) -> list[list[int]]:
    decoder = tiny_decoder()
    draft = random_draft(decoder, "conditioned")
    torch.manual_seed(3)
    scorer = Scorer(torch.randn(decoder.spec.hidden_size + 3) / 4, torch.tensor(0.1), True)
    settings = {"precision": "fp32", "device": device, "max_batch": 2, "max_length": 128}
    target = target_engine(decoder, draft=draft, **settings)  # type: ignore[arg-type]
    batch = DecodeBatch(target, draft_engine(draft, scorer=scorer, **settings), [1], 64)  # type: ignore[arg-type]
    rows = [Row(each, policy, lambda ids: False, Counters()) for each in params]
    outputs = [[start(batch, [5, 6, 7 + b], row)] for b, row in enumerate(rows)]
    for row in rows:
        row.counters.emitted = 1
    while max(map(len, outputs)) < 30:
        batch.draft()
        for gained in (batch.release(), batch.verify()):
            for row, output, tokens in zip(rows, outputs, gained, strict=True):
                output += tokens
                row.counters.emitted += len(tokens)
    return [output[:30] for output in outputs]


def test_recovering_a_quantized_target_brings_it_nearer_to_the_original() -> None:
    spec = tiny_spec()
    original = tiny_decoder().cuda()
    student = Decoder.from_weights(spec, quantized_weights(spec, tiny_weights(spec), "int4")).cuda()
    pieces = ChatPieces(before=[3, 4], to_assistant=[1, 5], to_user=[1, 6], end_of_turn=1)
    config = Recovery(tokens=64 * 32 * 60, learning_rate=1e-3, rows=64, window=32, batch_rows=64)
    trained = recover(original, student, pieces, [[7], [8]], config, silent)
    held_out = write_conversations(original, pieces, [[7], [8]], rows=64, window=32, seed=77).tokens.long().cuda()
    with torch.no_grad():
        before, after = (float(_loss(original, each, held_out)) for each in (student, trained))
    assert after < 0.7 * before
