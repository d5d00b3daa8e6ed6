"""What a pass of the CUDA engine takes for shapes of bigger models and weights in bf16, FP8 and INT4, on one GPU.

Weights are random: times do not depend on them, and there is no text to judge. LM heads are bf16, as ModelOpt leaves
them. Bandwidth is that of reading: the bytes of weights and of the text's keys and values over the time of a graph,
beside the fastest of PyTorch's reductions over 8 GiB.

    python benchmarks/gpu_shapes.py --out benchmarks/records/gpu_shapes.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from gpu import median_ms, step_times
from torch import nn

from ssv.model.decoder import Decoder
from ssv.model.quantized import AwqLinear, Fp8Linear
from ssv.model.spec import DecoderSpec
from ssv.runtime.engines.cuda.engine import CudaEngine
from ssv.support.environment import versions, write_record

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
        "head_dim": 64, "vocab_size": 49_152,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 64, "vocab_size": 128_256,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "vocab_size": 128_256,
    },
}  # fmt: skip
PRECISIONS = "bf16,fp8,int4-128,int4-64,int4-32"
REST: dict[str, Any] = {
    "family": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "rope_scaling": None, "tie_embeddings": False,
    "qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"(default: {','.join(SHAPES)})")
    parser.add_argument(
        "--precisions", default=PRECISIONS, help=f"int4's with their group size (default: {PRECISIONS})"
    )
    parser.add_argument("--tokens", default="1,8,32", help="of a pass (default: 1,8,32)")
    parser.add_argument("--contexts", default="128,1024", help="tokens before a pass (default: 128,1024)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    contexts, tokens = ([int(word) for word in words.split(",")] for words in (args.contexts, args.tokens))
    bandwidth = read_bandwidth()
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "read_gb_per_s": round(bandwidth / 1e9, 1)}
    print(figures, file=sys.stderr)
    for shape in args.shapes.split(","):
        spec = DecoderSpec(**SHAPES[shape], **REST, max_positions=max(contexts) + 64)
        for precision in args.precisions.split(","):
            group = int(precision.partition("-")[2] or 0)
            if group and any(width % group for width in (spec.hidden_size, spec.intermediate_size)):
                continue
            engine = CudaEngine(
                random_decoder(spec, precision, group), max_batch=1, max_length=max(contexts) + 64
            )  # fmt: skip
            for context in contexts:
                cache = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * context
                size = engine.weight_bytes + cache
                found: dict[int, dict[str, float]] = {}
                for num in tokens:
                    times = step_times(engine, num, context)
                    found[num] = times | {"read_share": round(size / times["graph_ms"] * 1e3 / bandwidth, 3)}
                found[1]["tokens_per_s"] = round(1e3 / found[1]["step_ms"], 1)
                figures[f"{shape}, {precision}, at {context}"] = {"bytes": size, "tokens": found}
                print(shape, precision, context, found, file=sys.stderr)
            del engine
            torch.cuda.empty_cache()
    write_record(figures, args.out, versions("torch"))
    return 0


def random_decoder(spec: DecoderSpec, precision: str, group: int) -> Decoder:
    """A decoder on the GPU, its layers in a precision; embedding and LM head bf16."""
    with torch.device("meta"):
        decoder = Decoder(spec).to(torch.bfloat16)
    decoder.to_empty(device="cuda").requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
            if name != "lm_head" and precision != "bf16":
                decoder.set_submodule(name, _quantized(module, precision, group))
    return decoder


def _quantized(linear: nn.Linear, precision: str, group: int) -> nn.Module:
    outputs, inputs = linear.weight.shape
    if precision == "fp8":
        scale = linear.weight.abs().amax().float() / 448
        values_OI = (linear.weight / scale).to(torch.float8_e4m3fn)
        return Fp8Linear(values_OI, scale.expand(outputs).clone(), scale, None)
    packed_PI = torch.randint(0, 256, (outputs // 2, inputs), dtype=torch.uint8, device="cuda")
    scale_OG = torch.full((outputs, inputs // group), inputs**-0.5 / 4, device="cuda")
    return AwqLinear(packed_PI, scale_OG, None, None)


def read_bandwidth() -> float:
    """Bytes a second of the fastest reduction."""
    buffer = torch.empty(2**33, dtype=torch.uint8, device="cuda").random_(0, 100)
    reductions = [
        lambda: buffer.view(torch.int32).amax(),
        lambda: buffer.view(torch.float32).sum(),
        lambda: buffer.view(torch.bfloat16).amax(),
    ]
    milliseconds = min(median_ms(run, on_device=True, repeats=10) for run in reductions)
    return buffer.nbytes / milliseconds * 1e3


if __name__ == "__main__":
    sys.exit(main())
