"""A bundle that answers: requests in, text out.

May import: ssv.builder.checkpoint, .decoder, .draft, .manifest, .scorer, .tiers; ssv.runtime.decoding, .engine, .request,
.scheduler, .stats, .strategies, .tensorrt_engine, .text, .torch_engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ssv.builder.checkpoint import load_checkpoint, read_safetensors
from ssv.builder.decoder import Decoder
from ssv.builder.draft import load_draft, load_draft_head
from ssv.builder.manifest import Manifest, read_manifest
from ssv.builder.scorer import load_scorer
from ssv.builder.tiers import Policy
from ssv.runtime.decoding import MAX_PENDING, DecodeBatch, Row
from ssv.runtime.engine import Engine, EngineError
from ssv.runtime.request import Chunk, FinishReason, Output, Request, RequestError
from ssv.runtime.scheduler import Scheduler
from ssv.runtime.stats import Counters
from ssv.runtime.strategies import policy_for
from ssv.runtime.tensorrt_engine import choose_entry, load_engine
from ssv.runtime.text import TextStream
from ssv.runtime.torch_engine import Precision, draft_engine, target_engine


class LLM:
    """A target and its draft, ready to decode.

    Attributes:
        tokenizer: the bundle's `transformers` tokenizer.
        max_length: tokens of prompt and output together.
    """

    def __init__(
        self,
        target: Engine,
        draft: Engine | None,
        tokenizer: Any,
        *,
        eos_token_ids: Sequence[int],
        tiers: Mapping[str, Policy],
        max_length: int,
    ) -> None:
        self.target, self.draft, self.tokenizer = target, draft, tokenizer
        self.eos_token_ids, self.tiers, self.max_length = frozenset(eos_token_ids), dict(tiers), max_length
        self._streaming = False

    @classmethod
    def load(
        cls,
        bundle: Path | str,
        *,
        engine: Literal["torch", "tensorrt"] = "torch",
        precision: str | None = None,
        device: str = "cpu",
        max_batch: int = 1,
        max_length: int = 2048,
        verify: bool = True,
    ) -> LLM:
        """Loads a bundle.

        Args:
            engine: `tensorrt` for the bundle's compiled engines, on this machine's GPU; max_batch must not exceed theirs, max_length is cut
                to it.
            precision: None for the bundle's default on a CPU and bf16 on CUDA; with `tensorrt`, for whatever is compiled.
            max_length: tokens of prompt and output together; cut to what the model has positions for.
            verify: check the hash of every file first.

        Raises:
            BundleError, CheckpointError: the bundle is damaged.
            EngineError: precision or device not to be had.
        """
        import torch
        from transformers import AutoTokenizer

        bundle = Path(bundle)
        manifest = read_manifest(bundle, verify=verify)
        if engine == "tensorrt":
            return cls._load_tensorrt(bundle, manifest, precision, max_batch, max_length)
        if precision is not None and precision not in get_args(Precision):
            raise EngineError(f"precision {precision!r} is unknown; known: {', '.join(get_args(Precision))}")
        precision = precision or (manifest.default_precision if torch.device(device).type == "cpu" else "bf16")
        spec, weights = load_checkpoint(bundle / "target")
        decoder = Decoder.from_weights(spec, weights)
        draft = load_draft(bundle / "draft" / "draft.safetensors", decoder)
        max_length = min(max_length, spec.max_positions - 2 * MAX_PENDING)
        sizes: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "max_batch": max_batch,
            "max_length": max_length + 2 * MAX_PENDING,
        }
        ranges = read_safetensors(bundle / "activation_ranges.safetensors")
        draft_ranges = {name.removeprefix("draft."): r for name, r in ranges.items() if name.startswith("draft.")}
        target_ranges = {name.removeprefix("target."): r for name, r in ranges.items() if name.startswith("target.")}
        scorer = load_scorer(bundle / "scorer.safetensors", draft.spec.decoder.hidden_size)
        return cls(
            target_engine(decoder, draft=draft, ranges=target_ranges, **sizes),
            draft_engine(draft, scorer=scorer, ranges=draft_ranges, **sizes),
            AutoTokenizer.from_pretrained(bundle / "tokenizer"),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            max_length=max_length,
        )

    @classmethod
    def _load_tensorrt(
        cls, bundle: Path, manifest: Manifest, precision: str | None, max_batch: int, max_length: int
    ) -> LLM:
        from transformers import AutoTokenizer

        entries = [choose_entry(bundle, manifest, role, precision) for role in ("target", "draft")]
        draft = load_draft_head(bundle / "draft" / "draft.safetensors")  # its weights are in its engine
        engines = [
            load_engine(bundle, manifest, entries[0], max_batch=max_batch),
            load_engine(bundle, manifest, entries[1], draft, max_batch=max_batch),
        ]
        return cls(
            engines[0],
            engines[1],
            AutoTokenizer.from_pretrained(bundle / "tokenizer"),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            max_length=min(max_length, *(entry.max_length - 2 * MAX_PENDING for entry in entries)),
        )

    def chat_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a user's message in the model's chat template, up to where the assistant answers."""
        if not prompt.strip():
            raise RequestError("the prompt is empty")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def stream(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Decodes requests side by side, as many at a time as the cache has rows; yields their output as it comes.

        Raises:
            RequestError: one of them cannot be served, or another stream is not finished; raised before any is started.
        """
        if self._streaming:
            raise RequestError(
                "another stream of this LLM is not finished and holds its cache: exhaust or close it first, or give all "
                "requests to one call"
            )
        self._streaming = True
        try:
            yield from self._run(requests)
        finally:
            self._streaming = False

    def _run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        batch = DecodeBatch(self.target, self.draft, sorted(self.eos_token_ids), self.max_length)
        scheduler: Scheduler[_Running] = Scheduler(self.target.max_batch)
        for index, request in enumerate(requests):
            policy = policy_for(request.method, self.tiers, request.num_draft_tokens)
            batch.check(request.prompt_ids, request.params, policy)
            scheduler.submit(_Running(index, request, policy, self._decode))
        while scheduler.has_work:
            for _, running in scheduler.admit():
                running.started = time.monotonic()
                first = batch.add(running.request.prompt_ids, running.row)
                yield from self._push(running, [first])
            _drop_finished(batch, scheduler)
            if not scheduler.rows:
                continue
            batch.draft()
            for running, tokens in zip(scheduler.rows, batch.release(), strict=True):
                yield from self._push(running, tokens)
            for running, tokens in zip(scheduler.rows, batch.verify(), strict=True):
                yield from self._push(running, tokens)
            _drop_finished(batch, scheduler)

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Decodes requests and returns their outputs, in their order."""
        texts: list[list[str]] = [[] for _ in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        outputs: list[Output | None] = [None] * len(requests)
        for chunk in self.stream(requests):
            texts[chunk.index].append(chunk.text)
            tokens[chunk.index].extend(chunk.token_ids)
            if chunk.finish_reason is not None and chunk.counters is not None:
                outputs[chunk.index] = Output(
                    "".join(texts[chunk.index]), tuple(tokens[chunk.index]), chunk.finish_reason, chunk.counters
                )
        assert all(output is not None for output in outputs)
        return [output for output in outputs if output is not None]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _push(self, running: _Running, tokens: Sequence[int]) -> Iterator[Chunk]:
        """Hands tokens to a request until it ends; what comes after its end is dropped."""
        if running.finish_reason is not None:
            return
        params, counters = running.request.params, running.row.counters
        texts: list[str] = []
        taken: list[int] = []
        unsaid: list[int] = []
        for token in tokens:
            counters.emitted += 1
            counters.first_token_s = counters.first_token_s or time.monotonic() - running.started
            taken.append(token)
            if token in self.eos_token_ids and not params.ignore_eos:
                running.finish_reason = "stop"
                break
            unsaid.append(token)
            if params.stop:
                texts.append(running.text.push(unsaid.pop()))
                if running.text.stopped:
                    running.finish_reason = "stop"
                    break
            if counters.emitted >= params.max_tokens:
                running.finish_reason = "length"
                break
        if unsaid:  # no stop string can end the output among them: decoded once, not token by token
            texts.append(running.text.push(*unsaid))
        if running.finish_reason is not None:
            texts.append(running.text.flush())
            if running.text.stopped:  # a stop string before half a character shows only now
                running.finish_reason = "stop"
            counters.total_s = time.monotonic() - running.started
            yield Chunk(running.index, "".join(texts), tuple(taken), running.finish_reason, counters)
        elif taken:
            yield Chunk(running.index, "".join(texts), tuple(taken))


class _Running:
    """A request that waits or runs."""

    def __init__(self, index: int, request: Request, policy: Policy, decode: Any) -> None:
        self.index, self.request = index, request
        self.text = TextStream(decode, request.params.stop)
        self.row = Row(request.params, policy, self.text.would_stop, Counters())
        self.finish_reason: FinishReason | None = None
        self.started = 0.0


def _drop_finished(batch: DecodeBatch, scheduler: Scheduler[_Running]) -> None:
    for row in range(len(scheduler.rows) - 1, -1, -1):
        if scheduler.rows[row].finish_reason is not None:
            batch.remove(row, scheduler.finish(row))
