"""What the OpenAI API takes: the bodies of its requests, checked, and what they ask of the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from ssv.client.triton import Prompt, Settings
from ssv.runtime.grammar import guide_of
from ssv.runtime.request import MAX_BIAS, MAX_LOGPROBS, MAX_PENALTY, RequestError
from ssv.runtime.tools import MOST_CALLS, Form, call_grammar
from ssv.support.json_text import parse_json
from ssv.triton_repo.openai.errors import ApiError, Caller, field_name

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP = 64
"""Each is looked for at every token; OpenAI takes 4."""

MAX_TOOLS = 128
"""As OpenAI has it."""

MAX_CHOICES = 128
"""Of one request: each is a request of its own to the server."""


def refuse(message: str) -> PydanticCustomError:
    """What a validator raises for a value that is known and not supported."""
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def only(*neutral: Any) -> AfterValidator:
    """A field of which only values that change nothing are supported."""

    def check(value: Any, info: ValidationInfo) -> Any:
        # True is 1 in Python.
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return value
        but = f" but for {' and '.join(json.dumps(one) for one in neutral)}" if neutral else ""
        raise refuse(f"{info.field_name} is not supported{but}: leave it out")

    return AfterValidator(check)


def _joined(content: Any, info: ValidationInfo) -> Any:
    """The text of a message's parts; none beside calls is an empty one."""
    if content is None:
        if info.data.get("tool_calls"):
            return ""
        raise PydanticCustomError("missing", "missing")
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise refuse(f"a content part of type {str(kind)[:40]!r} is not supported: give text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise refuse('a content part must be {"type": "text", "text": TEXT}, and nothing else')
    return "\n".join(part["text"] for part in content)


def _prompts(prompt: Any) -> Any:
    """A list of prompts, whatever was given."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int))
    return [prompt] if is_one else prompt


def _biases(given: Any) -> Any:
    """Numbers by token, of an object whose names are the tokens."""
    if not isinstance(given, dict):
        return given
    for token in given:
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
            raise PydanticCustomError("token_id", "{token} is no token id", {"token": repr(token)[:40]})
    return {int(token): bias for token, bias in given.items()}


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _cleaned(value: Any, *path: str | int, keeps_nulls: bool = False) -> Any:
    """A body without what is null, which says the same as what is left out.

    Args:
        keeps_nulls: whether it stands in a JSON schema, where null is a value as others.

    Raises:
        ApiError: 400, text that is no text: half of a surrogate pair can be written in JSON.
    """
    if isinstance(value, dict):
        for name in value:
            _check_text(name, path)
        return {
            name: _cleaned(held, *path, name, keeps_nulls=keeps_nulls or name in _SCHEMAS)
            for name, held in value.items()
            if held is not None or keeps_nulls
        }
    if isinstance(value, list):
        return [_cleaned(held, *path, index, keeps_nulls=keeps_nulls) for index, held in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
    return value


_SCHEMAS = ("schema", "parameters", "guided_json", "json")
"""Fields that are JSON schemas: of an output, of a function, and of vLLM's `structured_outputs`."""


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        param = field_name(path) or None
        what = (
            f"{param or 'a name'} is not valid Unicode: character {error.start} is half of a surrogate pair, "
            "leave it out"
        )
        raise ApiError(400, what, param, "invalid_value") from error


class Strict(BaseModel):
    """An object of a body."""

    # Text that could be read as a number is not one, and what is unknown is wrong.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class _JsonSchema(Strict):
    """OpenAI's; whether it is strict changes nothing: the output always has the form."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class _ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _CalledFunction(Strict):
    name: str
    arguments: str


class _ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: int | None = None

    def as_template_has_it(self) -> dict[str, Any]:
        """With the arguments as an object: templates write them as JSON themselves."""
        arguments: Any = self.function.arguments
        try:
            read = parse_json(arguments)
        except ValueError:
            read = None
        arguments = read if isinstance(read, dict) else arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class _Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that may be called."""

    type: Literal["function"]
    function: _Function


class _NamedFunction(Strict):
    name: str


class _NamedTool(Strict):
    type: Literal["function"]
    function: _NamedFunction


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    content: Annotated[str, BeforeValidator(_joined), Field(validate_default=True)] = None  # type: ignore[assignment]
    name: str | None = None
    # In what a client got as an answer and sends back.
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None

    def as_template_has_it(self) -> dict[str, Any]:
        """The message as the server takes it."""
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.role == "assistant" and self.tool_calls:
            said["tool_calls"] = [call.as_template_has_it() for call in self.tool_calls]
        if self.role == "tool":
            more = {"tool_call_id": self.tool_call_id, "name": self.name}
            said |= {name: value for name, value in more.items() if value is not None}
        return said


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]
_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
_NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Int32 = Annotated[int, Field(lt=2**31)]
_StopText = Annotated[str, Field(min_length=1)]
_StopTexts = Annotated[list[_StopText], BeforeValidator(_listed), Field(max_length=MAX_STOP)]


class CleanBody(Strict):
    """A body in which null is as if it were left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        try:
            return _cleaned(body)
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply: send it flat") from error


class ApiRequest(CleanBody):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[_Int32, Field(ge=1)] | None = None
    min_tokens: Annotated[_Int32, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[_Int32, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[int, _Bias], BeforeValidator(_biases), Field(max_length=1024)] | None = None
    stop: _StopTexts | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    bad_words: Annotated[list[str], BeforeValidator(_listed), Field(max_length=MAX_STOP)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    ssv_tier: str | None = None
    ssv_max_divergence: Annotated[float, Field(ge=0, le=1)] | None = None
    ssv_timeout: Annotated[float, Field(gt=0)] | None = None
    latency_bound_ms: Annotated[float, Field(gt=0)] | None = None
    ssv_fates: bool | None = None
    response_format: _ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[Any, only(1)] = None

    def settings(self, tier: str | None, form: Form) -> Settings:
        """What is asked of the server for one choice, but for its seed.

        Args:
            form: in which the model calls functions.
        """
        return Settings(
            tier=tier,
            max_divergence=self.ssv_max_divergence,
            chat=False,
            max_tokens=self.output_limit(),
            min_tokens=self.min_tokens,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or None,
            bad_words=self.bad_words or (),
            guide=self.guide(),
            logprobs=self.num_logprobs(),
            fates=bool(self.ssv_fates),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            timeout=self.ssv_timeout,
            latency_bound_ms=self.latency_bound_ms,
            user=self.user or self.safety_identifier,
        )

    def asked(self, tier: str | None, form: Form) -> list[tuple[Prompt, Settings]]:
        """What is asked of the server for each choice: those of a prompt one after the other, each with the next seed
        where there is one.

        Args:
            form: see `settings`.

        Raises:
            ApiError: 400, they are too many.
        """
        settings, prompts, count = self.settings(tier, form), self.prompts(), self.n or 1
        if len(prompts) * count > MAX_CHOICES:
            what = f"{len(prompts)} prompts with n {count} are more than {MAX_CHOICES} choices: ask in several requests"
            raise ApiError(400, what, "n", "invalid_value")
        seed = settings.seed
        seeded = [replace(settings, seed=None if seed is None else (seed + k) % 2**64) for k in range(count)]
        return [(prompt, each) for prompt in prompts for each in seeded]

    def guide(self) -> tuple[str, str] | None:
        """The form of the output, as kind and guide.

        Raises:
            ApiError: 400, it is given twice, or is none.
        """
        guided = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        forms: dict[str, Any] = {f"guided_{name}": {name: value} for name, value in guided.items() if value is not None}
        if self.structured_outputs is not None:
            forms["structured_outputs"] = self.structured_outputs
        form = self.response_format
        if form is not None and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema is not None else None
            if form.type == "json_schema" and schema is None:
                what = "response_format of type json_schema lacks json_schema.schema: give it"
                raise ApiError(400, what, "response_format", "invalid_value")
            forms["response_format"] = {"json_object": True} if form.type == "json_object" else {"json": schema}
        if len(forms) > 1:
            what = f"{' and '.join(forms)} are both given: give one form of the output"
            raise ApiError(400, what, next(iter(forms)), "invalid_value")
        if not forms:
            return None
        ((name, given),) = forms.items()
        try:
            return guide_of(given)
        except RequestError as error:
            raise ApiError(400, f"{name}: {error}", name, "invalid_value") from error

    def prompts(self) -> Sequence[Prompt]:
        """The prompts that are answered."""
        raise NotImplementedError

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens stand beside each token, with their log-probabilities; None for none of these."""
        raise NotImplementedError

    def echoes(self) -> bool:
        """Whether the prompt stands before the text."""
        return False

    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that an answer may call."""
        return []

    def output_limit(self) -> int | None:
        """Tokens of the output, at most; None leaves it to the server."""
        raise NotImplementedError

    def usage(self) -> StreamOptions:
        """The chunks of a stream that have the usage in them.

        Raises:
            ApiError: 400, it is no stream.
        """
        if self.stream_options is not None and not self.stream:
            what = "stream_options without stream: give stream true, or leave them out"
            raise ApiError(400, what, "stream_options", "invalid_value")
        return self.stream_options or StreamOptions()

    def caller(self) -> Caller:
        """How it names things."""
        raise NotImplementedError


class TemplateOptions(CleanBody):
    """How a conversation goes through the chat template, as in vLLM."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template(self) -> dict[str, Any]:
        """What is given of it, as `Settings.template` has it.

        Raises:
            ApiError: 400, they contradict each other.
        """
        if self.continue_final_message and self.add_generation_prompt:
            what = "continue_final_message and add_generation_prompt are both true: give one of them"
            raise ApiError(400, what, "continue_final_message", "invalid_value")
        given = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "variables": self.chat_template_kwargs or None,
        }
        return {name: value for name, value in given.items() if value is not None}


class ChatRequest(TemplateOptions, ApiRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[_Int32, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    logprobs: bool | None = None
    top_logprobs: _NumLogprobs | None = None
    modalities: Annotated[Any, only(["text"])] = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None

    def prompts(self) -> Sequence[Prompt]:
        return [[message.as_template_has_it() for message in self.messages]]

    def settings(self, tier: str | None, form: Form) -> Settings:
        settings = replace(super().settings(tier, form), template=self.template() or None)
        if not (tools := self.callable_tools()):
            return settings
        settings = replace(settings, tools=tools)
        if self.tool_choice in (None, "auto"):
            return settings
        if settings.guide is not None:
            what = "tool_choice asks for a call, and another field for an output of another form: give one of them"
            raise ApiError(400, what, "tool_choice", "invalid_value")
        if isinstance(self.tool_choice, _NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == self.tool_choice.function.name]
        is_one = isinstance(self.tool_choice, _NamedTool) or self.parallel_tool_calls is False
        grammar = call_grammar(form, tools, most=1 if is_one else MOST_CALLS)
        return replace(settings, guide=("ebnf_grammar", grammar))

    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that may be called, as OpenAI has them.

        Raises:
            ApiError: 400, `tool_choice` asks for one that is not there, or one is there twice.
        """
        tools, choice = self.tools or [], self.tool_choice
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools: two functions have the same name", "tools", "invalid_value")
        wanted = choice.function.name if isinstance(choice, _NamedTool) else None
        if (wanted is not None and wanted not in names) or (choice == "required" and not names):
            what = f"tool_choice asks for {wanted or 'a call'}, and tools have {', '.join(names) or 'none'}"
            raise ApiError(400, what, "tool_choice", "invalid_value")
        return [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools]

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                what = "top_logprobs without logprobs: give logprobs true, or leave it out"
                raise ApiError(400, what, "top_logprobs", "invalid_value")
            return None
        return self.top_logprobs or 0

    def output_limit(self) -> int | None:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            what = "max_tokens and max_completion_tokens differ: give one of them"
            raise ApiError(400, what, "max_tokens", "invalid_value")
        return given.pop() if given else None

    def caller(self) -> Caller:
        return Caller(True, "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens")


class CompletionRequest(ApiRequest):
    """Body of /v1/completions."""

    prompt_list: Annotated[
        list[str] | list[_TokenPrompt], BeforeValidator(_prompts), Field(alias="prompt", min_length=1)
    ]
    echo: bool | None = None
    suffix: Annotated[Any, only()] = None
    logprobs: _NumLogprobs | None = None

    def settings(self, tier: str | None, form: Form) -> Settings:
        settings = super().settings(tier, form)
        if not self.echo or (self.logprobs is None and isinstance(self.prompt_list[0], str)):
            return settings
        # The prompt's text is that of its tokens, if it was given as these.
        return replace(settings, prompt_logprobs=self.logprobs or 0)

    def prompts(self) -> Sequence[Prompt]:
        return self.prompt_list

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def echoes(self) -> bool:
        return bool(self.echo)

    def output_limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def caller(self) -> Caller:
        return Caller(False)
