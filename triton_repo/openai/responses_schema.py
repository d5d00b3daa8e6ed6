"""What /v1/responses takes: its body, checked, and the chat completion that asks for the same.

Nothing is kept between requests: who goes on with a conversation sends all of it. What would need memory, tools of
the server's own, or a model that reasons is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ssv.triton_repo.openai.conversation import MAX_TOOLS, Function
from ssv.triton_repo.openai.errors import ApiError, Caller
from ssv.triton_repo.openai.fields import AnsweredRequest, Int32, Strict, only, refuse
from ssv.triton_repo.openai.schema import ChatRequest

_TEXT_PARTS = ("input_text", "output_text", "text")


def _text(content: Any) -> Any:
    """The text of a list of parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise refuse(f"a content part of type {str(kind)[:40]!r} is not supported: give input_text")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("missing", "missing")
    return "\n".join(part["text"] for part in content)


_Text = Annotated[str, BeforeValidator(_text)]


class _Said(Strict):
    """A message: a caller's, or what an answer had as one."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text
    # In what a client got as an answer and sends back.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class _Call(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class _Result(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: _Text
    id: str | None = None
    status: str | None = None


_ITEMS: dict[str, type[Strict]] = {"message": _Said, "function_call": _Call, "function_call_output": _Result}


def _item(given: Any) -> Any:
    """An item of one of the kinds that are supported."""
    if not isinstance(given, dict):
        return given
    kind = given.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise refuse(f"an input item of type {str(kind)[:40]!r} is not supported: give {', '.join(_ITEMS)}")
    return _ITEMS[kind].model_validate(given)


_Item = Annotated[_Said | _Call | _Result, BeforeValidator(_item)]


def _tool(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type", "function") != "function":
        raise refuse(f"a tool of type {str(given['type'])[:40]!r} is not supported: give functions")
    return given


class _Tool(Function):
    type: Literal["function"]

    def as_chat_has_it(self) -> dict[str, Any]:
        function = self.model_dump(exclude_none=True, exclude={"type"})
        return {"type": "function", "function": function}


class _NamedTool(Strict):
    type: Literal["function"]
    name: str


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class _TextOptions(Strict):
    format: _Format | None = None
    verbosity: Annotated[Any, only("medium")] = None


class _StreamOptions(Strict):
    include_obfuscation: Annotated[Any, only(False)] = None


class ResponsesRequest(AnsweredRequest):
    """Body of /v1/responses. What it shares with chat completions has their names and meaning."""

    input: Annotated[str | list[_Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int32, Field(ge=1)] | None = None
    tools: Annotated[list[Annotated[_Tool, BeforeValidator(_tool)]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: _TextOptions | None = None
    stream_options: _StreamOptions | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Any, only(False)] = None
    background: Annotated[Any, only(False)] = None
    truncation: Annotated[Any, only("disabled")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    top_logprobs: Annotated[Any, only(0)] = None
    include: Annotated[Any, only([])] = None
    previous_response_id: Annotated[Any, only()] = None
    conversation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    reasoning: Annotated[Any, only({})] = None
    max_tool_calls: Annotated[Any, only()] = None
    context_management: Annotated[Any, only()] = None

    def chat(self) -> ChatRequest:
        """The chat completion that asks for the same.

        Raises:
            ApiError: 400, it asks for the form of a schema and has none.
        """
        body = self.model_dump(include=set(AnsweredRequest.model_fields), exclude_none=True)
        if self.logit_bias is not None:
            body["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        body |= {"messages": self._messages(), "max_completion_tokens": self.max_output_tokens}
        body |= {"parallel_tool_calls": self.parallel_tool_calls, "response_format": self._response_format()}
        if self.tools:
            body["tools"] = [tool.as_chat_has_it() for tool in self.tools]
        choice = self.tool_choice
        if isinstance(choice, _NamedTool):
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            body["tool_choice"] = choice
        return ChatRequest.model_validate(body)

    def caller(self) -> Caller:
        """How it names things."""
        return Caller(True, "max_output_tokens", "input", "tools" if self._response_format() is None else "text.format")

    def _response_format(self) -> dict[str, Any] | None:
        given = self.text.format if self.text is not None else None
        if given is None or given.type != "json_schema":
            return None if given is None else {"type": given.type}
        if given.schema_ is None:
            raise ApiError(400, "text.format of type json_schema lacks schema: give it", "text.format", "invalid_value")
        return {"type": "json_schema", "json_schema": {"schema": given.schema_}}

    def _messages(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        if self.instructions is not None:
            said.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*said, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, _Result):
                said.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            elif isinstance(item, _Said):
                said.append({"role": item.role, "content": item.content})
            else:
                # What an assistant said and its calls are one message in templates, and several items here.
                if not said or said[-1]["role"] != "assistant":
                    said.append({"role": "assistant", "content": ""})
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                said[-1].setdefault("tool_calls", []).append({"type": "function", **call})
        return said
