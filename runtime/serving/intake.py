"""What a client may ask for, checked, and made into a request.

Imports no torch: it runs beside the engines, not with them.

The names are those that existing clients of Triton send: TensorRT-LLM's and vLLM's backends, genai-perf, the OpenAI
frontend, the bench clients of sglang and vLLM. What is known and not supported is refused with a message, never
ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssv.bundle.manifest import Manifest
from ssv.bundle.policy import Policy
from ssv.runtime.grammar import grammar_of, guide_of
from ssv.runtime.methods import METHODS, NEEDS_HEADS, baselines, policy_for, with_options
from ssv.runtime.request import RequestError, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.support.json_text import parse_json

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy: clients that cannot send 0 send 1e-6."""

LARGEST_SEED = 2**64 - 1

MAX_STOP_WORDS, MAX_STOP_BYTES = 64, 256
"""Stop words, and bytes of each: they are looked for at every token."""

MAX_NAMED_TOKENS = 1024
"""Tokens that a request may name in each of its lists."""

STRINGS = (
    "text_input",
    "ssv_messages",
    "ssv_tools",
    "ssv_template",
    "sampling_parameters",
    "logit_bias",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
    "ssv_tier",
    "ssv_policy",
)
STRING_LISTS = ("stop_words", "bad_words")
TOKEN_LISTS = ("input_ids", "stop_token_ids")
FLAGS = (
    "stream",
    "ignore_eos",
    "exclude_input_in_output",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_finish_reason",
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "ssv_chat",
    "ssv_return_fates",
)
WHOLE_NUMBERS = (
    "max_tokens",
    "min_tokens",
    "min_length",
    "top_k",
    "seed",
    "random_seed",
    "end_id",
    "pad_id",
    "ssv_top_logprobs",
    "ssv_prompt_logprobs",
    "beam_width",
    "num_return_sequences",
)
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "ssv_max_divergence",
    "ssv_timeout",
    "latency_bound_ms",
)
"""Inputs of `ensemble`, by type: STRING [1], STRING [-1], INT32 [-1], BOOL [1], INT32 [1] (`seed` and `random_seed`:
UINT64) and FP32 [1].
"""

_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
}

# What comes with a request and is no setting: `generate` hands its id on, and the bench clients of sglang and vLLM send
# the second to whatever they measure, where it changes nothing either.
_NO_SETTINGS = ("id", "accumulate_tokens")
# Names that other servers have for ours, where the spelling does not tell.
_ELSEWHERE = {
    "prompt": "text_input",
    "prompt_token_ids": "input_ids",
    "inputs": "text_input",
    "messages": "ssv_messages",
    "stop": "stop_words",
    "max_completion_tokens": "max_tokens",
    "tier": "ssv_tier",
    "policy": "ssv_policy",
    "num_draft_tokens": "ssv_policy",
    "num_speculative_tokens": "ssv_policy",
    "timeout": "ssv_timeout",
    "response_format": "guided_decoding_guide_type",
    "structured_outputs": "guided_decoding_guide_type",
    "guided_json": "guided_decoding_guide",
    "logprobs": "ssv_top_logprobs",
    "prompt_logprobs": "ssv_prompt_logprobs",
}
# What asks for several outputs, and how to get them all the same.
_NUM_OUTPUTS = ("num_return_sequences", "n", "best_of")
_SEVERAL = "leave it out, and ask once for each output, with seeds of their own"
# Settings that change the output and are not supported, and the value that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "length_penalty": 1.0,
    "beam_width": 1,
    "num_return_sequences": 1,
    "return_context_logits": False,
    "return_generation_logits": False,
}
# Of vLLM's sampling parameters, beside those above that have the same name.
_VLLM_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "detokenize": True,
}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_VLLM = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", *_PENALTIES)
_VLLM_NAMES = {"logprobs": "ssv_top_logprobs", "prompt_logprobs": "ssv_prompt_logprobs"}
_VLLM_GUIDES = ("structured_outputs", "guided_decoding")
_VLLM_LISTS = ("stop", "bad_words", "stop_token_ids", "logit_bias")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server has room for.

    Attributes:
        max_length: tokens of prompt and output together.
        max_tokens: of an output.
        max_prompt_bytes: of a prompt's text: longer ones are refused before time is spent on them.
    """

    max_length: int
    max_tokens: int
    max_prompt_bytes: int


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked request without its prompt, as it travels from `preprocessing` to `ssv`.

    Attributes:
        method: see `ssv.runtime.methods.METHODS`.
        stream: whether chunks are wanted, or one response at the end.
        timeout: seconds after which it ends with what it has; None for none.
        policy: the method's, with what the request has otherwise; None for the method's own.
    """

    method: str
    params: SamplingParams
    stream: bool
    timeout: float | None
    policy: Policy | None = None

    def to_json(self) -> str:
        """JSON that `from_json` reads."""
        policy = self.policy.model_dump(mode="json") if self.policy is not None else None
        return json.dumps({**asdict(self), "policy": policy})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Reads what `to_json` has written."""
        fields = json.loads(text)
        if fields["policy"] is not None:
            fields["policy"] = Policy.model_validate(fields["policy"])
        params = fields.pop("params")
        params |= {name: tuple(params[name]) for name in ("stop", "stop_token_ids")}
        params |= {name: tuple(map(tuple, params[name])) for name in ("logit_bias", "bad_token_ids")}
        return cls(params=SamplingParams(**params), **fields)


class Intake:
    """Makes requests of what clients send to a bundle's models."""

    def __init__(self, manifest: Manifest, tokenizer: BundleTokenizer, limits: Limits) -> None:
        self._manifest, self._tokenizer, self._limits = manifest, tokenizer, limits
        self._vocab_size = int(manifest.target["vocab_size"])

    def prepare(
        self, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any] | None = None
    ) -> tuple[tuple[int, ...], Settings]:
        """Prompt token ids and settings of a request's tensors, each [1] or [1, n].

        Args:
            parameters: of the request, beside its tensors: fields of HTTP `generate` that are no tensors become such.

        Raises:
            RequestError: what cannot be served.
        """
        fields = {name: _plain(name, tensor) for name, tensor in tensors.items()}
        _merge_parameters(fields, parameters or {})
        for name in STRINGS:
            size, most = len(fields.get(name, "").encode()), self._limits.max_prompt_bytes
            if size > most:
                raise RequestError(f"{name} has {size} bytes, at most {most} are taken", "shorten it")
        _merge_sampling_parameters(fields)
        prompt = self._prompt(fields)
        room = self._limits.max_length - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and prompt and output together may have "
                f"{self._limits.max_length}",
                "shorten it",
            )
        params = self._params(fields, room)
        timeout = fields.get("ssv_timeout")
        if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
            raise RequestError(f"ssv_timeout {timeout} must be above 0 seconds")
        method = self._method(fields, params.greedy)
        policy = self._policy(fields, method)
        return prompt, Settings(method, params, bool(fields.get("stream", False)), timeout, policy)

    def _prompt(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        text, messages = fields.get("text_input", ""), fields.get("ssv_messages", "")
        if ids := fields.get("input_ids"):
            if text or messages:
                given = "text_input" if text else "ssv_messages"
                raise RequestError(f"input_ids and {given} are both given", "give one of them")
            if (token := next((t for t in ids if not 0 <= t < self._vocab_size), None)) is not None:
                raise RequestError(f"input_ids: token {token} is outside the vocabulary of {self._vocab_size}")
            return tuple(ids)
        if messages:
            if text:
                raise RequestError("text_input and ssv_messages are both given", "give one of them")
            options = template_options(fields.get("ssv_template", ""))
            return self._tokenizer.chat_ids(_messages(messages), _tools(fields.get("ssv_tools", "")), **options)
        if fields.get("ssv_template"):
            raise RequestError("ssv_template is of a conversation", "give it in ssv_messages, or leave it out")
        if fields.get("ssv_tools"):
            raise RequestError("ssv_tools are of a conversation", "give it in ssv_messages, or leave them out")
        if "text_input" not in fields:
            raise RequestError(
                "text_input is missing", "give a prompt there, or in input_ids, or a conversation in ssv_messages"
            )
        if fields.get("ssv_chat"):
            return self._tokenizer.chat_ids([{"role": "user", "content": text}])
        return self._tokenizer.encode(text)

    def _params(self, fields: Mapping[str, Any], room: int) -> SamplingParams:
        for name, neutral in _NEUTRAL.items():
            if fields.get(name, neutral) != neutral:
                cure = _SEVERAL if name in _NUM_OUTPUTS else f"leave it out, or give {neutral}"
                raise RequestError(f"{name} {fields[name]} is not supported", cure)
        if fields.get("exclude_input_in_output") is False:
            raise RequestError("exclude_input_in_output false is not supported: text_output never has the prompt")
        most = min(room, self._limits.max_tokens)
        max_tokens = fields.get("max_tokens", most)
        if max_tokens > most:
            raise RequestError(
                f"max_tokens {max_tokens}: at most {most} are possible with this prompt "
                f"(limits: {self._limits.max_tokens} of output, {self._limits.max_length} with the prompt)"
            )
        min_tokens, min_length = fields.get("min_tokens"), fields.get("min_length")
        if None not in (min_tokens, min_length) and min_tokens != min_length:
            raise RequestError(f"min_tokens {min_tokens} and min_length {min_length} are the same setting", "give one")
        temperature = fields.get("temperature", 0.0)
        seed = fields.get("seed", fields.get("random_seed"))
        if seed != fields.get("random_seed", seed):
            raise RequestError(f"seed {seed} and random_seed {fields['random_seed']} are the same setting", "give one")
        if seed is not None and not 0 <= seed <= LARGEST_SEED:
            raise RequestError(f"seed {seed} must be between 0 and {LARGEST_SEED}")
        top_k = fields.get("top_k", 0)
        logprobs = fields.get("ssv_top_logprobs", 0 if fields.get("return_log_probs") else None)
        return SamplingParams(
            temperature=0.0 if 0 <= temperature < GREEDY_BELOW else temperature,
            top_k=0 if top_k == -1 else top_k,  # vLLM's "all"
            top_p=fields.get("top_p", 1.0),
            min_p=fields.get("min_p", 0.0),
            repetition_penalty=fields.get("repetition_penalty", 1.0),
            presence_penalty=fields.get("presence_penalty", 0.0),
            frequency_penalty=fields.get("frequency_penalty", 0.0),
            logit_bias=_biases(fields.get("logit_bias", "")),
            grammar=_grammar(fields),
            bad_token_ids=self._tokenizer.word_ids(_words(fields, "bad_words")),
            seed=secrets.randbits(64) if seed is None else seed,
            max_tokens=max_tokens,
            min_tokens=min_tokens or min_length or 0,
            stop=_words(fields, "stop_words"),
            stop_token_ids=_stop_token_ids(fields),
            ignore_eos=bool(fields.get("ignore_eos", False)) or self._never_ends(fields.get("end_id")),
            logprobs=logprobs,
            prompt_logprobs=fields.get("ssv_prompt_logprobs"),
            fates=bool(fields.get("ssv_return_fates", False)),
            latency_bound_ms=fields.get("latency_bound_ms"),
        )

    def _never_ends(self, end_id: int | None) -> bool:
        """Whether `end_id` asks for no end: clients that measure send one that is no token."""
        if end_id is None or end_id in self._manifest.eos_token_ids:
            return False
        if 0 <= end_id < self._vocab_size:
            raise RequestError(
                f"end_id {end_id} is not one of the model's ({', '.join(map(str, self._manifest.eos_token_ids))})",
                "leave it out, and use stop_words",
            )
        return True

    def _method(self, fields: Mapping[str, Any], greedy: bool) -> str:
        tier, bound = fields.get("ssv_tier") or None, fields.get("ssv_max_divergence")
        if tier is not None and tier not in METHODS:
            raise RequestError(f"ssv_tier {tier!r} is unknown; known: {', '.join(METHODS)}")
        if bound is None:
            tier = tier or "premium"
        else:
            if not 0 <= bound <= 1:
                raise RequestError(f"ssv_max_divergence {bound} must be between 0 and 1")
            within = [name for name in METHODS if self._bound(name, greedy) <= bound]
            if tier is not None and tier not in within:
                known = self._bound(tier, greedy)
                has = f"a divergence of up to {known}" if math.isfinite(known) else "no bound on its divergence"
                raise RequestError(
                    f"ssv_tier {tier!r} has {has} and exceeds ssv_max_divergence {bound}", "leave one of them out"
                )
            # They stand in the order of what they save.
            tier = tier or within[-1]
        if tier in NEEDS_HEADS and self._manifest.heads is None:
            raise RequestError(
                f"ssv_tier {tier!r} needs Medusa's heads, which this bundle has not", "choose another one"
            )
        policy_for(tier, self._manifest.policies)
        return tier

    def _policy(self, fields: Mapping[str, Any], method: str) -> Policy | None:
        """The method's policy with the options that the request gives; None where it gives none."""
        text = fields.get("ssv_policy", "")
        options = _json("ssv_policy", text) if text else {}
        if not isinstance(options, dict):
            raise RequestError('ssv_policy must be a JSON object of options, as {"max_depth": 4}')
        if not options:
            return None
        if "ssv_max_divergence" in fields and not fields.get("ssv_tier"):
            raise RequestError(
                "ssv_policy has options of a tier, and ssv_max_divergence leaves open which tier it is", "give ssv_tier"
            )
        try:
            return with_options(method, policy_for(method, self._manifest.policies), options)
        except RequestError as error:
            raise RequestError(f"ssv_policy: {error.what}", error.cure) from error

    def _bound(self, method: str, greedy: bool) -> float:
        """The bound on the divergence of a method's greedy or sampled output; infinite where none is known."""
        entry = self._manifest.tiers.get(method)
        if entry is None:
            is_known = method in baselines(self._manifest.heads is not None)
            return 0.0 if is_known and policy_for(method, {}).lossless_for(greedy=greedy) else math.inf
        return 0.0 if entry.lossless else (entry.divergence_bound if entry.divergence_bound is not None else math.inf)


def _plain(name: str, tensor: np.ndarray) -> Any:
    """A tensor's value as Python has it."""
    values = tensor.reshape(-1).tolist()
    if name in STRINGS + STRING_LISTS:
        texts = [_text(name, value) for value in values]
        if name in STRING_LISTS:
            return texts
        values = texts
    if name in TOKEN_LISTS:
        return values
    if len(values) != 1:
        raise RequestError(f"{name} has {len(values)} values, one is wanted")
    if name in NUMBERS:
        if not math.isfinite(values[0]):
            raise RequestError(f"{name} {values[0]} is not a number that can be used")
        return float(str(np.float32(values[0])))  # 0.7 as it was meant, not fp32's 0.699999988
    return values[0]


def _text(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} has half of a surrogate pair at {error.start}", "send whole characters"
            ) from error
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not valid UTF-8: byte {error.start} is {value[error.start]:#04x}") from error


def _words(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Words of a list, without those that are empty."""
    words = tuple(word for word in fields.get(name, ()) if word)
    longest = max((len(word.encode()) for word in words), default=0)
    if len(words) > MAX_STOP_WORDS or longest > MAX_STOP_BYTES:
        raise RequestError(
            f"{len(words)} {name}, the longest of {longest} bytes: at most {MAX_STOP_WORDS} of {MAX_STOP_BYTES} "
            "bytes are taken"
        )
    return words


def _stop_token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    tokens = tuple(dict.fromkeys(fields.get("stop_token_ids", ())))
    if len(tokens) > MAX_NAMED_TOKENS:
        raise RequestError(f"{len(tokens)} stop_token_ids: at most {MAX_NAMED_TOKENS} are taken")
    return tokens


def _biases(text: str) -> tuple[tuple[int, float], ...]:
    """What `logit_bias` says: a JSON object of token ids as texts, and numbers."""
    if not text:
        return ()
    given = _json("logit_bias", text)
    if not isinstance(given, dict):
        raise RequestError('logit_bias must be a JSON object of token ids and numbers, as {"42": -1.5}')
    if len(given) > MAX_NAMED_TOKENS:
        raise RequestError(f"logit_bias of {len(given)} tokens: at most {MAX_NAMED_TOKENS} are taken")
    tokens = (_cast("logit_bias", "token", token, int) for token in given)
    biases = (_cast("logit_bias", "bias", bias, float) for bias in given.values())
    return tuple(zip(tokens, biases, strict=True))


def _messages(text: str) -> list[dict[str, Any]]:
    messages = _json("ssv_messages", text)
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise RequestError(
            'ssv_messages must be a JSON list of {"role": text, "content": text}, to which an assistant\'s may have '
            '"tool_calls", and a tool\'s "tool_call_id" and "name"'
        )
    return messages


_OF_TOOLS = {"tool": ("tool_call_id", "name"), "assistant": ("tool_calls",)}


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
        return False
    more = set(message) - {"role", "content"}
    calls = message.get("tool_calls", [])
    return (
        more <= set(_OF_TOOLS.get(message["role"], ()))
        and all(isinstance(message[name], str) for name in more - {"tool_calls"})
        and isinstance(calls, list)
        and all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls)
    )


def _tools(text: str) -> list[dict[str, Any]] | None:
    if not text:
        return None
    tools = _json("ssv_tools", text)
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(function := tool.get("function"), dict) and "name" in function
        for tool in tools
    ):
        raise RequestError('ssv_tools must be a JSON list of {"type": "function", "function": {"name": ...}}')
    return tools or None


def template_options(text: str) -> dict[str, Any]:
    """How the chat template is to be used, as `BundleTokenizer.chat_ids` takes it.

    Args:
        text: JSON; empty for the usual way.

    Raises:
        RequestError: it is of another form, or contradicts itself.
    """
    if not text:
        return {}
    options = _json("ssv_template", text)
    flags = ("add_generation_prompt", "continue_final_message")
    if (
        not isinstance(options, dict)
        or options.keys() - {*flags, "variables"}
        or not all(isinstance(options.get(name, False), bool) for name in flags)
        or not isinstance(options.get("variables", {}), dict)
    ):
        raise RequestError(
            'ssv_template must be a JSON object of "add_generation_prompt" and "continue_final_message", each true or '
            'false, and "variables", an object'
        )
    if options.get("continue_final_message"):
        if options.get("add_generation_prompt"):
            raise RequestError("continue_final_message and add_generation_prompt are both true", "give one of them")
        options["add_generation_prompt"] = False
    return options


def _merge_parameters(fields: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Puts a request's parameters beside the tensors of the same meaning.

    Raises:
        RequestError: one is unknown, or contradicts a tensor.
    """
    for name, value in parameters.items():
        if name in _NO_SETTINGS:
            continue
        if name not in declared_inputs():
            if name in _NUM_OUTPUTS:
                raise RequestError(f"{name!r} is unknown", _SEVERAL)
            near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, declared_inputs(), 1)), None)
            cure = f"use {near}, or leave it out" if near is not None else "leave it out"
            raise RequestError(f"{name[:64]!r} is unknown", cure)
        if name in STRING_LISTS:
            value = [str(value)]
        elif name in TOKEN_LISTS:
            value = [_cast("parameters", name, value, int)]
        elif name in STRINGS:
            value = str(value)
        else:
            value = _cast("parameters", name, value, bool if name in FLAGS else int if name in WHOLE_NUMBERS else float)
        if name in fields and fields[name] != value:
            raise RequestError(
                f"{name} is given twice, as {fields[name]!r} and as a parameter as {value!r}", "give it once"
            )
        fields[name] = value


def _merge_sampling_parameters(fields: dict[str, Any]) -> None:
    """Puts what vLLM's `sampling_parameters` say beside the tensors of the same meaning."""
    text = fields.pop("sampling_parameters", "")
    if not text:
        return
    given = _json("sampling_parameters", text)
    if not isinstance(given, dict):
        raise RequestError("sampling_parameters must be a JSON object")
    for name, value in given.items():
        if value is None:
            continue
        if name in _VLLM_NEUTRAL:
            neutral = _VLLM_NEUTRAL[name]
            if _cast("sampling_parameters", name, value, type(neutral)) != neutral:
                cure = _SEVERAL if name in _NUM_OUTPUTS else "leave it out"
                raise RequestError(f"sampling_parameters: {name} {value!r} is not supported", cure)
            continue
        if name in _VLLM_GUIDES:
            _merge_guide(fields, name, value)
            continue
        if name in _VLLM_LISTS:
            target, value = _vllm_list(name, value)
        elif name in _VLLM_NAMES:
            target, value = _VLLM_NAMES[name], _cast("sampling_parameters", name, value, int)
        elif name in _VLLM:
            kind = bool if name in FLAGS else int if name in WHOLE_NUMBERS else float
            target, value = name, _cast("sampling_parameters", name, value, kind)
        else:
            known = ", ".join((*_VLLM, *_VLLM_NAMES, *_VLLM_LISTS, *_VLLM_GUIDES))
            raise RequestError(f"sampling_parameters: {name!r} is not supported; known: {known}")
        if target in fields and fields[target] != value:
            raise RequestError(f"{name} is given twice, as {fields[target]!r} and in sampling_parameters as {value!r}")
        fields[target] = value


def _merge_guide(fields: dict[str, Any], name: str, value: Any) -> None:
    """Puts a form of the output as vLLM has it where ours stands."""
    if not isinstance(value, dict):
        raise RequestError(f"sampling_parameters: {name} must be an object")
    if "guided_decoding_guide_type" in fields:
        raise RequestError(f"sampling_parameters: {name} and guided_decoding_guide_type are both given", "give one")
    fields["guided_decoding_guide_type"], fields["guided_decoding_guide"] = guide_of(value)


def _grammar(fields: Mapping[str, Any]) -> str | None:
    kind, guide = fields.get("guided_decoding_guide_type", ""), fields.get("guided_decoding_guide", "")
    if guide and not kind:
        raise RequestError("guided_decoding_guide is given without its type", "give guided_decoding_guide_type")
    return grammar_of(kind, guide) if kind else None


def _vllm_list(name: str, value: Any) -> tuple[str, Any]:
    """A setting of vLLM's that is no number, as the field that says the same."""
    if name == "logit_bias":
        return name, json.dumps(value)
    if name == "stop_token_ids":
        if not isinstance(value, list):
            raise RequestError("sampling_parameters: stop_token_ids must be a list of token ids")
        return name, [_cast("sampling_parameters", name, token, int) for token in value]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise RequestError(f"sampling_parameters: {name} must be a text or a list of texts")
    return "stop_words" if name == "stop" else name, value


def _cast(where: str, name: str, value: Any, kind: type) -> Any:
    """A number or flag that may have been sent as text."""
    if kind is bool:
        known = {"true": True, "false": False, True: True, False: False}
        key = value.lower() if isinstance(value, str) else value
        if isinstance(key, (str, bool)) and key in known:
            return known[key]
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = kind(value)
            if math.isfinite(number) and (kind is float or isinstance(value, str) or number == value):
                return number
        except (ValueError, OverflowError):
            pass
    raise RequestError(f"{where}: {name} {value!r} is not {'a flag' if kind is bool else 'a number'}")


def _json(name: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise RequestError(f"{name} has a key twice: {', '.join(key for key, _ in pairs)}")
        return found

    try:
        value = parse_json(text, object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate can be written in JSON, and in no text
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{name} is not valid JSON: {error}") from error
    return value


def parameter_tensors(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request's parameters as the tensors that would have said the same, each [1, 1].

    Raises:
        RequestError: see `Intake.prepare`.
    """
    fields: dict[str, Any] = {}
    _merge_parameters(fields, parameters)
    tensors = {}
    for name, value in fields.items():
        if name in (*STRINGS, *STRING_LISTS):
            tensors[name] = np.array([[(value if name in STRINGS else value[0]).encode()]], dtype=np.object_)
            continue
        value = value[0] if name in TOKEN_LISTS else value
        dtype = _DTYPES[input_type(name)]
        if issubclass(dtype, np.integer) and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            raise RequestError(f"{name} {value} is too large", f"give at most {np.iinfo(dtype).max}")
        tensors[name] = np.array([[value]], dtype=dtype)
    return tensors


def declared_inputs() -> Sequence[str]:
    """All names that a client may send."""
    return (*STRINGS, *STRING_LISTS, *TOKEN_LISTS, *FLAGS, *WHOLE_NUMBERS, *NUMBERS)


def input_type(name: str) -> str:
    """Returns what Triton calls the type of an input's elements."""
    if name in TOKEN_LISTS:
        return "INT32"
    if name in WHOLE_NUMBERS:
        return "UINT64" if name in ("seed", "random_seed") else "INT32"
    return "BOOL" if name in FLAGS else "FP32" if name in NUMBERS else "STRING"
