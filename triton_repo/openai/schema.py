"""What /v1/chat/completions and /v1/completions take: their bodies, checked, and what they ask of the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ssv.client.triton import Prompt, Settings
from ssv.runtime.grammar import guide_of
from ssv.runtime.request import RequestError
from ssv.runtime.tools import MOST_CALLS, Form, call_grammar
from ssv.triton_repo.openai.conversation import MAX_TOOLS, Message, NamedTool, TemplateOptions, Tool
from ssv.triton_repo.openai.errors import ApiError, Caller
from ssv.triton_repo.openai.fields import AnsweredRequest, Int32, NumLogprobs, Strict, TokenId, only

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 128
"""Of one request: each is a request of its own to the server."""

_TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]


class StreamOptions(Strict):
    """What a stream is to tell beside the answer."""

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


class ApiRequest(AnsweredRequest):
    """What both kinds of requests have."""

    max_tokens: Annotated[Int32, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    ssv_fates: bool | None = None
    response_format: _ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[Any, only(1)] = None
    # vLLM's, at the values that it has where nothing is said.
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None
    priority: Annotated[Any, only(0)] = None
    return_token_ids: Annotated[Any, only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None

    def settings(self, tier: str | None, form: Form) -> Settings:
        """What is asked of the server for one choice, but for its seed.

        Args:
            form: in which the model calls functions.
        """
        return Settings(
            tier=tier,
            max_divergence=self.ssv_max_divergence,
            policy=self.ssv_policy,
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

    def forms(self) -> dict[str, dict[str, Any]]:
        """The forms that are given for the output, as vLLM has them, by field.

        Raises:
            ApiError: 400, one lacks what it is made of.
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
        return forms

    def guide(self) -> tuple[str, str] | None:
        """The form of the output, as kind and guide.

        Raises:
            ApiError: 400, it is given twice, or is none.
        """
        forms = self.forms()
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

    def only_echoes(self) -> bool:
        """Whether the prompt is all that is wanted."""
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


class ChatRequest(TemplateOptions, ApiRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Int32, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    # vLLM's, at the values that they have where nothing is said; no answer has a reasoning of its own.
    echo: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None
    include_reasoning: bool | None = None

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
        if isinstance(self.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == self.tool_choice.function.name]
        is_one = isinstance(self.tool_choice, NamedTool) or self.parallel_tool_calls is False
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
        wanted = choice.function.name if isinstance(choice, NamedTool) else None
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
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return Caller(True, limit, form=next(iter(self.forms()), "tools"))


class CompletionRequest(ApiRequest):
    """Body of /v1/completions."""

    prompt: _TokenPrompt | Annotated[list[str] | list[_TokenPrompt], Field(min_length=1)] | str
    max_tokens: Annotated[Int32, Field(ge=0)] | None = None
    echo: bool | None = None
    suffix: Annotated[Any, only()] = None
    logprobs: NumLogprobs | None = None
    add_special_tokens: Annotated[Any, only(True)] = None

    def settings(self, tier: str | None, form: Form) -> Settings:
        settings = super().settings(tier, form)
        if not self.echo or (self.logprobs is None and isinstance(self.prompts()[0], str)):
            return settings
        # The prompt's text is that of its tokens, if it was given as these.
        return replace(settings, prompt_logprobs=self.logprobs or 0)

    def prompts(self) -> Sequence[Prompt]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt  # type: ignore[list-item, return-value]

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def echoes(self) -> bool:
        return bool(self.echo)

    def only_echoes(self) -> bool:
        return self.echoes() and self.max_tokens == 0

    def output_limit(self) -> int:
        if self.max_tokens == 0 and not self.echo:
            what = "max_tokens 0 without echo asks for nothing: give echo true, or more tokens"
            raise ApiError(400, what, "max_tokens", "invalid_value")
        # Who wants the prompt alone, for its log-probabilities, has one token decoded that nobody sees.
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)

    def caller(self) -> Caller:
        return Caller(False, form=next(iter(self.forms()), "response_format"))
