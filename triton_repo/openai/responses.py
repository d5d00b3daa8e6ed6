"""An answer in the shape of /v1/responses: whole, or as typed events.

It is made of a chat completion's chunks: what they say is told as items, a message or a call of a function each.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ssv.client.triton import Prompt, Reply, Settings
from ssv.triton_repo.openai.access_log import Access
from ssv.triton_repo.openai.errors import ApiError, json_bytes
from ssv.triton_repo.openai.responses_schema import ResponsesRequest
from ssv.triton_repo.openai.schema import DEFAULT_TEMPERATURE, ChatRequest
from ssv.triton_repo.openai.translation import Answer, Models

Event = dict[str, Any]


class ResponsesAnswer:
    """An answer in the making.

    Attributes:
        id: of the response.
        access: what the log will say.
        end: what a stream ends with, after its last event.
    """

    end = b""

    def __init__(
        self,
        body: ResponsesRequest,
        chat: ChatRequest,
        asked: Sequence[tuple[Prompt, Settings]],
        access: Access,
        models: Models,
    ) -> None:
        """Begins an answer.

        Args:
            chat: the chat completion that is asked for.
            asked: of the server.
        """
        self._body, self._answer, self.access = body, Answer(chat, asked, access, models), access
        self.id = f"resp_{secrets.token_hex(16)}"
        self._output: list[dict[str, Any]] = []
        self._number = 0
        self._status = "in_progress"
        self._error: dict[str, str] | None = None

    @staticmethod
    def encoded(event: Event) -> bytes:
        """An event as it is sent."""
        return b"event: " + event["type"].encode() + b"\ndata: " + json_bytes(event) + b"\n\n"

    def take(self, index: int, reply: Reply) -> list[Event]:
        """Takes the next reply; returns the events that it makes."""
        events: list[Event] = []
        if self._number == 0:
            events += [
                self._event(f"response.{kind}", response=self._response()) for kind in ("created", "in_progress")
            ]
        for chunk in self._answer.take(index, reply):
            (choice,) = chunk["choices"]
            if text := choice["delta"].get("content"):
                events += self._say(text)
            for call in choice["delta"].get("tool_calls", ()):
                events += [*self._close(), *self._call(call["id"], **call["function"])]
            if (reason := choice["finish_reason"]) is not None:
                self._status = "incomplete" if reason == "length" else "completed"
                events += self._close()
                events.append(self._event(f"response.{self._status}", response=self._response()))
        return events

    def whole(self) -> dict[str, Any]:
        """The response that is no stream."""
        return self._response()

    def closing(self) -> list[Event]:
        """The events after those of the last reply: none."""
        return []

    def failed(self, error: ApiError) -> Event:
        """The event of an error in a stream that has begun."""
        self._status, self._error = "failed", {"code": "server_error", "message": str(error.detail)}
        for item in self._output:
            item["status"] = "completed" if item["status"] == "completed" else "incomplete"
        return self._event("response.failed", response=self._response())

    # Items

    def _say(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None:
            message = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant"}
            events.append(self._added({**message, "status": "in_progress", "content": []}))
            self._output[-1]["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            events.append(self._of_text("response.content_part.added", part={**self._part}))
        self._part["text"] += text
        events.append(self._of_text("response.output_text.delta", delta=text, logprobs=[]))
        return events

    def _close(self) -> list[Event]:
        """Ends the message that is being said, if one is."""
        if self._open is None:
            return []
        events = [
            self._of_text("response.output_text.done", text=self._part["text"], logprobs=[]),
            self._of_text("response.content_part.done", part={**self._part}),
        ]
        # What was cut off is its last item.
        return [*events, self._done("incomplete" if self._status == "incomplete" else "completed")]

    def _call(self, call_id: str, name: str, arguments: str) -> list[Event]:
        call = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": call_id, "name": name}
        events = [self._added({**call, "arguments": "", "status": "in_progress"})]
        events.append(self._of_item("response.function_call_arguments.delta", delta=arguments))
        events.append(self._of_item("response.function_call_arguments.done", arguments=arguments, name=name))
        self._output[-1]["arguments"] = arguments
        return [*events, self._done("completed")]

    @property
    def _open(self) -> dict[str, Any] | None:
        last = self._output[-1] if self._output else None
        return last if last is not None and last["status"] == "in_progress" else None

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._output[-1]["content"][0]
        return part

    # Events

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _added(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        told = {name: [] if name == "content" else value for name, value in item.items()}
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=told)

    def _done(self, status: str) -> Event:
        self._output[-1]["status"] = status
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item={**self._output[-1]})

    def _of_item(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, **fields)

    def _of_text(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)

    # The response

    def _response(self) -> dict[str, Any]:
        body = self._body
        is_over = self._status in ("completed", "incomplete")
        more = self._answer.whole() if is_over else {}
        choice: Any = body.tool_choice
        given = body.text.format if body.text is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._answer.created,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [{**item} for item in self._output],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            "text": {
                "format": {"type": "text"} if given is None else given.model_dump(exclude_none=True, by_alias=True)
            },
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": _usage(more["usage"]) if is_over else None,
            "user": body.user,
            "metrics": more.get("metrics"),
            "ssv": more.get("ssv"),
        }


def _usage(counted: dict[str, Any]) -> dict[str, Any]:
    """Usage of a chat completion under the names of /v1/responses."""
    cached = counted["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }
