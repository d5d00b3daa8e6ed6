"""Every precision of the torch engine, with every method, alone and in company."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundle import build, write_recipe

from ssv.runtime.llm import LLM
from ssv.runtime.methods import METHODS
from ssv.runtime.request import Request, SamplingParams
from ssv.support.precisions import TORCH_PRECISIONS
from ssv.support.prompts import read_prompts

MODEL_FREE = ("autoregressive", "lookahead", "prompt-lookup", "suffix")
"""May draft nothing: they find nothing, or many rows leave no room for it."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precisions")
    build(write_recipe(folder, heads=True), folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("precision", TORCH_PRECISIONS)
def test_every_method_decodes(bundle: Path, precision: str, batch: int) -> None:
    """Greedy and sampled rows of every method; the company changes as answers end at different lengths."""
    llm = LLM.load(bundle, precision=precision, max_batch=batch, verify=False)
    texts = read_prompts(bundle.parent / "prompts.jsonl")
    requests = [
        Request(
            llm.chat_ids(" ".join(texts[number % len(texts)].split()[: 4 + 3 * number])),
            method,
            SamplingParams(max_tokens=5 + 2 * number, temperature=temperature, seed=number, ignore_eos=True),
        )
        for number, (method, temperature) in enumerate((m, t) for t in (0.0, 0.8) for m in METHODS)
    ]
    outputs = llm.generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        assert output.finish_reason == "length"
        assert len(output.token_ids) == request.params.max_tokens
        assert output.counters.drafted > 0 or request.method in MODEL_FREE
    if precision in ("int8", "int4"):  # exact: the same alone
        for request, output in list(zip(requests, outputs, strict=True))[::3]:
            assert llm.generate([request])[0].token_ids == output.token_ids
