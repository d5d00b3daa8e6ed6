"""Conversations and functions in a body: messages, calls, and what may be called."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from ssv.support.json_text import parse_json
from ssv.triton_repo.openai.errors import ApiError
from ssv.triton_repo.openai.fields import CleanBody, Strict, only, refuse

MAX_TOOLS = 128
"""As OpenAI has it."""


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


class Function(Strict):
    """What is said of a function."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that may be called."""

    type: Literal["function"]
    function: Function


class _NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    """The function that is to be called."""

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
