"""ssv as a model of EleutherAI's lm-evaluation-harness (the package lm-eval): `SsvModel`.

    from lm_eval import simple_evaluate
    simple_evaluate(model=SsvModel(LLM.load("bundles/smollm2-135m"), "balanced"), tasks=["gsm8k"])

Texts that are generated are the method's. Log-likelihoods are the target's: no method of decoding changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ssv.ab.evaluation.answers import Asked
from ssv.runtime.decode.likelihood import Likelihoods
from ssv.runtime.llm import LLM
from ssv.runtime.request import Output, Request, RequestError, SamplingParams
from ssv.support.progress import Report, silent

DEFAULT_MAX_TOKENS = 256
"""The harness's own, of a task that does not say."""

_LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_KNOWN = (*_LIMIT_NAMES, *_PASSED_ON, "until", "do_sample", "temperature")


class SsvModel(TemplateLM):
    """A bundle that decodes by one method, as the harness wants it.

    Attributes:
        num_cut: requests whose beginning was left out, because they are longer than the model reads.
    """

    def __init__(
        self,
        llm: LLM,
        method: str = "premium",
        *,
        generate: Callable[[Sequence[Asked]], list[Output]] | None = None,
        report: Report = silent,
    ) -> None:
        """Answers the harness by an LLM.

        Args:
            generate: answers requests; None for the LLM itself, as many at a time as its cache has rows.
            report: told how many likelihoods are done.
        """
        super().__init__()
        self.llm, self.method, self.num_cut = llm, method, 0
        self._generate, self._report = generate or self._ask, report

    # --- what is asked ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts; see `lm_eval.api.model.LM`.

        Raises:
            RequestError: a task asks for a setting that is not known here, or for more tokens than fit.
        """
        asked = []
        for request in requests:
            context, settings = request.args
            params = sampling_of(settings)
            room = self.llm.max_length - params.max_tokens
            if room < 1:
                raise RequestError(
                    f"the task {request.task_name} asks for {params.max_tokens} tokens, and prompt and output together "
                    f"have {self.llm.max_length}",
                    "leave the task out",
                )
            asked.append((self._cut(self.tok_encode(context), room), params))
        return [output.text for output in self._generate(asked)]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding gives them; see `lm_eval.api.model.LM`."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        likelihoods = Likelihoods(self.llm.target, self.llm.prefill_chunk)
        found = []
        for number, (_texts, context, continuation) in enumerate(requests):
            if not continuation:  # it became one token with the end of its context
                context, continuation = context[:-1], context[-1:]
            # The last token is not run.
            ids = self._cut([*context, *continuation], self.llm.max_length + 1)
            first = len(ids) - len(continuation)
            if first < 1:
                raise RequestError(
                    f"a continuation has {len(continuation)} tokens, and context and continuation together "
                    f"{self.llm.max_length}",
                    "leave the task out",
                )
            likelihood = likelihoods.of(ids, first)
            found.append((likelihood.logprob, likelihood.is_greedy))
            self._report("likelihoods", number + 1, len(requests), "")
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token given as much as fits before it."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.llm.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(logprob for logprob, _ in self._loglikelihood_tokens([(("", ""), *p) for p in pairs])))
        return found

    # --- tokens and templates ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text."""
        return min(self.llm.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; an empty one has what stands before a text."""
        if add_special_tokens is False:
            return list(self.llm.tokenizer.inner.encode(string, add_special_tokens=False))
        return list(self.llm.tokenizer.encode(string)) if string else [self.prefix_token_id]

    @property
    def tokenizer_name(self) -> str:
        """Tells this bundle's prompts from others' where the harness keeps them."""
        return f"ssv {self.llm.place}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The bundle's template, for the harness's records."""
        return getattr(self.llm.tokenizer.inner, "chat_template", None) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text.

        Args:
            add_generation_prompt: False where the last message is the beginning of the answer.
        """
        if add_generation_prompt:
            return self.llm.tokenizer.render(chat_history)
        return self.llm.tokenizer.render(chat_history[:-1]) + chat_history[-1]["content"]

    # ----------------------------------------------------------------------------------------------------------------

    def _cut(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """The end of a text, as the harness has it with its own models."""
        self.num_cut += len(ids) > most
        return tuple(ids[-most:])

    def _ask(self, asked: Sequence[Asked]) -> list[Output]:
        return self.llm.generate([Request(ids, self.method, params) for ids, params in asked])


def sampling_of(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs`.

    Raises:
        RequestError: one is not known here, or out of range.
    """
    if unknown := sorted(settings.keys() - set(_KNOWN)):
        raise RequestError(f"the task asks for {unknown[0]}, which is not known here", f"known: {', '.join(_KNOWN)}")
    samples = settings.get("do_sample", settings.get("temperature", 0) != 0)
    until = settings.get("until") or ()
    return SamplingParams(
        temperature=float(settings.get("temperature", 1.0)) if samples else 0.0,
        max_tokens=int(next((settings[name] for name in _LIMIT_NAMES if name in settings), DEFAULT_MAX_TOKENS)),
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
        **{name: settings[name] for name in _PASSED_ON if name in settings},
    )
