"""How good are a bundle's draft and scorer on real prompts, and what does a precision cost the target?

In fp32, greedily: tokens per target pass of `speculative`; then, along those same answers, how often the draft's argmax
is the target's by depth, and the scorer's AUC beside the training-free baseline. Last, the perplexity of prompts and
answers under the target in each precision. Counts only: nothing here is timed.

    python benchmarks/draft_quality.py --bundle bundles/smollm2-135m --out benchmarks/records/draft_quality.json
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from ssv.builder.config import DistillConfig, ScorerConfig
from ssv.builder.training.corpus import Conversations
from ssv.builder.training.distill import measure_agreement
from ssv.builder.training.scorer_fit import auc, collect_samples, reliability
from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft
from ssv.model.scorer import load_scorer
from ssv.runtime.counters import Counters
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
_BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--num-draft-tokens", type=int, default=5)
    parser.add_argument("--precisions", default="fp32,int8,int4", help="of the perplexity (default: fp32,int8,int4)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    llm = LLM.load(args.bundle, precision="fp32", max_batch=_BATCH)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)]
    params = SamplingParams(max_tokens=args.max_tokens)
    outputs = llm.generate([Request(ids, "speculative", params, args.num_draft_tokens) for ids in prompts])
    counters = sum((output.counters for output in outputs), Counters(requests=0))
    print(f"{counters.tokens_per_pass:.3f} tokens per target pass", file=sys.stderr)
    texts = [ids + output.token_ids for ids, output in zip(prompts, outputs, strict=True)]
    figures = {
        "what": "draft and scorer on real prompts, greedy answers in fp32",
        "prompts": len(prompts),
        "answer_tokens": counters.emitted,
        "num_draft_tokens": args.num_draft_tokens,
        "tokens_per_target_pass": counters.tokens_per_pass,
        **_along_answers(args.bundle, prompts, texts, depth=args.num_draft_tokens),
        "perplexity": {name: _perplexity(args.bundle, name, texts) for name in args.precisions.split(",")},
    }
    write_record(figures, args.out, versions("torch", "transformers"))
    return 0


def _along_answers(
    bundle: Path, prompts: list[tuple[int, ...]], texts: list[tuple[int, ...]], depth: int
) -> dict[str, object]:
    target = Decoder.from_weights(*load_checkpoint(bundle / "target"))
    draft = load_draft(bundle / "draft" / "draft.safetensors", target)
    scorer = load_scorer(bundle / "scorer.safetensors", draft.spec.decoder.hidden_size)
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int32)
    answered = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        tokens[row, : len(text)] = torch.tensor(text)
        answered[row, len(ids) : len(text)] = True
    answers = Conversations(tokens, answered)
    settings = DistillConfig(layers=[0], depth=depth, batch_rows=len(texts))  # one batch: its mean is over tokens
    samples = collect_samples(target, draft, answers, ScorerConfig(depth=depth), batch_rows=_BATCH)
    features_NF = samples.features_NF if scorer.uses_hidden else samples.features_NF[:, -len(scorer.weight_F) :]
    predicted_N = torch.sigmoid(features_NF @ scorer.weight_F + scorer.bias)
    agreement = [measure_agreement(target, draft, _rows(answers, at), settings) for at in range(0, len(texts), _BATCH)]
    weight = [int(answered[at : at + _BATCH].sum()) for at in range(0, len(texts), _BATCH)]
    return {
        "agreement_by_depth": [
            sum(a[k] * w for a, w in zip(agreement, weight, strict=True)) / sum(weight) for k in range(depth)
        ],
        "scorer_samples": len(predicted_N),
        "scorer_auc": auc(predicted_N, samples.rejected_N),
        "scorer_auc_baseline": auc(samples.one_minus_p1_N, samples.rejected_N),
        "scorer_reliability": reliability(predicted_N, samples.rejected_N),
    }


def _rows(answers: Conversations, start: int) -> Conversations:
    rows = slice(start, start + _BATCH)
    length = int(answers.is_assistant[rows].nonzero()[:, 1].max()) + 1
    return Conversations(answers.tokens[rows, :length], answers.is_assistant[rows, :length])


def _perplexity(bundle: Path, precision: str, texts: list[tuple[int, ...]]) -> float:
    engine = LLM.load(bundle, precision=precision, verify=False).target
    loss, count = 0.0, 0
    start = torch.zeros(1, dtype=torch.int32)
    for text in texts:
        ids = torch.tensor([text])
        logits_TV = engine.step(ids, start, torch.arange(len(text))).logits_RV
        loss += float(F.cross_entropy(logits_TV[:-1], ids[0, 1:], reduction="sum"))
        count += len(text) - 1
    return math.exp(loss / count)


if __name__ == "__main__":
    sys.exit(main())
