"""A bundle that answers: requests in, text out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ssv.bundle.manifest import Manifest, read_manifest, unused_files, verify_files
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.model.checkpoint import load_checkpoint, read_safetensors
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft, load_draft_head
from ssv.model.heads import load_heads
from ssv.model.scorer import load_scorer
from ssv.runtime.decode.costs import SIZES_AT_LOAD, measure, place
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.round import PREFILL_CHUNK, DecodeBatch, PromptBlock
from ssv.runtime.engines.contract import Engine, EngineError, HeadsEngine
from ssv.runtime.engines.tensorrt_engine import choose_entry, load_engine
from ssv.runtime.engines.torch_engine import (
    Precision,
    cpu_threads,
    draft_engine,
    heads_engine,
    one_thread,
    target_engine,
)
from ssv.runtime.memory import give_back
from ssv.runtime.methods import TIERS, baselines, policy_of
from ssv.runtime.request import Chunk, Output, Request, RequestError, TokenLogprobs
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.support.waiting import Say, say_nothing, waiting

GPU_PREFILL_CHUNK = 512

CPU_PASS_TOKENS = 8
"""On two cores a target pass of eight tokens costs 1.5 times one of a single token, and each further one a twelfth of
it."""


class LLM:
    """A target and its draft, ready to decode.

    Attributes:
        tokenizer: the bundle's.
        tiers: policies by name.
        limits: largest divergence that each lossy tier's calibration promises.
        max_length: tokens of prompt and output together.
        prefill_chunk: tokens of a prompt that a round runs.
        place: where the engines run, as the key of a profile (`ssv.runtime.decode.costs.place`).
        heads: Medusa's; None where the bundle has none, or its engine is TensorRT's.
        pass_tokens, costs, survival: see `DecodeBatch`.
        grammars: over its vocabulary; None with a tokenizer that cannot say them.
    """

    def __init__(
        self,
        target: Engine,
        draft: Engine | None,
        tokenizer: BundleTokenizer,
        *,
        eos_token_ids: Sequence[int],
        tiers: Mapping[str, Policy],
        max_length: int,
        prefill_chunk: int = PREFILL_CHUNK,
        pass_tokens: int | None = None,
        limits: Mapping[str, float] | None = None,
        place: str = "",
        costs: Costs | None = None,
        survival: Survival | None = None,
        heads: HeadsEngine | None = None,
    ) -> None:
        self.limits = dict(limits or {})
        self.target, self.draft, self.heads, self.tokenizer = target, draft, heads, tokenizer
        self.eos_token_ids, self.tiers, self.max_length = frozenset(eos_token_ids), dict(tiers), max_length
        self.prefill_chunk, self.pass_tokens = prefill_chunk, pass_tokens
        self.place, self.costs, self.survival = place, costs, survival
        self.grammars = tokenizer.grammars(target.vocab_size, eos_token_ids)
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
        prefill_chunk: int | None = None,
        threads: int | None = None,
        verify: bool = True,
        verified: Mapping[str, str] | None = None,
        say: Say = say_nothing,
    ) -> LLM:
        """Loads a bundle.

        Args:
            engine: `tensorrt` for the bundle's compiled engines, on this machine's GPU; max_batch must not exceed
                theirs, max_length is cut to it.
            precision: None for the bundle's default on a CPU and bf16 on CUDA; with `tensorrt`, for whatever is
                compiled.
            max_length: tokens of prompt and output together; cut to what the model has positions for.
            prefill_chunk: tokens of a prompt that a round runs; None for 64 on a CPU and 512 on a GPU.
            threads: of the torch engine on a CPU; None for as many as there are cores that nobody else uses, which int8
                follows while it decodes. `OMP_NUM_THREADS`, or another number than torch's own set before, is kept.
            verify: check the hash of every file that is loaded first.
            verified: files that another process has checked (see `verify_files`): those not touched since are not
                hashed again.
            say: called with what is being done.

        Raises:
            BundleError, CheckpointError: the bundle is damaged.
            EngineError: precision or device not to be had.
        """
        import torch

        bundle = Path(bundle)
        on_cpu = torch.device(device).type == "cpu"
        if threads is not None and not (engine == "torch" and on_cpu):
            raise EngineError("threads are of the torch engine on a CPU", "leave them out for another engine or device")
        # Before the files are read: while they are, the machine shows how many cores are free.
        thread_count = cpu_threads(threads) if engine == "torch" and on_cpu else None
        manifest = read_manifest(bundle, verify=False)
        if verify:
            unused = unused_files(manifest, engine)
            verify_files(bundle, manifest, verified=verified or {}, unused=unused, say=say)
        say(f"loading {bundle}")
        if engine == "tensorrt":
            return cls._load_tensorrt(bundle, manifest, precision, max_batch, max_length, prefill_chunk, say)
        if precision is not None and precision not in get_args(Precision):
            raise EngineError(f"precision {precision!r} is unknown; known: {', '.join(get_args(Precision))}")
        if not on_cpu and not torch.cuda.is_available():
            raise EngineError(f"device {device!r}: torch finds no CUDA GPU on this machine", "use the device cpu")
        precision = precision or (manifest.default_precision if on_cpu else "bf16")
        # As they are stored: the engines make of each layer what they need, one after the other.
        with one_thread():
            spec, weights = load_checkpoint(bundle / "target")
            decoder = Decoder.from_weights(spec, weights, dtype=None)
            del weights
            draft = load_draft(bundle / "draft" / "draft.safetensors", decoder, dtype=None)
            found = (
                load_heads(bundle / "heads.safetensors", decoder, dtype=None) if manifest.heads is not None else None
            )
        max_length = min(max_length, spec.max_positions - RESERVED_LENGTH)
        sizes: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "max_batch": max_batch,
            "max_length": max_length + RESERVED_LENGTH,
            "threads": thread_count,
        }
        ranges = read_safetensors(bundle / "activation_ranges.safetensors")
        draft_ranges = {name.removeprefix("draft."): r for name, r in ranges.items() if name.startswith("draft.")}
        target_ranges = {name.removeprefix("target."): r for name, r in ranges.items() if name.startswith("target.")}
        if thread_count is not None:
            thread_count.follow()
        scorer = load_scorer(bundle / "scorer.safetensors", draft.spec.decoder.hidden_size)
        engines = (
            target_engine(decoder, draft=draft, ranges=target_ranges, **sizes),
            draft_engine(draft, scorer=scorer, ranges=draft_ranges, **sizes),
        )
        heads = None if found is None else heads_engine(found, precision=sizes["precision"], device=device)
        del decoder, draft, found, ranges, draft_ranges, target_ranges
        give_back()
        threads = thread_count.most if thread_count is not None else torch.get_num_threads()
        key = place("torch", precision, device, threads)
        costs = cls._costs(manifest, *engines, key, say)
        return cls(
            *engines,
            BundleTokenizer.load(bundle, manifest.eos_token_ids),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            limits=manifest.divergence_limits,
            max_length=max_length,
            prefill_chunk=prefill_chunk or (PREFILL_CHUNK if on_cpu else GPU_PREFILL_CHUNK),
            pass_tokens=CPU_PASS_TOKENS if on_cpu else None,
            place=key,
            costs=costs,
            survival=manifest.survival,
            heads=heads,
        )

    @staticmethod
    def _costs(manifest: Manifest, target: Engine, draft: Engine, key: str, say: Say) -> Costs | None:
        """The bundle's profile of this place; measured, where it has none and a tier goes by it."""
        if key in manifest.profiles or not any(policy.pays for policy in manifest.policies.values()):
            return manifest.profiles.get(key)
        say(f"measuring what steps cost here: the bundle has no profile of {key}, `ssv-build profile` gives it one")
        return measure(target, draft, pass_sizes=SIZES_AT_LOAD, draft_sizes=SIZES_AT_LOAD)

    @classmethod
    def _load_tensorrt(
        cls,
        bundle: Path,
        manifest: Manifest,
        precision: str | None,
        max_batch: int,
        max_length: int,
        prefill_chunk: int | None,
        say: Say,
    ) -> LLM:
        entries = [choose_entry(bundle, manifest, role, precision) for role in ("target", "draft")]
        draft = load_draft_head(bundle / "draft" / "draft.safetensors")  # its weights are in its engine
        engines = [
            load_engine(bundle, manifest, entries[0], max_batch=max_batch),
            load_engine(bundle, manifest, entries[1], draft, max_batch=max_batch),
        ]
        key = place("tensorrt", entries[0].precision, "cuda", 1)
        return cls(
            engines[0],
            engines[1],
            BundleTokenizer.load(bundle, manifest.eos_token_ids),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            limits=manifest.divergence_limits,
            max_length=min(max_length, *(entry.max_length - RESERVED_LENGTH for entry in entries)),
            prefill_chunk=prefill_chunk or GPU_PREFILL_CHUNK,
            place=key,
            costs=cls._costs(manifest, engines[0], engines[1], key, say),
            survival=manifest.survival,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """What it can decode by, in the order of `METHODS`."""
        return (*baselines(self.heads is not None), *(name for name in TIERS if name in self.tiers))

    def chat_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a user's message in the model's chat template, up to where the assistant answers."""
        return self.tokenizer.chat_ids([{"role": "user", "content": prompt}])

    def stream(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Decodes requests side by side, as many at a time as the cache has rows; yields their output as it comes.

        Raises:
            RequestError: one of them cannot be served, or another stream is not finished; raised before any is started.
        """
        if self._streaming:
            raise RequestError(
                "another stream of this LLM is not finished and holds its cache",
                "exhaust or close it first, or give all requests to one call",
            )
        self._streaming = True
        try:
            yield from self._run(requests)
        finally:
            self._streaming = False

    def _run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        loop = self.loop()
        for index, request in enumerate(requests):
            policy = policy_of(request, self.tiers)
            loop.batch.check(request.prompt_ids, request.params, policy)  # what is no token has no text either
            loop.submit(index, request, policy, self.tokenizer.text_stream(request.prompt_ids, request.params))
        while loop.has_work:
            yield from loop.step()

    def loop(self, *, max_waiting: int | None = None, prompt_cache_bytes: int = 0) -> DecodeLoop:
        """A decoding loop over the engines; there may be one at a time, as they have one cache.

        Args:
            max_waiting: see `Scheduler`.
            prompt_cache_bytes: memory for beginnings of prompts; 0 for none.
        """
        cache = PromptCache[PromptBlock](self.prefill_chunk, prompt_cache_bytes) if prompt_cache_bytes else None
        batch = DecodeBatch(
            self.target,
            self.draft,
            sorted(self.eos_token_ids),
            self.max_length,
            prefill_chunk=self.prefill_chunk,
            prompt_cache=cache,
            pass_tokens=self.pass_tokens,
            costs=self.costs,
            survival=self.survival,
            heads=self.heads,
            grammars=self.grammars,
        )
        return DecodeLoop(batch, self.eos_token_ids, max_waiting)

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Decodes requests and returns their outputs, in their order."""
        texts: list[list[str]] = [[] for _ in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in requests]
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in requests]
        outputs: list[Output | None] = [None] * len(requests)
        for chunk in self.stream(requests):
            texts[chunk.index].append(chunk.text)
            tokens[chunk.index].extend(chunk.token_ids)
            logprobs[chunk.index].extend(chunk.logprobs)
            prompt_logprobs[chunk.index].extend(chunk.prompt_logprobs)
            if chunk.finish_reason is not None:
                outputs[chunk.index] = Output(
                    "".join(texts[chunk.index]),
                    tuple(tokens[chunk.index]),
                    chunk.finish_reason,
                    chunk.counters,
                    tuple(logprobs[chunk.index]),
                    tuple(prompt_logprobs[chunk.index]),
                )
        assert all(output is not None for output in outputs)
        return [output for output in outputs if output is not None]


def load_for(args: Namespace, max_batch: int = 1) -> LLM:
    """Loads what a command's options name (bundle, engine, precision, device, threads), and says what takes long."""
    with waiting(f"loading {args.bundle}") as say:
        return LLM.load(
            args.bundle,
            engine=args.engine,
            precision=args.precision,
            device=args.device,
            threads=args.threads,
            max_batch=max_batch,
            say=say,
        )
