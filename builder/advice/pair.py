"""A target and a draft that are not a bundle yet, as engines that decode."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ssv.builder.config import DraftConfig, checked
from ssv.builder.given import check_given, write_given
from ssv.builder.pair import measure_ranges
from ssv.builder.target import Target, load_target
from ssv.builder.tokenizer import check_same_tokens
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.model.checkpoint import CheckpointError, read_hf_config
from ssv.model.draft import Draft, load_draft
from ssv.runtime.counters import Counters
from ssv.runtime.decode.costs import place
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.engines.contract import Engine, EngineError
from ssv.runtime.engines.torch_engine import cpu_threads, draft_engine, target_engine
from ssv.runtime.request import SamplingParams
from ssv.support.errors import UserError
from ssv.support.precisions import TORCH_PRECISIONS

MAX_LENGTH = 2048
"""Tokens of prompt and output together, where the models have positions for as many."""


class NotItsTokens(UserError):
    """A draft whose tokens are not the target's."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and a draft, ready to decode.

    Attributes:
        batch: over both, for one row, with nothing corrected.
        place: where they run, as the key of a profile.
        threads: that they have at the most.
    """

    target: Target
    draft: Engine
    batch: DecodeBatch
    place: str
    threads: int

    def chat_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a user's message, up to where the assistant answers."""
        return tuple(self.target.conversation_encoder().chat_ids([{"role": "user", "content": prompt}]))

    def decode(self, prompt: tuple[int, ...], policy: Policy, max_tokens: int) -> Counters:
        """Decodes a prompt greedily by a policy, and tells what it took behind the first token."""
        batch, counters = self.batch, Counters()
        row = Row(SamplingParams(max_tokens=max_tokens), policy, lambda _: False, counters)
        batch.members.begin(prompt, row)
        while (token := batch.members.prefill()) is None:
            pass
        counters.emitted, start, written = 1, time.perf_counter(), [token]
        ends = batch.eos_ids.tolist()
        while row.rest >= 0 and not any(token in ends for token in written):
            written = [token for (gained,) in batch.run() for token in gained]
            counters.emitted += len(written)
        counters.total_s = time.perf_counter() - start
        batch.members.remove(0, 0)
        return counters


def load_pair(
    target_path: Path, draft_path: Path, precision: str, device: str, threads: int | None, prompts: list[str]
) -> Pair:
    """Loads a pair into PyTorch's engines.

    Args:
        draft_path: a draft of ours, a folder of an EAGLE-3 head, or a language model as a folder or a GGUF file.
        prompts: that activation ranges are measured on, which int8 and int4 smooth with.

    Raises:
        NotItsTokens: target and draft have different vocabularies.
        CheckpointError, RecipeError: one of them cannot be read, or the draft is for another target.
        EngineError: precision or device not to be had.
    """
    if precision not in TORCH_PRECISIONS:
        raise EngineError(
            f"precision {precision!r} is not one of the torch engine", f"use {', '.join(TORCH_PRECISIONS)}"
        )
    on_cpu = torch.device(device).type == "cpu"
    thread_count = cpu_threads(threads) if on_cpu else None
    target = load_target(target_path)
    draft = _load_draft(draft_path, target)
    ranges = measure_ranges(target, draft, prompts) if precision in ("int8", "int4") else {}

    def of(role: str) -> dict[str, Any] | None:
        return {n.removeprefix(role): r for n, r in ranges.items() if n.startswith(role)} or None

    max_length = min(target.spec.max_positions, draft.spec.decoder.max_positions, MAX_LENGTH + RESERVED_LENGTH)
    sizes: dict[str, Any] = {"precision": precision, "device": device, "max_batch": 1, "max_length": max_length}
    sizes["threads"] = thread_count
    engine = target_engine(target.decoder, draft=draft, ranges=of("target."), **sizes)
    drafting = draft_engine(draft, ranges=of("draft."), **sizes)
    batch = DecodeBatch(engine, drafting, target.eos_token_ids, max_length - RESERVED_LENGTH)
    most = thread_count.most if thread_count is not None else torch.get_num_threads()
    return Pair(target, drafting, batch, place("torch", precision, device, most), most if on_cpu else 1)


def _load_draft(path: Path, target: Target) -> Draft:
    config = _config_of(path)
    if config.checkpoint is not None:
        try:
            check_same_tokens(path, target.spec.vocab_size, target.tokenizer, target.spec.vocab_size)
        except CheckpointError as error:
            raise NotItsTokens(error.what, error.cure) from error
    check_given(config, target)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "draft.safetensors"
        write_given(config, target, file)
        return load_draft(file, target.decoder)


def _config_of(path: Path) -> DraftConfig:
    """What a recipe would say of a draft."""
    if not path.exists():
        raise UserError(f"{path} is not there", "give a draft that exists")
    if path.is_dir():
        config = read_hf_config(path)
        is_head = "draft_vocab_size" in config or "speculators_model_type" in config
        return checked(DraftConfig, **{"folder" if is_head else "checkpoint": path})
    return checked(DraftConfig, **{"checkpoint" if path.suffix == ".gguf" else "file": path})
