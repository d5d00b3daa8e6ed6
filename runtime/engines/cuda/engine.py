"""The engine contract on CUDA graphs of the kernels of `ssv.plugins.cuda`: for few tokens a step, bf16 with weights
in bf16, FP8 or INT4.

A step is cut into blocks of at most 64 tokens, or of at most 512 if it is a prompt's; a block is one replay of the
graph that has room for its tokens and its longest text. What a token gives depends on itself alone (see decoder.cu and
wide.cu), so that a step may be cut anywhere.

Shapes: see `contract.py`.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, FeatureTap
from ssv.model.scorer import Scorer
from ssv.model.spec import DecoderSpec
from ssv.plugins.cuda.driver import Kernel
from ssv.runtime.engines.contract import (
    MOST_CHILDREN,
    MOST_GUESSES,
    Branches,
    Corrections,
    EngineError,
    Grown,
    StepOutput,
    TreeShape,
    check_step,
)
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.launching import (
    JOINED_HEADS,
    MANY,
    MOST_GATHERED,
    OTHERS,
    OVERLAPPING,
    SAMPLING,
    TURN_WARPS,
    Attention,
    Draw,
    Embed,
    Grow,
    Join,
    Judge,
    Largest,
    Launcher,
    Perturb,
    Sift,
    address,
    attention_bytes,
    group_tokens_for,
    kernels_of,
    key_blocks_for,
    macros,
    many_macros,
    width_for,
)
from ssv.runtime.engines.cuda.packing import PAIR, inputs_of
from ssv.runtime.engines.cuda.weights import SLICES, Buffers, Weights
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import vocabulary_ids

_NUM_IN_FLIGHT = 8
"""Steps whose numbers may still be on their way to the device when another's are written."""


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
        weight_bytes: that a step with logits and without features reads.
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
        """Packs a model's weights, and makes its cache and buffers.

        Args:
            decoder, tap, draft: bf16 or with quantized layers, on the GPU; their large weights are packed here, and may
                be dropped after. Inputs of FP8 layers stay bf16 (they are not rounded to E4M3 as `Fp8Linear` has it).

        Raises:
            EngineError: a model that the kernels cannot run (`misfit`), or longer than it has positions for.
        """
        spec = decoder.spec
        if max_length > spec.max_positions:
            raise EngineError(f"max length {max_length} exceeds the model's {spec.max_positions} positions")
        if reason := misfit(spec, inputs_of(tap.project) if tap is not None else 0):
            raise EngineError(f"the CUDA kernels cannot run this model: {reason}")
        self.max_batch, self.max_length, self.spec = max_batch, max_length, spec
        self.device = decoder.embed.weight.device
        self._scorer = scorer.to(self.device) if scorer is not None else None
        self.has_scorer = scorer is not None
        conditioned = draft is not None and draft.conditioned
        self.num_features = spec.hidden_size if conditioned else 0
        self.token_ids_V = None if draft is None else vocabulary_ids(draft.token_ids, spec.vocab_size)
        self.vocab_size = spec.vocab_size if draft is None else draft.spec.head_size
        self.cache = KVCache(spec, max_batch, max_length, torch.bfloat16, self.device)
        self._tapped = tap.layers if tap is not None else ()
        self._weights = Weights(decoder, tap, draft)
        self.weight_bytes = self._weights.nbytes
        self._kernels, self._many_kernels = self._load_kernels()
        self._kernels |= kernels_of(self.device, "sample", SAMPLING)
        self.overlaps = torch.cuda.get_device_capability(self.device) >= OVERLAPPING
        self._prepare()

    def _load_kernels(self) -> tuple[dict[str, Kernel], dict[str, Kernel]]:
        """Those of few tokens and those of many, without products."""
        chosen = macros(self.spec)
        few = kernels_of(self.device, "decoder", OTHERS, **chosen)
        many = kernels_of(self.device, "decoder", OTHERS, **chosen, TOKENS=places.MANY_TOKENS)
        return few, many | kernels_of(self.device, "wide", MANY, **many_macros(self.spec))

    def _prepare(self) -> None:
        """Makes what steps work in."""
        self._make_buffers()
        self._stream = torch.cuda.Stream(self.device)
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._warmed: set[Shape] = set()
        self._numbers, self._many_numbers = (
            cycle([Numbers(self.device, most_tokens) for _ in range(_NUM_IN_FLIGHT)])
            for most_tokens in (places.TOKENS, places.MANY_TOKENS)
        )

    def _make_buffers(self) -> None:
        sizes = self.spec, self.device, self.max_length, self.vocab_size, len(self._tapped)
        self.buffers, self._many_buffers = Buffers(*sizes), Buffers(*sizes, places.MANY_TOKENS)

    def beside(self, num_rows: int) -> CudaEngine:
        """An engine of the same weights over a cache of so many rows: its steps can run beside this one's."""
        other = copy.copy(self)
        other.max_batch = num_rows
        other.cache = KVCache(self.spec, num_rows, self.max_length, torch.bfloat16, self.device)
        other._prepare()
        return other

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
        blocks = list(places.blocks(counts, self._block_tokens(counts, len(gathered), branches is not None)))
        parts: list[tuple[_Block, list[int]]] = []
        for block in blocks:
            at = {
                run.b * tokens + t: run.first + t - run.start for run in block.runs for t in range(run.start, run.stop)
            }
            wanted = [r for r, row in enumerate(gathered) if row in at]
            rows = [at[gathered[r]] for r in wanted]
            numbers, most_seen = self.write(block, ids_BT, first_slots, first_row, rows, branches, features_in_BTF)
            found = self._replay(numbers, block.num_tokens, len(wanted), most_seen, branches is not None, features_out)
            parts.append((found.kept() if len(blocks) > 1 else found, wanted))
        return self._joined(parts, blocks, len(gathered), batch, tokens, features_out)

    def _block_tokens(self, counts: Sequence[int], num_gathered: int, has_branches: bool) -> int:
        """Most tokens of a block of a step: one of prompts is cut into blocks of many, which have room for few rows and
        few logits, and score none."""
        num_rows, scores = sum(count > 0 for count in counts), num_gathered > 0 and self._scorer is not None
        is_few = has_branches or scores or sum(counts) <= places.TOKENS or max(num_gathered, num_rows) > MOST_GATHERED
        return places.TOKENS if is_few else places.MANY_TOKENS

    def blocks(self, num_tokens: int) -> list[int]:
        """See `BlockEngine.blocks`."""
        full, rest = divmod(num_tokens, places.TOKENS)
        return [places.TOKENS] * full + ([width_for(rest)] if rest else [])

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

    def write(
        self,
        block: places.Block,
        ids_BT: NDArray[np.int64],
        first_slots: Sequence[int],
        first_row: int,
        gathered: Sequence[int],
        branches: Branches | None,
        features_BTF: Tensor | None,
    ) -> tuple[Numbers, int]:
        """Writes a block's numbers, which are still to be sent, and hands on its features; see `places.write`."""
        width = width_for(block.num_tokens)
        most_tokens = _most_tokens(width)
        numbers = next(self._numbers if most_tokens == places.TOKENS else self._many_numbers)
        numbers.wait()
        most_seen = places.write(
            numbers.host, block, ids_BT, first_slots, first_row, gathered, branches,
            group_tokens_for(self.spec, width), most_tokens,
        )  # fmt: skip
        if features_BTF is not None:
            features_in_MF = self._buffers_of(width).features_in_MF[: block.num_tokens]
            length = features_BTF.shape[1]
            if len(block.runs) == 1:
                (run,) = block.runs
                features_in_MF.copy_(features_BTF[run.b, run.start : run.stop])
            else:
                at_M = np.concatenate([run.b * length + np.arange(run.start, run.stop) for run in block.runs])
                features_in_MF.copy_(features_BTF.flatten(0, 1)[torch.from_numpy(at_M).to(features_BTF.device)])
        return numbers, most_seen

    def _replay(
        self,
        numbers: Numbers,
        num_tokens: int,
        num_gathered: int,
        most_seen: int,
        has_paths: bool,
        features: bool,
    ) -> _Block:
        shape = Shape(width_for(num_tokens), key_blocks_for(most_seen), num_gathered > 0, features)
        graph, b = self.graph(shape), self._buffers_of(shape.width)
        numbers.send(b.step, has_paths)
        graph.replay()
        self.last_graph = graph
        return _Block(
            b.hidden_RH[:num_gathered],
            b.logits_RV[:num_gathered],
            b.token_R[:num_gathered],
            b.risk_R[:num_gathered] if self._scorer is not None else None,
            b.features_MF[:num_tokens] if features else None,
        )

    def _buffers_of(self, width: int) -> Buffers:
        """What a graph with room for so many tokens works in."""
        return self.buffers if _most_tokens(width) == places.TOKENS else self._many_buffers

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

    def graph(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """The graph of a shape."""
        if (graph := self._graphs.get(shape)) is not None:
            return graph
        self.warm(shape)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self.enqueue(shape)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._graphs[shape] = graph  # not before: where memory ran out meanwhile, it is none
        return graph

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def warm(self, shape: Shape) -> None:
        """Runs a shape without tokens, once, so that everything is loaded before it is captured. Overwrites the numbers
        of the step."""
        if shape in self._warmed:
            return
        self._buffers_of(shape.width).step.zero_()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self.enqueue(shape)
        self._stream.synchronize()
        self._warmed.add(shape)

    def enqueue(self, shape: Shape) -> None:
        """Puts the kernels of a block on the current stream."""
        b, w, spec = self._buffers_of(shape.width), self._weights, self.spec
        stream = torch.cuda.current_stream(self.device).cuda_stream
        of_many = b is not self.buffers
        kernels, most_gathered = (self._many_kernels, MOST_GATHERED) if of_many else (self._kernels, shape.width)
        # Blocks of many tokens leave little room beside them: kernels that begin early are in one another's way.
        launch = Launcher(kernels, stream, shape.width // 8, b, self.overlaps and not of_many)
        step, eps = b.step.data_ptr(), spec.rms_norm_eps
        if w.join is None:
            launch("embed", (shape.width, 1, 1), 64, Embed(
                step, w.embed.data_ptr(), w.layers[0].attn_norm.data_ptr(), b.x_MH.data_ptr(), b.scaled_MH.data_ptr(),
                b.squares_MH.data_ptr(), spec.hidden_size,
            ))  # fmt: skip
        else:
            if not shape.grown:
                launch("join", (shape.width, 1, 1), 32, Join(
                    step, w.embed.data_ptr(), b.features_in_MF.data_ptr(), w.embed_norm.data_ptr(),
                    w.feature_norm.data_ptr(), b.x_MH.data_ptr(), b.joined_MH.data_ptr(), spec.hidden_size, eps,
                ))  # fmt: skip
            launch.add(w.join, b.joined_MH, w.layers[0].attn_norm)
        for index, layer in enumerate(w.layers):
            launch.store(layer.qkv, b.scaled_MH, b.qkv_MX, eps=eps, normed=True)
            attention = Attention(
                step, b.qkv_MX.data_ptr(), self.cache.keys[index].data_ptr(), self.cache.values[index].data_ptr(),
                w.cos_SP.data_ptr(), w.sin_SP.data_ptr(), address(layer.q_norm), address(layer.k_norm),
                address(layer.o.input_factor_K), b.attended_MX.data_ptr(), b.partial.data_ptr(), b.arrivals.data_ptr(),
                b.queries_MX.data_ptr(), spec.num_heads, spec.num_kv_heads, self.max_length, b.most_blocks,
                group_tokens_for(spec, shape.width), eps,
            )  # fmt: skip
            if of_many:
                self._enqueue_attention_of_many(launch, shape, attention)
            else:
                grid = shape.key_blocks, spec.num_kv_heads, shape.width
                launch("attend", grid, 256, attention, attention_bytes(spec, shape.width))
            launch.add(layer.o, b.attended_MX, layer.mlp_norm)
            launch.gate(layer.gate_up, b.scaled_MH, b.gated_MI, eps, layer.down.input_factor_K)
            following = w.layers[index + 1].attn_norm if index + 1 < len(w.layers) else w.norm
            tapped = self._tapped.index(index) if shape.features and index in self._tapped else None
            launch.add(layer.down, b.gated_MI, following, tapped)
        if shape.features:
            assert w.tap is not None
            launch.store(w.tap, b.tapped_MX, b.features_MF)
        if shape.has_head:
            launch.store(w.head, b.scaled_MH, b.logits_RV, eps=eps, normed=True, gathered=True)
            ids = address(self.token_ids_V)
            if shape.grows is None and shape.samples:
                launch("draw", (shape.width, 1, 1), 1024, Draw(
                    step, b.logits_RV.data_ptr(), ids, b.settings.data_ptr(), b.token_R.data_ptr(), self.vocab_size, 0
                ))  # fmt: skip
            elif shape.grows is None:
                launch("largest", (most_gathered, 1, 1), 1024, Largest(
                    step, b.logits_RV.data_ptr(), ids, b.token_R.data_ptr(), self.vocab_size
                ))  # fmt: skip
            if shape.grows is not None:
                self._enqueue_growth(launch, shape, *shape.grows, ids)
            elif self._scorer is not None:
                self._enqueue_sifting(launch, shape, 2)
                launch("judge", (shape.width, 1, 1), 32, Judge(
                    *self._sifted(), b.hidden_RH.data_ptr(), *self._scorer_at(), b.risk_R.data_ptr(),
                    self.vocab_size, spec.hidden_size, self._uses_hidden,
                ))  # fmt: skip

    def _enqueue_attention_of_many(self, launch: Launcher, shape: Shape, argument: ctypes.Structure) -> None:
        """What puts keys and values into the cache, and attends to them."""
        spec, groups = self.spec, -(-shape.width // group_tokens_for(self.spec, shape.width))
        heads = -(-(spec.num_heads + 2 * spec.num_kv_heads) // TURN_WARPS)
        launch("turn", (shape.width, heads, 1), 32 * TURN_WARPS, argument)
        # A group has tokens of one row, and the last one of each row may be smaller.
        grid = shape.key_blocks, spec.num_kv_heads, groups + MOST_GATHERED
        launch("attend_many", grid, 128, argument, attention_bytes(spec, shape.width))
        if shape.key_blocks > 1:
            grid = shape.width, -(-spec.num_heads // JOINED_HEADS), 1
            launch("join_shares", grid, spec.head_dim * JOINED_HEADS, argument)

    def _enqueue_growth(self, launch: Launcher, shape: Shape, beam: int, children: int, ids: int) -> None:
        """What makes candidates of a level's logits, and the step of the next level."""
        b, w, step = self.buffers, self._weights, self.buffers.step.data_ptr()
        joined = (0,) * 5
        if w.join is not None:
            joined = (w.embed.data_ptr(), w.embed_norm.data_ptr(), w.feature_norm.data_ptr(), b.x_MH.data_ptr(),
                      b.joined_MH.data_ptr())  # fmt: skip
        settings, extra = (b.settings.data_ptr(), b.extra.data_ptr()) if shape.samples else (0, 0)
        if shape.samples:
            launch("perturb", (shape.width, 1, 1), 1024, Perturb(
                step, b.logits_RV.data_ptr(), ids, settings, extra, self.vocab_size
            ))  # fmt: skip
        self._enqueue_sifting(launch, shape, max(children, 2))
        launch("grow", (places.TOKENS, 1, 1), 256, Grow(
            *self._sifted(), ids, extra, *self._scorer_at(),
            b.hidden_RH.data_ptr(), *joined, b.corrections.data_ptr(), settings, b.found.data_ptr(),
            b.survival.data_ptr(), b.candidate.data_ptr(), b.path.data_ptr(), self.vocab_size, self.spec.hidden_size,
            self._uses_hidden, beam, children, MOST_GUESSES, self.spec.rms_norm_eps,
        ))  # fmt: skip

    def _enqueue_sifting(self, launch: Launcher, shape: Shape, count: int) -> None:
        """What finds the largest logits of each row."""
        b = self.buffers
        step, *sifted = self._sifted()
        launch("sift", (SLICES, shape.width, 1), 128, Sift(
            step, b.logits_RV.data_ptr(), *sifted, self.vocab_size, count
        ))  # fmt: skip

    def _sifted(self) -> tuple[int, int, int, int]:
        b = self.buffers
        return b.step.data_ptr(), b.sifted_value.data_ptr(), b.sifted_column.data_ptr(), b.sifted_sums.data_ptr()

    def _scorer_at(self) -> tuple[int, int]:
        """Where the scorer's weights and its bias lie; nowhere without one."""
        return (0, 0) if (scorer := self._scorer) is None else (scorer.weight_F.data_ptr(), scorer.bias.data_ptr())

    @property
    def _uses_hidden(self) -> int:
        return int(self._scorer is not None and self._scorer.uses_hidden)

    @torch.inference_mode()
    def grow(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        count_B: Tensor,
        features_in_BTF: Tensor | None,
        shape: TreeShape,
        corrections: Corrections,
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
            key_blocks = key_blocks_for(max(ends) + level)
            grows = (shape.beam, shape.children)
            at = Shape(width_for(tokens_of_level), key_blocks, True, False, grows, grown=level > 0)
            graphs.append(self.graph(at))
        self.buffers.correct(corrections)
        last = [run.first + run.stop - run.start - 1 for run in block.runs]
        numbers, _ = self.write(block, input_ids_BT.numpy(), first_slots, 0, last, None, features_in_BTF)
        places.write_growing(numbers.host, growing, ends)
        numbers.send(self.buffers.step, has_paths=False)
        for graph in graphs:
            graph.replay()
        num = shape.firsts[-1]
        found = iter(self.buffers.read_found(len(growing)))
        return [_grown(next(found), num) if count else None for count in counts]

    def _check_growth(self, shape: TreeShape, num_tokens: int, num_growing: int, num_slots: int) -> None:
        if num_tokens > places.TOKENS or num_growing * shape.opened(shape.levels) > self.most_growing:
            raise EngineError(
                f"{num_growing} trees of {shape} behind {num_tokens} tokens: there is room for {places.TOKENS} tokens "
                f"of texts and {self.most_growing} nodes of a level"
            )
        sizes = {"beam": shape.beam, "children": shape.children, "levels": shape.levels}
        if wrong := [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= MOST_CHILDREN]:
            raise EngineError(f"trees of {', '.join(wrong)}: 1 to {MOST_CHILDREN} are possible")
        if (num := shape.firsts[-1]) > MOST_GUESSES:
            raise EngineError(f"trees of {num} guesses: there is room for {MOST_GUESSES}")
        if num_slots > self.max_length:
            raise EngineError(f"trees reach slot {num_slots - 1}, the cache holds {self.max_length}")


# --- shapes and what a block gives ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for.

    Attributes:
        width: tokens that it has room for.
        key_blocks: blocks of keys that its longest text may have.
        grows: beam and children of trees that it makes a level of; None of a step.
        samples: whether rows may sample, as the buffers' settings say.
        grown: whether it is a level behind another, which has left what the draft's join multiplies.
    """

    width: int
    key_blocks: int
    has_head: bool
    features: bool
    grows: tuple[int, int] | None = None
    samples: bool = False
    grown: bool = False


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


class Numbers:
    """A vector of `places` on its way to the device."""

    def __init__(self, device: torch.device, most_tokens: int = places.TOKENS) -> None:
        self._pinned = torch.zeros(places.size(most_tokens), dtype=torch.int32, pin_memory=True)
        self._size_of_chains = places.size_of_chains(most_tokens)
        self.host = self._pinned.numpy()
        self._sent = torch.cuda.Event()
        self._device = device

    def wait(self) -> None:
        """Until it may be written again."""
        self._sent.synchronize()

    def send(self, dest: Tensor, has_paths: bool) -> None:
        size = self._size_of_chains if not has_paths else len(self._pinned)
        dest[:size].copy_(self._pinned[:size], non_blocking=True)
        self._sent.record(torch.cuda.current_stream(self._device))


def _most_tokens(width: int) -> int:
    """Tokens that the numbers and buffers of a graph have room for."""
    return places.TOKENS if width <= places.TOKENS else places.MANY_TOKENS


def _grown(found: NDArray[np.int32], num: int) -> Grown:
    tokens, parents, shares, risks = found[:num].T.copy()
    return Grown(tokens, parents, shares.view(np.float32), risks.view(np.float32))
