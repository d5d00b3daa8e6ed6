"""The CUDA kernels on the CPU: compiled as C++, every thread a fiber (`cuda_on_cpu.h`), and an engine that runs them.

It shows what kernels compute; what only a GPU shows (races, the compiler's code for it, speed) is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.plugins.cuda.compiler import source_of
from ssv.plugins.cuda.driver import Kernel
from ssv.runtime.engines.contract import Branches
from ssv.runtime.engines.cuda import engine, launching, places
from ssv.runtime.engines.cuda.weights import Weights
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import vocabulary_ids

BODIES = {
    "load_weights": "return *p;",
    "load_scales": "return *p;",
    "round_pair": "return to_bf16(lo) | to_bf16(hi) << 16;",
    "multiply": "tensor_core(c, a, b0, b1);",
    "scale_and_shift": "u32 r = 0; for (int i = 0; i < 32; i += 16) r |= to_bf16(fmaf(from_bf16(pair >> i & 0xffff), "
    "from_bf16(factor >> i & 0xffff), from_bf16(offset >> i & 0xffff))) << i; return r;",
    "widen_nibbles": "return scale_and_shift((word & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);",
    "copy_ahead": "std::memset(to, 0, 16); if (is_there) std::memcpy(to, from, 16);",
    "prefetch_line": "",
    "end_copies": "",
    "await_copies": "",
    "power_of_two": "const float r = std::exp2(x); return std::fpclassify(r) == FP_SUBNORMAL ? 0.0f : r;",
}
"""Of the functions that are assembly."""

ARGUMENTS = {"store": "Linear", "add": "Linear", "gate": "Linear"} | dict.fromkeys(
    ("attend", "turn", "attend_many", "join_shares"), "Attention"
)
"""Of kernels whose structure is not named like them."""


class CpuKernel(Kernel):
    """A kernel that runs here, and at once."""

    def launch(
        self,
        argument: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        *,
        shared: int = 0,
        overlaps: bool = False,
    ) -> None:
        self._function(ctypes.byref(argument), *grid, threads, shared)


@cache
def kernels_of(device: object, source: str, names: tuple[str, ...], **chosen: int) -> dict[str, Kernel]:
    """`ssv.runtime.engines.cuda.launching.kernels_of`."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("there is no C++ compiler")
    text = source_of(source)
    for name, body in BODIES.items():
        text = _with_body(text, name, body)
    text = re.sub(r"extern __shared__ (\w+) shared\[\];", r"\1 *shared = (\1 *)dynamic_shared;", text)
    assert "asm" not in text.replace('asm volatile("griddepcontrol', "")
    for name in names:
        argument = ARGUMENTS.get(name, name.capitalize())
        text += (
            f'extern "C" void run_{name}(const {argument} *p, int x, int y, int z, int threads, int shared) '
            f"{{ run_grid([p] {{ {name}(*p); }}, x, y, z, threads, shared); }}\n"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cpp")
        path.write_text(f'#include "cuda_on_cpu.h"\n{text}')
        command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fpermissive", "-w", "-fPIC", "-shared"]
        command += [f"-I{Path(__file__).parent}", *(f"-D{name}={value}" for name, value in chosen.items())]
        subprocess.run([*command, "-o", str(path.with_suffix(".so")), str(path)], check=True)
        library = ctypes.CDLL(str(path.with_suffix(".so")))
    return {name: CpuKernel(library[f"run_{name}"]) for name in names}


def _with_body(text: str, name: str, body: str) -> str:
    if (head := re.search(rf"^__device__ __forceinline__ [\w ]*?\b{name}\([^)]*\) \{{", text, re.MULTILINE)) is None:
        return text
    end, depth = head.end(), 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return f"{text[: head.end()]} {body} }}{text[end:]}"


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the engine's modules launch such kernels, as for a GPU of 132 multiprocessors."""
    for module in (launching, engine):
        monkeypatch.setattr(module, "kernels_of", kernels_of)
    monkeypatch.setattr(launching, "_num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(launching, "_most_shared", lambda: 226 * 1024)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, pin_memory=False, **rest: zeros(*sizes, **rest))


class CpuNumbers:
    """`Numbers` that are there at once."""

    def __init__(self, most_tokens: int = places.TOKENS) -> None:
        self.host = np.zeros(places.size(most_tokens), dtype=np.int32)
        self._size_of_chains = places.size_of_chains(most_tokens)

    def wait(self) -> None:
        pass

    def send(self, dest: Tensor, has_paths: bool) -> None:
        size = self._size_of_chains if not has_paths else len(self.host)
        dest[:size].copy_(torch.from_numpy(self.host[:size]))


class CpuEngine(engine.CudaEngine):
    """A target or a draft whose kernels run here; its cache is NaN where nobody has written."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_batch: int,
        max_length: int,
        draft: Draft | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        spec = decoder.spec
        self.spec, self.max_batch, self.max_length = spec, max_batch, max_length
        self.device, self._tapped, self._scorer, self.overlaps = torch.device("cpu"), (), scorer, False
        self.has_scorer = scorer is not None
        self.num_features = spec.hidden_size if draft is not None and draft.conditioned else 0
        self.token_ids_V = None if draft is None else vocabulary_ids(draft.token_ids, spec.vocab_size)
        self.vocab_size = spec.vocab_size if draft is None else draft.spec.head_size
        self.cache = KVCache(spec, max_batch, max_length, torch.bfloat16, self.device)
        self.cache.keys.fill_(torch.nan)
        self.cache.values.fill_(torch.nan)
        self._weights = Weights(decoder, None, draft)
        self._kernels, self._many_kernels = self._load_kernels()
        self._make_buffers()
        self._numbers = cycle([CpuNumbers()])  # type: ignore[assignment]
        self._many_numbers = cycle([CpuNumbers(places.MANY_TOKENS)])  # type: ignore[assignment]

    def graph(self, shape: engine.Shape) -> torch.cuda.CUDAGraph:
        """What runs a shape's kernels."""
        return SimpleNamespace(replay=lambda: self.enqueue(shape))  # type: ignore[return-value]

    def logits(
        self,
        ids_BT: Tensor,
        first_slots: list[int],
        *,
        branches: Branches | None = None,
        counts: list[int] | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Of all tokens of a step, [M, V]; and the likeliest of each is what the kernel says."""
        found = []
        for block in places.blocks(counts or [ids_BT.shape[1]] * len(ids_BT)):
            num = block.num_tokens
            group_tokens = launching.group_tokens_for(self.spec, launching.width_for(num))
            numbers = np.zeros(places.SIZE, dtype=np.int32)
            most_seen = places.write(
                numbers, block, ids_BT.numpy(), first_slots, first_row, list(range(num)), branches, group_tokens
            )
            self.buffers.step.copy_(torch.from_numpy(numbers))
            width, key_blocks = launching.width_for(num), launching.key_blocks_for(most_seen)
            self.enqueue(engine.Shape(width, key_blocks, True, False))
            logits_MV = self.buffers.logits_RV[:num].clone()
            assert torch.equal(self.buffers.token_R[:num], logits_MV.argmax(dim=1))
            found.append(logits_MV)
        return torch.cat(found)
