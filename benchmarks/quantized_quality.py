"""What quantizing a target costs in quality: perplexity and argmax agreement of its quantized checkpoints against bf16,
and of the CPU engine's precisions against fp32, on held-out text.

Two texts: the held-out prompts as their authors wrote them, and the answers to them that the unquantized target gives.
The torch engine runs all of them, quantized inputs and weights included; no TensorRT is needed.

    python benchmarks/quantized_quality.py --bundle bundles/smollm2-135m --quantized fp8=DIR --quantized int4=DIR
    python benchmarks/quantized_quality.py --bundle bundles/smollm2-135m --precision int8 --precision int4
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssv.model.decoder import Decoder
from ssv.model.unified import load_any, quantization_of
from ssv.runtime.engines.contract import Engine
from ssv.runtime.engines.torch_engine import TorchEngine, target_engine
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of a prompt and its answer, and where the answer begins."""

    ids: tuple[int, ...]
    answer_start: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--quantized", action="append", default=[], metavar="NAME=DIR", help="quantized checkpoint")
    parser.add_argument("--precision", action="append", default=[], help="of the bundle's own target, on a CPU")
    parser.add_argument("--prompts", type=Path, default=Path("benchmarks/prompts/heldout.jsonl"))
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="record to write")
    args = parser.parse_args()
    texts = _texts(args.bundle, read_prompts(args.prompts)[: args.num_prompts], args.max_tokens)
    found: dict[str, dict[str, object]] = {}
    reference = _engine(args.bundle / "target", args.device) if args.quantized else None
    for given in args.quantized:
        assert reference is not None
        name, _, folder = given.partition("=")
        found[name] = _compare(reference, _engine(Path(folder), args.device), texts)
        found[name]["precision"] = quantization_of(Path(folder))
        print(name, found[name], file=sys.stderr)
    exact = LLM.load(args.bundle, precision="fp32", verify=False).target if args.precision else None
    for name in args.precision:
        assert exact is not None
        found[name] = _compare(exact, LLM.load(args.bundle, precision=name, verify=False).target, texts)
        print(name, found[name], file=sys.stderr)
    figures = {"texts": len(texts), "tokens": sum(len(text.ids) for text in texts), "quantized": found}
    write_record(figures, args.out, versions("torch", "nvidia-modelopt"), args.device)
    return 0


def _texts(bundle: Path, prompts: list[str], max_tokens: int) -> list[Text]:
    llm = LLM.load(bundle, precision="fp32", max_batch=8)
    requests = [
        Request(llm.chat_ids(prompt), "autoregressive", SamplingParams(max_tokens=max_tokens)) for prompt in prompts
    ]
    outputs = llm.generate(requests)
    return [
        Text((*request.prompt_ids, *output.token_ids), len(request.prompt_ids))
        for request, output in zip(requests, outputs, strict=True)
    ]


def _engine(folder: Path, device: str) -> TorchEngine:
    decoder = Decoder.from_weights(*load_any(folder))
    return target_engine(decoder, precision="bf16", max_batch=1, max_length=_MAX_LENGTH, device=device)


def _compare(reference: Engine, quantized: Engine, texts: list[Text]) -> dict[str, object]:
    """Perplexities and their ratio, share of equal argmaxes, and mean KL divergence in nats, on prompts, on answers,
    and on both.
    """
    sums = {part: torch.zeros(5, dtype=torch.float64) for part in ("prompts", "answers")}
    for text in texts:
        ids = torch.tensor([text.ids])
        ours, theirs = (_log_probabilities(engine, ids) for engine in (quantized, reference))
        nexts = ids[0, 1:, None]
        losses = [-x[:-1].gather(1, nexts)[:, 0] for x in (ours, theirs)]
        equal = (ours.argmax(dim=1) == theirs.argmax(dim=1))[:-1].double()
        divergence = (theirs.exp() * (theirs - ours)).sum(dim=1)[:-1]
        values = torch.stack((torch.ones_like(equal), losses[0], losses[1], equal, divergence))
        sums["prompts"] += values[:, : text.answer_start - 1].sum(dim=1)
        sums["answers"] += values[:, text.answer_start - 1 :].sum(dim=1)
    sums["both"] = sums["prompts"] + sums["answers"]
    return {part: _figures(*values.tolist()) for part, values in sums.items()}


def _figures(count: float, loss: float, reference_loss: float, equal: float, divergence: float) -> dict[str, float]:
    return {
        "tokens": count,
        "perplexity": round(math.exp(loss / count), 4),
        "perplexity_unquantized": round(math.exp(reference_loss / count), 4),
        "perplexity_ratio": round(math.exp((loss - reference_loss) / count), 5),
        "argmax_agreement": round(equal / count, 4),
        "kl_nats": round(divergence / count, 5),
    }


def _log_probabilities(engine: Engine, ids_1T: Tensor) -> Tensor:
    """[T, V], float64 on the CPU."""
    rows = torch.arange(ids_1T.shape[1])
    logits_TV = engine.step(ids_1T, torch.zeros(1, dtype=torch.int32), rows).logits_RV
    return logits_TV.double().cpu().log_softmax(dim=1)


if __name__ == "__main__":
    sys.exit(main())
