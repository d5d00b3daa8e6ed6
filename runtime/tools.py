"""Tools: how a model is told of them and how it calls them, in the form that its chat template has.

* hermes (Qwen, Hermes): `<tool_call>` line feed `{"name": ..., "arguments": ...}` line feed `</tool_call>`, one after
  the other;
* smollm2: `<tool_call>[{"name": ..., "arguments": ...}, ...]</tool_call>`; also that of templates that know no tools;
* llama3: `{"name": ..., "parameters": ...}` and nothing else;
* mistral: `[TOOL_CALLS]` and a list as above, or a function's name and its arguments.

Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssv.runtime.grammar import JSON_STYLE

Form = Literal["hermes", "smollm2", "llama3", "mistral"]

MOST_CALLS = 8
"""In an answer whose calls a grammar writes."""

_BEGIN, _END = "<tool_call>", "</tool_call>"
_UNSEEN = ("[TOOL_CALLS]", "<|python_tag|>")
"""Control tokens before a call: a text has them where the vocabulary does not call them special."""


def form_of(template: str | None) -> Form:
    """The form of a chat template."""
    if not knows_tools(template) or template is None or f"{_BEGIN}[" in template:
        return "smollm2"
    if _BEGIN in template:
        return "hermes"
    return "mistral" if "[TOOL_CALLS]" in template else "llama3"


def knows_tools(template: str | None) -> bool:
    """Whether a chat template tells a model of tools."""
    return template is not None and re.search(r"\btools\b", template) is not None


def told_in_texts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages whose texts say what a template that knows no tools leaves out: the tools, and calls."""
    told = []
    for message in messages:
        said = {name: message[name] for name in ("role", "content")}
        if calls := message.get("tool_calls"):
            listed = json.dumps([call["function"] for call in calls], ensure_ascii=False)
            said["content"] = f"{said['content']}{_BEGIN}{listed}{_END}"
        told.append(said)
    if not tools:
        return told
    text = (
        f"You can call functions. Their signatures are <tools>{json.dumps(list(tools), ensure_ascii=False)}</tools>. "
        f'To call some, answer with {_BEGIN}[{{"name": NAME, "arguments": {{...}}}}, ...]{_END} and nothing else.'
    )
    first = told[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def call_grammar(form: Form, tools: Sequence[Mapping[str, Any]], *, most: int = MOST_CALLS) -> str:
    """A grammar in Lark's form of an answer that calls some of these functions, and says nothing else.

    Args:
        tools: as OpenAI has them, at least one.
        most: calls, at most.
    """
    arguments = "parameters" if form == "llama3" else "arguments"
    rules = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = {"x-guidance": JSON_STYLE, **(function.get("parameters") or {"type": "object"})}
        begin = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{arguments}": ')
        rules.append(f'call_{i}: {begin} arguments_{i} "}}"\narguments_{i}: %json {json.dumps(schema)}')
    begin, between, end = {
        "hermes": (f"{_BEGIN}\n", f"\n{_END}\n{_BEGIN}\n", f"\n{_END}"),
        "smollm2": (f"{_BEGIN}[", ", ", f"]{_END}"),
        "llama3": ("", "; ", ""),
        "mistral": ("[", ", ", "]"),
    }[form]
    more = f" ({json.dumps(between)} call){{0,{most - 1}}}" if most > 1 else ""
    around = [json.dumps(text) if text else "" for text in (begin, end)]
    start = f"start: {around[0]} call{more} {around[1]}"
    return "\n".join([start, f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}", *rules])


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function.

    Attributes:
        arguments: JSON, as the model wrote it or nearly so.
    """

    name: str
    arguments: str


class CallParser:
    """Tells calls from text, as an answer comes. What cannot be read as a call is text."""

    def __init__(self, form: Form, names: Sequence[str]) -> None:
        """Reads an answer from its beginning.

        Args:
            names: of the functions.
        """
        self._names = frozenset(names)
        self._read = self._read_tags if form in ("hermes", "smollm2") else self._read_bare
        self._held = ""
        self._is_call: bool | None = None  # of an answer that is nothing but calls; None while nobody knows
        self._num_calls, self._is_behind_call = 0, False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Takes text; returns text and calls that can leave now."""
        self._held += text
        return self._read(False)

    def flush(self) -> tuple[str, list[Call]]:
        """The rest, at the end of the answer."""
        return self._read(True)

    # --- between tags -----------------------------------------------------------------------------------------------

    def _read_tags(self, is_over: bool) -> tuple[str, list[Call]]:
        texts: list[str] = []
        calls: list[Call] = []
        while True:
            before, tag, rest = self._held.partition(_BEGIN)
            if not tag:
                keep = 0 if is_over else _overlap(self._held, _BEGIN)
                texts.append(self._behind_calls(self._held[: len(self._held) - keep]))
                self._held = self._held[len(self._held) - keep :]
                return "".join(texts), calls
            texts.append(self._behind_calls(before))
            inside, end, after = rest.partition(_END)
            if not end and not is_over:
                self._held = tag + rest
                return "".join(texts), calls
            found = self._calls_of(inside)
            if found is None:
                texts.append(tag + inside + end)
            else:
                calls += found
                self._is_behind_call = True
            self._held = after

    def _behind_calls(self, text: str) -> str:
        """A text without the white space that stands between calls, which nobody wants."""
        text = text.lstrip() if self._is_behind_call else text
        self._is_behind_call = self._is_behind_call and not text
        return text

    def _calls_of(self, text: str) -> list[Call] | None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
        return [call for call in calls if call is not None] if all(calls) else None

    # --- nothing but calls ------------------------------------------------------------------------------------------

    def _read_bare(self, is_over: bool) -> tuple[str, list[Call]]:
        if self._is_call is None:
            self._is_call = self._begins_call(is_over)
        if self._is_call is None:
            return "", []
        calls: list[Call] = []
        while self._is_call and (found := self._next_calls()):
            calls += found
        self._num_calls += len(calls)
        if self._is_call and not is_over:
            return "", calls
        text, self._held = self._held, ""
        return ("" if self._num_calls and not text.strip(" \n;,") else text), calls

    def _begins_call(self, is_over: bool) -> bool | None:
        """Whether the answer begins as a call does; None as long as it may."""
        text = self._bare()
        if not text:
            return False if is_over else None
        if text[0] in "{[":
            return True
        if is_over or not any(name.startswith(text) for name in (*self._names, *_UNSEEN)):
            return any(text.startswith(name) for name in self._names)
        return None

    def _bare(self) -> str:
        """What is held, without what stands before and between calls."""
        text = self._held.lstrip(" \n;,")
        for unseen in _UNSEEN:
            text = text.removeprefix(unseen).lstrip()
        return text

    def _next_calls(self) -> list[Call]:
        """The next calls that are complete, taken from what is held."""
        text = self._bare()
        name = re.match(r"([\w-]+)(?:\[ARGS\])?\s*(?=\{)", text)
        start = name.end() if name is not None else 0
        try:
            found, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return []
        if name is not None:
            calls = [Call(name[1], text[start:end])] if name[1] in self._names else []
        else:
            read = [_call(each) for each in (found if isinstance(found, list) else [found])]
            calls = [call for call in read if call is not None and call.name in self._names]
            calls = calls if len(calls) == len(read) else []
        if calls:
            self._held = text[end:]
        return calls


def _call(found: Any) -> Call | None:
    """A call that has been read; None of what is none."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of a text that a tag begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
