"""Rounds that the CUDA engines run without the host: a draft's levels, the choice of nodes, the target's pass, the
walk, and the next round's numbers are one graph, and the host reads what came of it while the next one runs.

`rounds.cu` has the kernels that stand between the two engines' own. Rows are the first ones of both caches.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssv.runtime.engines.contract import (
    GAIN_SIZES,
    MOST_ENDS,
    MOST_GUESSES,
    MOST_IN_FLIGHT,
    NOT_CORRECTED,
    Corrections,
    EngineError,
    RoundResult,
    RoundRow,
    RoundShape,
    TreeShape,
)
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.engine import CudaEngine, Shape
from ssv.runtime.engines.cuda.launching import (
    WIDTHS,
    Compact,
    Lay,
    Plant,
    Settle,
    address,
    group_tokens_for,
    kernels_of,
    key_blocks_for,
    width_for,
)

KERNELS = ("plant", "lay", "settle", "compact")

LEVELS, NODES = 16, 64
"""Most tokens of a path, and room of a row's tree."""

_RING = MOST_IN_FLIGHT + 1
_HEADER = 2

(
    _R_ROW, _R_LENGTH, _R_ROOT, _R_REST, _R_LIMIT, _R_DRAFT_LENGTH, _R_PENDING,
    _R_ACCEPT_BELOW, _R_VERIFY_ABOVE, _R_RISK_BUDGET,
) = range(10)  # fmt: skip
_R_ENDS = 12
R_SIZE = _R_ENDS + MOST_ENDS
T_SIZE = 8 + LEVELS + 4 * NODES + LEVELS * len(GAIN_SIZES)
_O_NODES, _O_KEPT, _O_JUDGED_ROWS, _O_JUDGED, _O_TOKENS = range(5)
_O_GAINS = _O_TOKENS + LEVELS + 1
O_SIZE = _O_GAINS + LEVELS * len(GAIN_SIZES)


@dataclass(frozen=True, slots=True)
class _Key:
    """What a graph of a round is captured for.

    Attributes:
        text_width: tokens of the draft's first step that it has room for.
        next_width: of the next round's; 0 without a draft.
        pass_width: of the target's pass.
        level_widths: of the draft's further steps.
        features: whether the pass gives them.
    """

    shape: RoundShape
    text_width: int
    level_widths: tuple[int, ...]
    pass_width: int
    next_width: int
    key_blocks: int
    features: bool


class CudaRounds:
    """See `RoundsEngine`."""

    most_tokens = places.TOKENS
    most_pending = 2 * NODES

    def __init__(self, target: CudaEngine, draft: CudaEngine) -> None:
        self._target, self._draft, device = target, draft, target.device
        self.in_flight = 0
        self._kernels = kernels_of(device, "rounds", KERNELS)
        ints = torch.int32
        # What rounds begin with: the header, and the rows.
        self._control = torch.zeros(_HEADER + places.TOKENS * R_SIZE, dtype=ints, device=device)
        self._header, rows = self._control[:_HEADER], self._control[_HEADER:]
        self._rows = rows.view(places.TOKENS, R_SIZE)
        self._trees = torch.zeros(places.TOKENS, T_SIZE, dtype=ints, device=device)
        self._results = torch.zeros(_RING, places.TOKENS, O_SIZE, dtype=ints, pin_memory=True)
        self._results_host = self._results.numpy()
        self._held = torch.zeros(places.TOKENS, self.most_pending, target.spec.hidden_size, device=device)
        self._done = [torch.cuda.Event() for _ in range(_RING)]
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}
        self._num_rows = self._num_run = self._most_length = self._text_width = 0
        self._drafts = False
        self._ahead: list[RoundShape] = []
        # What the rows that began have for a draft, until the first round says whether there is one.
        self._begun: tuple[Sequence[RoundRow], Tensor, tuple[Corrections, Corrections]] | None = None
        # By width and whether rows sample; between a round's steps, without a draft and with one.
        self._pass_s: dict[tuple[int, bool], float] = {}
        self._level_s: dict[tuple[int, bool], float] = {}
        self._between_s: list[float] = []
        self._seconds: dict[tuple[int, RoundShape], float] = {}
        self._draft_length_B = self._pending_B = np.zeros(0, dtype=np.int32)
        # Loaded before anything is captured: without rows they do nothing.
        for shape in (RoundShape(None, 0), RoundShape(TreeShape(1, 1, 1), 1)):
            self._enqueue_between(_Key(shape, 8, (), 8, 8, 1, True))
            self._enqueue_after(_Key(shape, 8, (), 8, 8, 1, True))
        torch.cuda.current_stream(device).synchronize()

    def seconds(self, num_rows: int, shape: RoundShape) -> float:
        """See `RoundsEngine.seconds`: the sum of its steps, each by the width of its graph."""
        if (known := self._seconds.get((num_rows, shape))) is None:
            known = self._seconds[num_rows, shape] = self._sum_of_steps(num_rows, shape)
        return known

    def _sum_of_steps(self, num_rows: int, shape: RoundShape) -> float:
        self.measure()
        tree, samples = shape.tree, shape.samples
        pass_s = self._pass_s[width_for(num_rows * (1 + shape.nodes)), samples]
        if tree is None:
            return pass_s + self._between_s[0]
        levels = [num_rows * tree.opened(level) for level in range(tree.levels)]
        return pass_s + self._between_s[1] + sum(self._level_s[width_for(each), samples] for each in levels)

    @torch.inference_mode()
    def measure(self) -> None:
        """See `RoundsEngine.measure`."""
        if self._pass_s:
            return
        drafts = self._draft.num_features > 0
        for width, samples in product(WIDTHS, (False, True)):
            at = width, samples
            self._pass_s[at] = self._seconds_of_step(self._target, Shape(width, 1, True, drafts, samples=samples))
            if drafts:
                level = Shape(width, 1, True, False, (1, 1), samples, grown=True)
                self._level_s[at] = self._seconds_of_step(self._draft, level)
        row = RoundRow(64, 0, 1 << 20, limit=1, draft_length=63, pending=[0])
        features_BTF = torch.zeros(1, 1, self._target.spec.hidden_size, device=self._target.device)
        shapes = [RoundShape(None, 0), *([RoundShape(TreeShape(1, 1, 1), 1)] if drafts else [])]
        for shape in shapes:
            self.begin([row], features_BTF if drafts else None, (NOT_CORRECTED, NOT_CORRECTED))
            seconds = self._seconds_of_round(shape)
            self.end()
            steps_s = self._pass_s[WIDTHS[0], False] + (self._level_s[WIDTHS[0], False] if shape.tree else 0)
            self._between_s.append(seconds - steps_s)

    def _seconds_of_step(self, engine: CudaEngine, shape: Shape) -> float:
        """Measures a step that fills its graph."""
        count = shape.width
        (block,) = places.blocks([count])
        numbers, _ = engine.write(block, np.zeros((1, count), dtype=np.int64), [64], 0, range(count), None, None)
        places.write_growing(numbers.host, [], [])
        graph = engine.graph(shape)
        if shape.samples:  # of the whole vocabulary, as text of one's own settings is not known
            engine.buffers.sample(settings_of([RoundRow(64, 0, 1, temperature=1.0)], [0]))
        numbers.send(engine.buffers.step, has_paths=False)
        return _seconds_of(graph.replay)

    def _seconds_of_round(self, shape: RoundShape) -> float:
        def run() -> None:
            if self.in_flight == MOST_IN_FLIGHT:
                self.take()
            self.run(shape)

        seconds = _seconds_of(run)
        while self.in_flight:
            self.take()
        return seconds

    @torch.inference_mode()
    def begin(
        self, rows: Sequence[RoundRow], features_BTF: Tensor | None, corrections: tuple[Corrections, Corrections]
    ) -> None:
        """See `RoundsEngine.begin`."""
        assert not self.in_flight, "rounds of the rows before are still to be taken"
        self._num_run %= _RING
        control = np.full(_HEADER + len(rows) * R_SIZE, -1, dtype=np.int32)
        control[:_HEADER] = len(rows), self._num_run
        state = control[_HEADER:].reshape(len(rows), R_SIZE)
        state[:, : _R_PENDING + 1] = [
            (b, row.length, row.root, row.rest, row.limit, row.draft_length, len(row.pending))
            for b, row in enumerate(rows)
        ]
        state.view(np.float32)[:, _R_ACCEPT_BELOW : _R_RISK_BUDGET + 1] = [
            (row.accept_below, row.verify_above, row.risk_budget) for row in rows
        ]
        state[:, _R_ENDS:] = [(*row.ends, *[-1] * (MOST_ENDS - len(row.ends))) for row in rows]
        self._control[: len(control)].copy_(torch.from_numpy(control))
        self._num_rows, self._most_length = len(rows), max(row.length for row in rows)
        self._draft_length_B, self._pending_B = state[:, _R_DRAFT_LENGTH].copy(), state[:, _R_PENDING].copy()
        self._drafts = features_BTF is not None
        if any(row.temperature > 0 for row in rows):
            self._target.buffers.sample(settings_of(rows, [0] * len(rows)))
            behind = [row.length + 1 - row.draft_length - len(row.pending) for row in rows]
            self._draft.buffers.sample(settings_of(rows, behind))
        self._text_width = 0
        self._begun = (rows, features_BTF, corrections) if features_BTF is not None else None

    def _hand_on(
        self,
        rows: Sequence[RoundRow],
        features_BTF: Tensor,
        corrections: tuple[Corrections, Corrections],
        *,
        is_drafted: bool,
    ) -> None:
        """Writes the draft's first step, if rounds have one, or holds the features of what waits for it."""
        counts = [len(row.pending) for row in rows]
        draft, width = self._draft, max(counts)
        if not is_drafted:
            self._held[: len(rows), :width].copy_(features_BTF[: len(rows), :width])
            return
        if sum(counts) > self.most_tokens:
            raise EngineError(f"{sum(counts)} tokens wait for the draft: there is room for {self.most_tokens}")
        ids_BT = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            ids_BT[b, : counts[b]] = row.pending
        (block,) = places.blocks(counts)
        last = [run.first + run.stop - run.start - 1 for run in block.runs]
        starts = [row.draft_length for row in rows]
        numbers, _ = draft.write(block, ids_BT, starts, 0, last, None, features_BTF)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        places.write_growing(numbers.host, range(len(rows)), ends)
        numbers.send(draft.buffers.step, has_paths=False)
        draft.buffers.correct(*corrections)
        self._text_width = width_for(sum(counts))

    @torch.inference_mode()
    def run(self, shape: RoundShape) -> None:
        """See `RoundsEngine.run`."""
        assert self.in_flight < MOST_IN_FLIGHT
        if self._begun is not None:
            self._hand_on(*self._begun, is_drafted=shape.tree is not None)
            self._begun = None
        key = self._key(shape)
        graph = self._graphs.get(key) or self._capture(key)
        graph.replay()
        self._done[self._num_run % _RING].record(torch.cuda.current_stream(self._target.device))
        self._num_run += 1
        self.in_flight += 1
        self._ahead.append(shape)
        self._text_width = key.next_width

    def take(self) -> list[RoundResult]:
        """See `RoundsEngine.take`."""
        slot = (self._num_run - self.in_flight) % _RING
        self._done[slot].synchronize()
        self.in_flight -= 1
        has_branches = not self._ahead.pop(0).is_chain
        told = self._results_host[slot, : self._num_rows]
        gained_B = told[:, _O_KEPT] + 1
        if self._text_width:  # the draft has run what was pending
            self._draft_length_B, self._pending_B = self._draft_length_B + self._pending_B, gained_B
        else:
            self._pending_B = np.minimum(self._pending_B + gained_B, self.most_pending + 1)
        self._most_length += int(gained_B.max())
        return results_of(told, has_branches)

    def end(self) -> tuple[list[int], Tensor | None]:
        """See `RoundsEngine.end`."""
        assert not self.in_flight, "rounds are still to be taken"
        self._num_rows = 0
        lengths = np.where(self._pending_B <= self.most_pending, self._draft_length_B, -1).tolist()
        if not self._drafts:
            return lengths, None
        counts = np.minimum(self._pending_B, self.most_pending).tolist()
        num, width = len(counts), max(counts)
        if self._begun is not None:  # no round was run
            return lengths, self._begun[1][:num, :width]
        if not self._text_width:
            return lengths, self._held[:num, :width]
        at_BT = np.array([*accumulate(counts[:-1], initial=0)])[:, None] + np.arange(width)
        at_M = torch.from_numpy(at_BT.clip(max=places.TOKENS - 1).ravel()).to(self._target.device)
        return lengths, self._draft.buffers.features_in_MF[at_M].view(num, width, -1)

    def reset(self) -> None:
        """See `RoundsEngine.reset`."""
        torch.cuda.current_stream(self._target.device).synchronize()
        self.in_flight = self._num_rows = self._text_width = 0
        self._ahead.clear()
        self._begun = None

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    @staticmethod
    def held_bytes(hidden_size: int) -> int:
        """What features that wait for a draft take, by far the most of what rounds have for themselves."""
        return places.TOKENS * CudaRounds.most_pending * hidden_size * torch.float32.itemsize

    def _key(self, shape: RoundShape) -> _Key:
        """The graph that has room for a round.

        Raises:
            EngineError: there can be none.
        """
        num, tree = self._num_rows, shape.tree
        num_tokens, next_tokens = num * (1 + shape.nodes), num * (1 + shape.depth)
        if shape.nodes >= NODES or max(num_tokens, next_tokens) > self.most_tokens:
            raise EngineError(f"a pass over {num} trees of {shape.nodes} nodes: there is room for {self.most_tokens}")
        level_widths: tuple[int, ...] = ()
        if tree is not None:
            if not self._text_width:
                raise EngineError("a round with a draft behind rounds without: end them first")
            if (
                num * tree.opened(tree.levels) > self.most_tokens
                or tree.firsts[-1] > MOST_GUESSES
                or tree.levels > LEVELS
            ):
                raise EngineError(f"{num} trees of {tree}: there is no room for their levels")
            level_widths = tuple(width_for(num * tree.opened(level)) for level in range(1, tree.levels))
        most_seen = self._most_length + sum(1 + each.depth for each in (*self._ahead, shape))
        return _Key(
            shape,
            self._text_width if tree is not None else 0,
            level_widths,
            width_for(num_tokens),
            width_for(next_tokens) if tree is not None else 0,
            key_blocks_for(most_seen),
            self._drafts,
        )

    # --- graphs -----------------------------------------------------------------------------------------------------

    def _capture(self, key: _Key) -> torch.cuda.CUDAGraph:
        """Captures a round, while others may be in flight: what their kernels have left for the next one is put
        back."""
        draft, device = self._draft, self._target.device
        left = draft.buffers.step.clone()
        for shape in self._draft_shapes(key):
            draft.warm(shape)
        self._target.warm(self._pass_shape(key))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for shape in self._draft_shapes(key):
                draft.enqueue(shape)
            self._enqueue_between(key)
            self._target.enqueue(self._pass_shape(key))
            self._enqueue_after(key)
        torch.cuda.current_stream(device).wait_stream(self._stream)
        draft.buffers.step.copy_(left)
        self._graphs[key] = graph
        return graph

    def _draft_shapes(self, key: _Key) -> list[Shape]:
        """The draft's steps of a round."""
        if (tree := key.shape.tree) is None:
            return []
        widths = (key.text_width, *key.level_widths)
        grows = (tree.beam, tree.children)
        return [
            Shape(width, key.key_blocks, True, False, grows, key.shape.samples, grown=level > 0)
            for level, width in enumerate(widths)
        ]

    def _pass_shape(self, key: _Key) -> Shape:
        return Shape(key.pass_width, key.key_blocks, True, key.features, samples=key.shape.samples)

    def _enqueue_between(self, key: _Key) -> None:
        """Puts what makes a pass of the draft's candidates on the current stream."""
        tree, shape, target = key.shape.tree, key.shape, self._target
        header, rows, trees = (x.data_ptr() for x in (self._header, self._rows, self._trees))
        if tree is not None:
            argument = Plant(
                header, rows, self._draft.buffers.found.data_ptr(), trees,
                tree.levels, tree.beam, tree.children, shape.nodes,
            )  # fmt: skip
            self._launch("plant", (places.TOKENS, 1, 1), 256, argument, overlaps=True)
        groups = group_tokens_for(target.spec, key.pass_width)
        argument = Lay(
            header, rows, trees, target.buffers.step.data_ptr(), int(not shape.is_chain), groups, int(tree is None)
        )
        self._launch("lay", (1, 1, 1), 1024, argument, overlaps=tree is not None)

    def _enqueue_after(self, key: _Key) -> None:
        """Puts the walk and what it leaves for the next round on the current stream."""
        target, draft, drafts = self._target, self._draft, key.shape.tree is not None
        header, rows, trees = (x.data_ptr() for x in (self._header, self._rows, self._trees))
        argument = Settle(
            header, rows, trees, target.buffers.token_R.data_ptr(), draft.buffers.step.data_ptr() if drafts else 0,
            self._results.data_ptr(), int(key.shape.is_chain),
            group_tokens_for(draft.spec, key.next_width) if drafts else 1, self.most_pending, _RING,
        )  # fmt: skip
        self._launch("settle", (1, 1, 1), 1024, argument, overlaps=True)
        num_layers = 0 if key.shape.is_chain else target.spec.num_layers
        if not num_layers and not key.features:
            return
        cache = target.cache
        argument = Compact(
            header, rows, trees, cache.keys.data_ptr(), cache.values.data_ptr(),
            address(target.buffers.features_MF if key.features else None),
            (draft.buffers.features_in_MF if drafts else self._held).data_ptr(),
            num_layers, cache.keys.shape[1], target.spec.num_kv_heads, target.max_length, target.spec.head_dim,
            target.spec.hidden_size,
        )  # fmt: skip
        self._launch("compact", (num_layers + 1, places.TOKENS, 1), 128, argument, overlaps=True)

    def _launch(
        self, name: str, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure, *, overlaps: bool
    ) -> None:
        stream = torch.cuda.current_stream(self._target.device).cuda_stream
        self._kernels[name].launch(argument, grid, threads, stream, overlaps=overlaps and self._target.overlaps)


def _seconds_of(run: Callable[[], None], repeats: int = 20) -> float:
    """Measures runs on the device, one behind the other: the median of some such series, a run."""
    found = []
    for _ in range(3):
        run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(repeats):
            run()
        events[1].record()
        events[1].synchronize()
        found.append(events[0].elapsed_time(events[1]) / repeats / 1e3)
    return statistics.median(found)


def settings_of(rows: Sequence[RoundRow], behind: Sequence[int]) -> NDArray[np.int32]:
    """How rows choose, as step.cuh has it.

    Args:
        behind: how far behind its text an engine's cache is, in each row.
    """
    return places.settings(
        [row.temperature for row in rows],
        [row.top_k for row in rows],
        [row.top_p for row in rows],
        np.array([row.seed % 2**64 for row in rows], dtype=np.uint64),
        behind,
    )


def results_of(told: NDArray[np.int32], has_branches: bool) -> list[RoundResult]:
    """What `settle` wrote of a round's rows, [B, O_SIZE]."""
    gains: Sequence[NDArray[np.float32] | None] = [None] * len(told)
    if has_branches:
        gains = list(told[:, _O_GAINS:].copy().view(np.float32).reshape(len(told), LEVELS, len(GAIN_SIZES)))
    return [
        RoundResult(
            row[_O_TOKENS : _O_TOKENS + row[_O_KEPT] + 1], row[_O_NODES], row[_O_JUDGED_ROWS], row[_O_JUDGED], worth
        )
        for row, worth in zip(told[:, : _O_TOKENS + 1 + int(told[:, _O_KEPT].max())].tolist(), gains, strict=True)
    ]
