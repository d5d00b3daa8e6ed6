"""The rows of ssv-bench: a method each, and beside them what else is said to speed decoding up, other precisions and a
cache of prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ssv.runtime.methods import METHODS, policy_for, with_options
from ssv.runtime.request import Chunk, Output, Request, RequestError, SamplingParams
from ssv.support.json_text import parse_json
from ssv.support.precisions import TORCH_PRECISIONS

if TYPE_CHECKING:
    from ssv.runtime.decode.prompt_cache import PromptCache
    from ssv.runtime.llm import LLM

BASELINE = "autoregressive"

PROMPT_CACHE = "prompt-cache"
BESIDE = (*TORCH_PRECISIONS, PROMPT_CACHE)
"""What may have rows of its own, one of the baseline and one of `premium`."""

BESIDE_ALL = ("int8", "int4", PROMPT_CACHE)
"""What has them in the table of everything, on a CPU."""

PROMPT_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode.

    Attributes:
        name: its method, and what is different of it.
        llm: of its own in another precision.
        options: of the method, where they are not the bundle's.
        cache: of prompts, with what was computed of each of them before it is timed; None for none.
    """

    name: str
    method: str
    llm: LLM
    cache: PromptCache[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> None:
        """Puts prompts into the cache: when they are decoded next they have been met before."""
        if self.cache is not None:
            self.decode(prompts, replace(params, max_tokens=1, min_tokens=0), 1)

    def decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        num_draft_tokens: int,
        gaps: list[float] | None = None,
    ) -> list[Output]:
        """Decodes prompts side by side.

        Args:
            gaps: to which the seconds between the pieces of each output are added, as they come.

        Raises:
            RequestError: the method cannot have such options, or the bundle has no such tier.
        """
        policy = None
        if self.options:
            policy = with_options(self.method, policy_for(self.method, self.llm.tiers, num_draft_tokens), self.options)
        requests = [Request(prompt, self.method, params, num_draft_tokens, policy) for prompt in prompts]
        last: dict[int, float] = {}

        def watch(chunk: Chunk) -> None:
            if gaps is not None and chunk.token_ids:
                now = time.perf_counter()
                if chunk.index in last:
                    gaps.append(now - last[chunk.index])
                last[chunk.index] = now

        return self.llm.generate(requests, prompt_cache=self.cache, watch=watch)


def ways(
    llm: LLM,
    methods: Sequence[str],
    beside: Sequence[str],
    load: Callable[[str], LLM],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Way]:
    """A way for each method, and two for each of what stands beside them.

    Args:
        methods: the baseline first.
        beside: of `BESIDE`; the precision of `llm` is no other one, and is left out.
        load: loads the same bundle in another precision.
        options: by method, where they are not the bundle's.
    """
    options = options or {}
    found = [Way(_named(method, options), method, llm, options=options.get(method, {})) for method in methods]
    for name in beside:
        if name == llm.precision:
            continue
        other = llm if name == PROMPT_CACHE else load(name)
        for method in (BASELINE, "premium"):
            if method in llm.methods:
                cache = llm.prompt_cache(PROMPT_CACHE_BYTES) if name == PROMPT_CACHE else None
                named = f"{_named(method, options)}, {name}"
                found.append(Way(named, method, other, cache, options.get(method, {})))
    return found


def _named(method: str, options: Mapping[str, Mapping[str, Any]]) -> str:
    """A method, and which options it has that are its own here."""
    return ", ".join((method, *(f"{name} {json.dumps(value)}" for name, value in options.get(method, {}).items())))


def read_options(text: str) -> dict[str, dict[str, Any]]:
    """Options by method, from a JSON object of JSON objects.

    Raises:
        RequestError: it is none, or names no method.
    """
    try:
        given = parse_json(text)
    except ValueError as error:
        raise RequestError(f"--policy is not JSON ({error})") from error
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        raise RequestError("--policy must have an object of options by method", 'as {"eagle": {"max_depth": 4}}')
    if wrong := [name for name in given if name not in METHODS]:
        raise RequestError(f"--policy: unknown method {wrong[0]!r}; known: {', '.join(METHODS)}")
    return given


def read_methods(text: str) -> list[str]:
    """Names of methods, comma-separated, each once.

    Raises:
        RequestError: there is none, or one is unknown.
    """
    return _names(text, METHODS, "unknown method {}", "--methods names none")


def read_beside(text: str) -> list[str]:
    """Names of what stands beside the methods.

    Raises:
        RequestError: there is none, or one is unknown.
    """
    return _names(text, BESIDE, "--also {} is unknown", "--also names nothing", ", or leave it out")


def _names(text: str, known: Sequence[str], unknown: str, none: str, otherwise: str = "") -> list[str]:
    """Names of a comma-separated list, each once.

    Args:
        unknown, none: what is said of one that is not known, and of an empty list.
        otherwise: than to choose a name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if wrong := [name for name in names if name not in known]:
        raise RequestError(f"{unknown.format(repr(wrong[0]))}; known: {', '.join(known)}")
    if not names:
        raise RequestError(none, f"choose of: {', '.join(known)}{otherwise}")
    return names
