"""The engine contract on CUDA graphs of the kernels of `ssv.plugins.cuda`: bf16, for few tokens a step.

A step is cut into blocks of at most 64 tokens; a block is one replay of the graph that has room for its tokens and its
longest text. What a token gives depends on itself alone (see decoder.cu), so that a step may be cut anywhere.

Shapes: see `contract.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft, FeatureTap
from ssv.model.scorer import Scorer
from ssv.model.spec import DecoderSpec
from ssv.plugins.cuda.compiler import SOURCE, compile_source, version
from ssv.plugins.cuda.driver import Kernel, Module
from ssv.plugins.ops import on
from ssv.runtime.engines.contract import Branches, EngineError, Grown, StepOutput, TreeShape, check_step
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.packing import PAIR, TILE, interleave, pack
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import vocabulary_ids
from ssv.support.files import write_whole

_KEYS = 256
"""Keys that a block of the attention kernel takes."""

_WIDTHS = (8, 16, 32, 64)
"""Tokens that graphs have room for."""

_MOST_WARPS = 16
_AHEAD = 4

_OVERLAPPING = (9, 0)
"""Compute capability from which a kernel may begin while the one before it runs."""

_NUM_IN_FLIGHT = 8
"""Steps whose numbers may still be on their way to the device when another's are written."""


_MOST_CHILDREN = 16
"""Of a node, most nodes of a level that get children, and most levels."""

_MOST_FOUND = 1024
"""Candidates of a row's tree: 16 levels of 4 children for 16 nodes each, or 7 of 9 for 16."""


def misfit(spec: DecoderSpec, tap_width: int = 0) -> str | None:
    """Why the kernels cannot run a decoder; None if they can."""
    for name, width in (
        ("hidden_size", spec.hidden_size),
        ("intermediate_size", spec.intermediate_size),
        ("the heads' width", spec.num_heads * spec.head_dim),
        ("the features' width", tap_width),
    ):
        if width % PAIR:
            return f"{name} {width} is no multiple of {PAIR}"
    if spec.head_dim % 8 or spec.head_dim > 256:
        return f"head_dim {spec.head_dim} is no multiple of 8, or above 256"
    if spec.num_heads // spec.num_kv_heads > 16:
        return f"{spec.num_heads // spec.num_kv_heads} query heads share a key/value head: at most 16 can"
    return None


class CudaEngine:
    """A target or a draft over its own KV cache, on one GPU.

    Attributes:
        last_graph: what the last step replayed last.
    """

    most_growing = places.TOKENS

    last_graph: torch.cuda.CUDAGraph

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_batch: int,
        max_length: int,
        tap: FeatureTap | None = None,
        draft: Draft | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        """Args:
        decoder, tap, draft: bf16, on the GPU; their large weights are packed here, and may be dropped after.

        Raises:
            EngineError: a model that the kernels cannot run (`misfit`), or longer than it has positions for.
        """
        spec = decoder.spec
        if max_length > spec.max_positions:
            raise EngineError(f"max length {max_length} exceeds the model's {spec.max_positions} positions")
        if reason := misfit(spec, tap.project.in_features if tap is not None else 0):
            raise EngineError(f"the CUDA kernels cannot run this model: {reason}")
        self.max_batch, self.max_length, self.spec = max_batch, max_length, spec
        self.device = decoder.embed.weight.device
        self.has_scorer, self._scorer = scorer is not None, scorer
        conditioned = draft is not None and draft.conditioned
        self.num_features = spec.hidden_size if conditioned else 0
        self.token_ids_V = None if draft is None else vocabulary_ids(draft.token_ids, spec.vocab_size)
        self.vocab_size = spec.vocab_size if draft is None else draft.spec.head_size
        self.cache = KVCache(spec, max_batch, max_length, torch.bfloat16, self.device)
        self._tapped = tap.layers if tap is not None else ()
        self._weights = _Weights(decoder, tap, draft if conditioned else None)
        self._kernels = _kernels(self.device, _OTHERS, **macros(spec))
        self._overlaps = torch.cuda.get_device_capability(self.device) >= _OVERLAPPING
        self._buffers = _Buffers(spec, self.device, max_length, self.vocab_size, len(self._tapped))
        self._stream = torch.cuda.Stream(self.device)
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}
        self._scored: dict[_Shape, Tensor] = {}
        self._numbers = cycle([_Numbers(self.device) for _ in range(_NUM_IN_FLIGHT)])

    @torch.inference_mode()
    def step(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None = None,
        *,
        branches: Branches | None = None,
        count_B: Tensor | None = None,
        features_out: bool = False,
        first_row: int = 0,
    ) -> StepOutput:
        """See `Engine.step`."""
        check_step(self, input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, first_row)
        if features_out and not self._tapped:
            raise EngineError("features_out: this engine was made without the tap of a conditioned draft")
        batch, tokens = input_ids_BT.shape
        counts = [tokens] * batch if count_B is None else count_B.tolist()
        gathered, first_slots, ids_BT = gather_rows_R.tolist(), first_slot_B.tolist(), input_ids_BT.numpy()
        blocks = list(places.blocks(counts))
        parts: list[tuple[_Block, list[int]]] = []
        for block in blocks:
            at = {
                run.b * tokens + t: run.first + t - run.start for run in block.runs for t in range(run.start, run.stop)
            }
            wanted = [r for r, row in enumerate(gathered) if row in at]
            rows = [at[gathered[r]] for r in wanted]
            numbers, most_seen = self._write(block, ids_BT, first_slots, first_row, rows, branches, features_in_BTF)
            found = self._replay(numbers, block.num_tokens, len(wanted), most_seen, branches is not None, features_out)
            parts.append((found.kept() if len(blocks) > 1 else found, wanted))
        return self._joined(parts, blocks, len(gathered), batch, tokens, features_out)

    def move_row(self, source: int, dest: int, length: int) -> None:
        """See `Engine.move_row`."""
        self.cache.move_row(source, dest, length)

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        """See `Engine.keep`."""
        self.cache.keep(row, start, slots)

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        """See `Engine.read_cache`."""
        return self.cache.read(row, start, stop)

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        """See `Engine.write_cache`."""
        self.cache.write(row, start, held)

    def _write(
        self,
        block: places.Block,
        ids_BT: NDArray[np.int64],
        first_slots: Sequence[int],
        first_row: int,
        gathered: Sequence[int],
        branches: Branches | None,
        features_BTF: Tensor | None,
    ) -> tuple[_Numbers, int]:
        """Writes a block's numbers, which are still to be sent, and hands on its features; see `places.write`."""
        numbers = next(self._numbers)
        numbers.wait()
        group_tokens = _group_tokens(self.spec, _width(block.num_tokens))
        most_seen = places.write(numbers.host, block, ids_BT, first_slots, first_row, gathered, branches, group_tokens)
        if features_BTF is not None:
            for run in block.runs:
                self._buffers.features_in_MF[run.first : run.first + run.stop - run.start].copy_(
                    features_BTF[run.b, run.start : run.stop], non_blocking=True
                )
        return numbers, most_seen

    def _replay(
        self,
        numbers: _Numbers,
        num_tokens: int,
        num_gathered: int,
        most_seen: int,
        has_paths: bool,
        features: bool,
    ) -> _Block:
        shape = _Shape(_width(num_tokens), _key_blocks(most_seen), num_gathered > 0, features)
        graph = self._graph(shape)
        numbers.send(self._buffers.step, has_paths)
        graph.replay()
        self.last_graph = graph
        b = self._buffers
        scored = self._scored.get(shape)
        return _Block(
            b.hidden_RH[:num_gathered],
            b.logits_RV[:num_gathered],
            b.token_R[:num_gathered],
            scored[:num_gathered] if scored is not None else None,
            b.features_MF[:num_tokens] if features else None,
        )

    def _joined(
        self,
        parts: list[tuple[_Block, list[int]]],
        blocks: list[places.Block],
        num_gathered: int,
        batch: int,
        tokens: int,
        features_out: bool,
    ) -> StepOutput:
        """One step's output from its blocks'."""
        if len(parts) == 1:
            found = parts[0][0]
        else:
            found = _Block.joined([part for part, _ in parts])
            order = [r for _, wanted in parts for r in wanted]
            if order != list(range(num_gathered)):
                found = found.sorted_by(torch.tensor(order, device=self.device).argsort())
        features_BTF = None
        if features_out:
            features_MF = found.features_MF
            assert features_MF is not None
            if len(features_MF) != batch * tokens:
                places_M = [r.b * tokens + t for block in blocks for r in block.runs for t in range(r.start, r.stop)]
                at_M = torch.tensor(places_M, device=self.device)
                features_MF = features_MF.new_zeros(batch * tokens, features_MF.shape[1]).index_copy_(
                    0, at_M, features_MF
                )
            features_BTF = features_MF.view(batch, tokens, -1)
        return StepOutput(found.hidden_RH.clone(), found.logits_RV, features_BTF, found.reject_prob_R, found.token_R)

    def _graph(self, shape: _Shape) -> torch.cuda.CUDAGraph:
        """The graph of a shape: run once without tokens, so that everything is loaded, and captured."""
        if (graph := self._graphs.get(shape)) is not None:
            return graph
        self._buffers.step.zero_()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._enqueue(shape)
        self._stream.synchronize()
        graph = self._graphs[shape] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue(shape)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return graph

    def _enqueue(self, shape: _Shape) -> None:
        """Puts the kernels of a block on the current stream."""
        b, w, spec = self._buffers, self._weights, self.spec
        stream = torch.cuda.current_stream(self.device).cuda_stream
        tiles = shape.width // 8
        kernels = self._kernels | _kernels(self.device, _PRODUCTS, TILES=tiles)
        launch = _Launcher(kernels, stream, tiles, b, self._overlaps)
        step, eps = b.step.data_ptr(), spec.rms_norm_eps
        if w.join is None:
            launch("embed", (shape.width, 1, 1), 64, _Embed(
                step, w.embed.data_ptr(), w.layers[0].attn_norm.data_ptr(), b.x_MH.data_ptr(), b.scaled_MH.data_ptr(),
                b.squares_MH.data_ptr(), spec.hidden_size,
            ))  # fmt: skip
        else:
            launch("join", (shape.width, 1, 1), 256, _Join(
                step, w.embed.data_ptr(), b.features_in_MF.data_ptr(), w.embed_norm.data_ptr(),
                w.feature_norm.data_ptr(), b.x_MH.data_ptr(), b.joined_MH.data_ptr(), spec.hidden_size, eps,
            ))  # fmt: skip
            launch.add(w.join, b.joined_MH, w.layers[0].attn_norm)
        for index, layer in enumerate(w.layers):
            launch.store(layer.qkv, b.scaled_MH, b.qkv_MX, eps=eps, normed=True)
            launch("attend", (shape.key_blocks, spec.num_kv_heads, shape.width), 256, _Attention(
                step, b.qkv_MX.data_ptr(), self.cache.keys[index].data_ptr(), self.cache.values[index].data_ptr(),
                w.cos_SP.data_ptr(), w.sin_SP.data_ptr(), _address(layer.q_norm), _address(layer.k_norm),
                b.attended_MX.data_ptr(), b.partial.data_ptr(), b.arrivals.data_ptr(), spec.num_heads,
                spec.num_kv_heads, self.max_length, b.most_blocks, _group_tokens(spec, shape.width), eps,
            ), _attention_bytes(spec, shape.width))  # fmt: skip
            launch.add(layer.o, b.attended_MX, layer.mlp_norm)
            launch.gate(layer.gate_up, b.scaled_MH, b.gated_MI, eps)
            following = w.layers[index + 1].attn_norm if index + 1 < len(w.layers) else w.norm
            tapped = self._tapped.index(index) if shape.features and index in self._tapped else None
            launch.add(layer.down, b.gated_MI, following, tapped)
        if shape.features:
            assert w.tap is not None
            launch.store(w.tap, b.tapped_MX, b.features_MF)
        if shape.has_head:
            launch.store(w.head, b.scaled_MH, b.logits_RV, eps=eps, normed=True, gathered=True)
            ids = _address(self.token_ids_V)
            if shape.grows is None:
                launch("largest", (shape.width, 1, 1), 1024, _Largest(
                    step, b.logits_RV.data_ptr(), ids, b.token_R.data_ptr(), self.vocab_size
                ))  # fmt: skip
            if (scorer := self._scorer) is not None:
                rows = slice(0, shape.width)
                score = on(self.device).score(
                    b.hidden_RH[rows], b.logits_RV[rows], scorer.weight_F, scorer.bias.view(1)
                )
                self._scored[shape] = score.reject_prob_R
            if shape.grows is not None:
                self._enqueue_growth(launch, shape, *shape.grows, ids)

    def _enqueue_growth(self, launch: _Launcher, shape: _Shape, beam: int, children: int, ids: int) -> None:
        """What makes candidates of a level's logits, and the step of the next level."""
        b, step = self._buffers, self._buffers.step.data_ptr()
        launch("best", (shape.width, 1, 1), 512, _Best(
            step, b.logits_RV.data_ptr(), ids, b.best_token.data_ptr(), b.best_share.data_ptr(), self.vocab_size,
            children,
        ))  # fmt: skip
        launch("grow", (places.TOKENS, 1, 1), 256, _Grow(
            step, b.best_token.data_ptr(), b.best_share.data_ptr(), _address(self._scored.get(shape)),
            b.hidden_RH.data_ptr(), b.features_in_MF.data_ptr() if self.num_features else 0, b.corrections.data_ptr(),
            b.found.data_ptr(), b.survival.data_ptr(), b.candidate.data_ptr(), b.path.data_ptr(),
            self.spec.hidden_size, beam, children, _MOST_FOUND, 1,
        ))  # fmt: skip

    @torch.inference_mode()
    def grow(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        count_B: Tensor,
        features_in_BTF: Tensor | None,
        shape: TreeShape,
        corrections: Sequence[tuple[float, float]],
    ) -> list[Grown | None]:
        """See `GrowingEngine.grow`: a graph a level, one behind the other, and one answer at the end."""
        counts, first_slots = count_B.tolist(), first_slot_B.tolist()
        growing = [b for b, count in enumerate(counts) if count]
        tokens = input_ids_BT.shape[1]
        last_rows = [b * tokens + counts[b] - 1 for b in growing]
        check_step(
            self, input_ids_BT, first_slot_B, torch.tensor(last_rows), features_in_BTF, None, count_B, first_row=0
        )
        ends = [first_slots[b] + counts[b] for b in growing]
        num_slots = sum(shape.opened(level) for level in range(1, shape.levels))
        self._check_growth(shape, sum(counts), len(growing), max(ends) + num_slots)
        (block,) = places.blocks(counts)
        # The texts' step, and a graph for each level behind it, before anything is under way.
        graphs = []
        for level in range(shape.levels):
            tokens_of_level = block.num_tokens if not level else len(growing) * shape.opened(level)
            key_blocks = _key_blocks(max(ends) + level)
            at = _Shape(_width(tokens_of_level), key_blocks, True, False, (shape.beam, shape.children))
            graphs.append(self._graph(at))
        self._buffers.correct(corrections)
        last = [run.first + run.stop - run.start - 1 for run in block.runs]
        numbers, _ = self._write(block, input_ids_BT.numpy(), first_slots, 0, last, None, features_in_BTF)
        places.write_growing(numbers.host, growing, ends)
        numbers.send(self._buffers.step, has_paths=False)
        for graph in graphs:
            graph.replay()
        num = shape.firsts[-1]
        found = iter(self._buffers.read_found(len(growing)))
        return [_grown(next(found), num) if count else None for count in counts]

    def _check_growth(self, shape: TreeShape, num_tokens: int, num_growing: int, num_slots: int) -> None:
        if num_tokens > places.TOKENS or num_growing * shape.opened(shape.levels) > self.most_growing:
            raise EngineError(
                f"{num_growing} trees of {shape} behind {num_tokens} tokens: there is room for {places.TOKENS} tokens "
                f"of texts and {self.most_growing} nodes of a level"
            )
        sizes = {"beam": shape.beam, "children": shape.children, "levels": shape.levels}
        if wrong := [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= _MOST_CHILDREN]:
            raise EngineError(f"trees of {', '.join(wrong)}: 1 to {_MOST_CHILDREN} are possible")
        if (num := shape.firsts[-1]) > _MOST_FOUND:
            raise EngineError(f"trees of {num} guesses: there is room for {_MOST_FOUND}")
        if num_slots > self.max_length:
            raise EngineError(f"trees reach slot {num_slots - 1}, the cache holds {self.max_length}")


# --- shapes and what a block gives ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph is captured for.

    Attributes:
        width: tokens that it has room for.
        key_blocks: blocks of keys that its longest text may have.
        grows: beam and children of trees that it makes a level of; None of a step.
    """

    width: int
    key_blocks: int
    has_head: bool
    features: bool
    grows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """What a block gives, in the engine's own buffers."""

    hidden_RH: Tensor
    logits_RV: Tensor
    token_R: Tensor
    reject_prob_R: Tensor | None
    features_MF: Tensor | None

    def _fields(self) -> Iterator[Tensor | None]:
        yield from (self.hidden_RH, self.logits_RV, self.token_R, self.reject_prob_R, self.features_MF)

    def kept(self) -> _Block:
        """Copies: the next block overwrites the buffers."""
        return _Block(*(None if x is None else x.clone() for x in self._fields()))  # type: ignore[arg-type]

    def sorted_by(self, order_R: Tensor) -> _Block:
        """With its gathered rows in another order."""
        *gathered, features = self._fields()
        ordered = [None if x is None else x[order_R] for x in gathered]
        return _Block(*ordered, features)  # type: ignore[arg-type, call-arg]

    @classmethod
    def joined(cls, blocks: Sequence[_Block]) -> _Block:
        columns = zip(*(block._fields() for block in blocks), strict=True)
        return cls(*(None if xs[0] is None else torch.cat(xs) for xs in columns))  # type: ignore[arg-type]


class _Numbers:
    """A vector of `places` on its way to the device."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.zeros(places.SIZE, dtype=torch.int32, pin_memory=True)
        self.host = self._pinned.numpy()
        self._sent = torch.cuda.Event()
        self._device = device

    def wait(self) -> None:
        """Until it may be written again."""
        self._sent.synchronize()

    def send(self, dest: Tensor, has_paths: bool) -> None:
        size = places.SIZE if has_paths else places.SIZE_OF_CHAINS
        dest[:size].copy_(self._pinned[:size], non_blocking=True)
        self._sent.record(torch.cuda.current_stream(self._device))


# --- weights and buffers ----------------------------------------------------------------------------------------------


class _Linear:
    """A packed product: its weights, and what else its kernel is launched with."""

    def __init__(self, linear: nn.Module, *, gated: bool = False) -> None:
        assert isinstance(linear, nn.Linear)
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        self.outputs, inputs = weight.shape
        if gated:
            weight, bias = interleave(weight), interleave(bias) if bias is not None else None
        self.packed, self.bias_N = pack(weight), None if bias is None else bias.float().contiguous()
        self.pairs, self.tiles = inputs // PAIR, len(self.packed)
        # K alone decides how a sum is split between warps.
        self.share = -(-self.pairs // min(-(-self.pairs // _AHEAD), _MOST_WARPS))
        self.warps = -(-self.pairs // self.share)


class _LayerWeights:
    def __init__(self, layer: Layer) -> None:
        self.qkv, self.o, self.down = _Linear(layer.qkv), _Linear(layer.o), _Linear(layer.down)
        self.gate_up = _Linear(layer.gate_up, gated=True)
        assert layer.attn_norm is not None
        self.attn_norm, self.mlp_norm = layer.attn_norm.weight.float(), layer.mlp_norm.weight.float()
        self.q_norm = layer.q_norm.weight.float() if layer.q_norm is not None else None
        self.k_norm = layer.k_norm.weight.float() if layer.k_norm is not None else None


class _Weights:
    """Everything that the kernels read of a model."""

    def __init__(self, decoder: Decoder, tap: FeatureTap | None, draft: Draft | None) -> None:
        self.embed = decoder.embed.weight.to(torch.bfloat16)
        self.layers = [_LayerWeights(layer) for layer in decoder.blocks()]
        self.norm, self.head = decoder.norm.weight.float(), _Linear(decoder.lm_head)
        self.tap = _Linear(tap.project) if tap is not None else None
        self.join = _Linear(draft.join) if draft is not None else None
        if draft is not None:
            self.embed_norm, self.feature_norm = draft.embed_norm.weight.float(), draft.feature_norm.weight.float()
        positions = torch.arange(decoder.spec.max_positions, device=self.embed.device)
        rotation = decoder.rotation(positions, torch.float32)
        self.cos_SP, self.sin_SP = rotation.cos[:, 0].contiguous(), rotation.sin[:, 0].contiguous()


class _Buffers:
    """What kernels hand to one another: room for `places.TOKENS` tokens."""

    def __init__(self, spec: DecoderSpec, device: torch.device, max_length: int, vocab: int, num_tapped: int) -> None:
        def room(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(places.TOKENS, width, dtype=dtype, device=device)

        hidden, bf16 = spec.hidden_size, torch.bfloat16
        heads = spec.num_heads * spec.head_dim
        self.step = torch.zeros(places.SIZE, dtype=torch.int32, device=device)
        self.x_MH, self.scaled_MH, self.squares_MH = room(hidden), room(hidden, bf16), room(hidden // TILE)
        self.joined_MH, self.features_in_MF = room(2 * hidden, bf16), room(hidden)
        self.qkv_MX = room(heads + 2 * spec.num_kv_heads * spec.head_dim)
        self.attended_MX, self.gated_MI = room(heads, bf16), room(spec.intermediate_size, bf16)
        self.tapped_MX, self.features_MF = room(num_tapped * hidden, bf16), room(hidden)
        self.hidden_RH, self.logits_RV = room(hidden), room(vocab)
        self.token_R = torch.zeros(places.TOKENS, dtype=torch.int64, device=device)
        # Of trees that grow.
        self.best_token = torch.zeros(places.TOKENS, _MOST_CHILDREN, dtype=torch.int32, device=device)
        self.best_share = room(_MOST_CHILDREN)
        self.corrections = torch.zeros(_MOST_CHILDREN, 2, device=device)
        self.found = torch.zeros(places.TOKENS, _MOST_FOUND, 4, dtype=torch.int32, device=device)
        self.survival, self.candidate = room(_MOST_CHILDREN), room(_MOST_CHILDREN, torch.int32)
        self.path = room(_MOST_CHILDREN * _MOST_CHILDREN, torch.int32)
        self._found_host = torch.zeros(self.found.shape, dtype=torch.int32, pin_memory=True)
        self._corrected_by: tuple[tuple[float, float], ...] = ()
        self.most_blocks = -(-max_length // _KEYS)
        self.partial = room(spec.num_heads * self.most_blocks * (spec.head_dim + 2))
        self.arrivals = torch.zeros(places.TOKENS, spec.num_kv_heads, dtype=torch.int32, device=device)

    def correct(self, corrections: Sequence[tuple[float, float]]) -> None:
        """Takes the corrections of shares by rank."""
        if tuple(corrections) != self._corrected_by:
            self._corrected_by = tuple(corrections)
            table = [corrections[min(rank, len(corrections) - 1)] for rank in range(_MOST_CHILDREN)]
            self.corrections.copy_(torch.tensor(table))

    def read_found(self, num_rows: int) -> NDArray[np.int32]:
        """Candidates of the rows that grew, once they are there."""
        self._found_host[:num_rows].copy_(self.found[:num_rows], non_blocking=True)
        torch.cuda.current_stream(self.found.device).synchronize()
        return self._found_host[:num_rows].numpy()


def _grown(found: NDArray[np.int32], num: int) -> Grown:
    tokens, parents, shares, risks = found[:num].T.copy()
    return Grown(tokens, parents, shares.view(np.float32), risks.view(np.float32))


# --- launching --------------------------------------------------------------------------------------------------------


def _structure(name: str, pointers: str, ints: str, floats: str = "") -> type[ctypes.Structure]:
    """A kernel's argument as decoder.cu declares it: pointers first, then integers and floats."""
    kinds: tuple[tuple[str, type], ...] = ((pointers, ctypes.c_void_p), (ints, ctypes.c_int), (floats, ctypes.c_float))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Embed = _structure("_Embed", "step table norm x scaled squares", "hidden")
_Join = _structure("_Join", "step table features embed_norm feature_norm x joined", "hidden", "eps")
_Product = _structure(
    "_Product",
    "step weight x squares bias out out_bf16 out_squares next_norm tapped from_ copied",
    "pairs share outputs num_squares tapped_width gathered",
    "eps",
)
_Largest = _structure("_Largest", "step logits tokens token", "vocab")
_Best = _structure("_Best", "step logits tokens token share", "vocab count")
_Grow = _structure(
    "_Grow",
    "step token share risk hidden features corrections found survival candidate path",
    "hidden_size beam children most_found group_tokens",
)
_Attention = _structure(
    "_Attention",
    "step qkv keys values cosine sine q_norm k_norm out partial arrivals",
    "heads kv_heads slots most_blocks group_tokens",
    "eps",
)


class _Launcher:
    """Puts kernels on a stream, each overlapping the one before it."""

    def __init__(self, kernels: dict[str, Kernel], stream: int, tiles: int, buffers: _Buffers, overlaps: bool) -> None:
        self._kernels, self._stream, self._tiles, self._buffers = kernels, stream, tiles, buffers
        self._overlaps, self._is_first = overlaps, True

    def __call__(
        self, name: str, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure, shared: int = 0
    ) -> None:
        kernel = self._kernels[name]
        kernel.launch(
            argument, grid, threads, self._stream, shared=shared, overlaps=self._overlaps and not self._is_first
        )
        self._is_first = False

    def store(
        self, linear: _Linear, x: Tensor, out: Tensor, *, eps: float = 0.0, normed: bool = False, gathered: bool = False
    ) -> None:
        """out = the product, of x or of x over its root mean square; of the gathered tokens only, whose residuals are
        copied, or of all."""
        b = self._buffers
        self._product("store", linear, x, eps, normed, out=out.data_ptr(), gathered=int(gathered),
                      from_=b.x_MH.data_ptr() if gathered else 0, copied=b.hidden_RH.data_ptr())  # fmt: skip

    def add(self, linear: _Linear, x: Tensor, next_norm: Tensor, tapped: int | None = None) -> None:
        """Adds the product to the residuals; `tapped`: the place of a copy among the tapped layers."""
        b = self._buffers
        width = b.tapped_MX.shape[1]
        at = 0 if tapped is None else b.tapped_MX.data_ptr() + tapped * linear.outputs * b.tapped_MX.element_size()
        self._product("add", linear, x, out=b.x_MH.data_ptr(), out_bf16=b.scaled_MH.data_ptr(),
                      out_squares=b.squares_MH.data_ptr(), next_norm=next_norm.data_ptr(), tapped=at,
                      tapped_width=width)  # fmt: skip

    def gate(self, linear: _Linear, x: Tensor, out: Tensor, eps: float) -> None:
        """out = silu(gate) * up of x over its root mean square."""
        self._product("gate", linear, x, eps, True, out_bf16=out.data_ptr())

    def _product(
        self, kind: str, linear: _Linear, x: Tensor, eps: float = 0.0, normed: bool = False, **rest: int
    ) -> None:
        b = self._buffers
        argument = _Product(
            step=b.step.data_ptr(), weight=linear.packed.data_ptr(), x=x.data_ptr(), bias=_address(linear.bias_N),
            squares=b.squares_MH.data_ptr() if normed else 0, num_squares=b.squares_MH.shape[1], pairs=linear.pairs,
            share=linear.share, outputs=linear.outputs, eps=eps, **rest,
        )  # fmt: skip
        shared = linear.warps * self._tiles * 32 * 16
        # A warp finishes a tile of tokens.
        threads = 32 * max(linear.warps, self._tiles)
        self(kind, (linear.tiles, 1, 1), threads, argument, shared)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(num_tokens: int) -> int:
    """Of the graph that has room for so many."""
    return next(width for width in _WIDTHS if num_tokens <= width)


def _key_blocks(most_seen: int) -> int:
    """Blocks of keys of the graph that has room for a text."""
    return 1 << (-(-most_seen // _KEYS) - 1).bit_length()


def _group_tokens(spec: DecoderSpec, width: int) -> int:
    """Tokens of a row that share a block of the attention kernel: few where that fills the GPU, else as many as read
    their keys together without running out of shared memory."""
    most = max(16 * spec.num_kv_heads // spec.num_heads, 1)
    return min(max(width // 16, 1), 4, most)


def _attention_bytes(spec: DecoderSpec, width: int) -> int:
    """Shared memory of an attention block."""
    queries, warps, dim = _group_tokens(spec, width) * spec.num_heads // spec.num_kv_heads, _KEYS // 32, spec.head_dim
    floats = queries * (dim + warps * (32 + dim + 2))
    return 4 * floats + 2 * width * (2 * dim + 8)


# --- compiled code ----------------------------------------------------------------------------------------------------

_PRODUCTS = ("store", "add", "gate")
_OTHERS = ("embed", "join", "attend", "largest", "best", "grow")


def macros(spec: DecoderSpec) -> dict[str, int]:
    """What the kernels that are no products are specialised to."""
    return {
        "HEAD_DIM": spec.head_dim,
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "QK_NORM": int(spec.qk_norm),
    }


@cache
def _kernels(device: torch.device, names: tuple[str, ...], **chosen: int) -> dict[str, Kernel]:
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    with torch.cuda.device(device):
        module = Module(_cubin(capability, chosen))
        return {name: module.kernel(name) for name in names}


def _cubin(capability: str, chosen: Mapping[str, int]) -> bytes:
    """Compiled for this GPU and model, once for all processes of a user."""
    source = SOURCE.read_text()
    key = hashlib.sha256(repr((source, capability, sorted(chosen.items()), version())).encode()).hexdigest()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_home / "ssv" / f"decoder-{key[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_source(source, capability, chosen)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, cubin)
    except OSError:  # a read-only home: compiled in every process
        pass
    return cubin
