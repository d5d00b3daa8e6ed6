"""Conversations and texts to token ids, with the control tokens where they belong: in what the chat template writes.

No token of these arises from what a message says, however it is spelt (a tokenizer's normalizer may make `<` of a
full-width one), and neither from where two messages, or a message and the template, meet:

* special tokens, and end tokens that are added tokens;
* other added tokens that the template writes around the turns of a conversation;
* other added tokens that stand in the template's text, such as `<tool_call>`: an assistant's message may have those,
  since the model itself writes them as text.

Words (letters, digits and spaces alone) that were added to a vocabulary are no structure, unless they are special or
end an answer. What would be such a token is encoded as the text that it is written with. All other texts get the ids
that they have in `transformers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from ssv.model.chat_template import ASSISTANT, OTHERS, TEMPLATE, Said, origin_of
from ssv.support.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that messages may have. Templates write roles where they write control tokens, so no others are taken."""

_PROBE = "question"
_Place = Literal[
    "start", "after", "within"
]  # of a text in another: at its start, behind a control token, behind other text
_Span = tuple[int, int, int]  # a token's id, and from where to where the text has it


class ConversationError(UserError):
    """A conversation that cannot be encoded; the message says what to change."""


class ConversationEncoder:
    """Turns a model's conversations into token ids."""

    def __init__(
        self, backend: Tokenizer, render: Callable[..., str], template: str | None, end_tokens: Iterable[int] = ()
    ) -> None:
        """Prepares the encoder of a model.

        Args:
            render: text of messages in the chat template, with `add_generation_prompt`; see `ssv.model.chat_template`.
            template: its source.
            end_tokens: ids of tokens that end an answer.
        """
        self._backend, self._render, self._template = backend, render, template or ""
        self._ends = frozenset(end_tokens)
        self._variants: dict[tuple[Any, ...], Tokenizer] = {}

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        Args:
            messages: each with "role" and "content"; "tool_calls" and what else a template knows may be deeper.
            tools: descriptions of functions for the template; None for none.
            add_generation_prompt: whether the template begins the assistant's answer.
            continue_final_message: whether it ends with the text of the last message, without what the template has
                behind it.
            variables: others for the template.

        Raises:
            ConversationError: a role is unknown, a text cannot be written without a control token, or the template
                leaves out the last message that is to be continued.
            Exception: whatever the template raises.
        """
        for message in messages:
            check_role(message["role"])
        self._check_names([messages, tools, variables])
        more = {} if tools is None else {"tools": _said_by(tools, OTHERS)}
        if variables:
            more["variables"] = _said_by(variables, OTHERS)
        if continue_final_message:
            messages = with_mark(messages)
        said = [_said(message) for message in messages]
        text = self._render(said, add_generation_prompt=add_generation_prompt, **more)
        return self.encode(up_to_mark(text) if continue_final_message else text)

    def _check_names(self, value: Any) -> None:
        """Refuses control tokens in names of fields, which templates write where nobody follows them."""
        for name in _names_in(value):
            wrong = next((self._added[t].content for t in self._structure if self._added[t].content in name), None)
            if wrong is not None:
                raise ConversationError(f"a field's name has the control token {wrong!r}", "leave it out")

    def text_ids(self, text: str) -> list[int]:
        """Token ids of what a user says, without a template around it.

        Raises:
            ConversationError: it cannot be written without a control token.
        """
        return self.encode(Said(text, OTHERS))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that knows where its characters are from.

        Raises:
            ConversationError: it cannot be written without a control token.
        """
        origin, plain = origin_of(text), str.__str__(text)
        encoding = self._backend.encode(plain, add_special_tokens=False)
        if not any(origin) or not self._wrong(encoding, plain, origin):
            return list(encoding.ids)
        ids: list[int] = []
        last: _Span | None = None
        for token in [*self._written(plain, origin), None]:
            start, end = last[2] if last else 0, token[1] if token else len(plain)
            if last and self._added[last[0]].rstrip:
                start = max(start, end - len(plain[start:end].lstrip()))
            if token and self._added[token[0]].lstrip:
                end = start + len(plain[start:end].rstrip())
            ids += self._between(plain[start:end], origin[start:end], "after" if last else "start")
            ids += [token[0]] if token else []
            last = token
        return ids

    # --- which tokens -----------------------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self._backend.get_added_tokens_decoder())

    @cached_property
    def _forbidden(self) -> dict[int, frozenset[int]]:
        """Tokens that must not arise where something was written, by who wrote it."""
        special = {token for token, entry in self._added.items() if entry.special or token in self._ends}
        structure = self._structure
        around = (special | self._around_turns()) & structure
        inside = {token for token in structure if self._added[token].content in self._template}
        return {TEMPLATE: frozenset(), ASSISTANT: frozenset(around), OTHERS: frozenset(around | inside)}

    @cached_property
    def _structure(self) -> set[int]:
        return structure_ids(self._added) | (self._ends & self._added.keys())

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for what the vocabulary lacks."""
        text = getattr(self._backend.model, "unk_token", None)
        return None if text is None else self._backend.token_to_id(text)

    def _around_turns(self) -> set[int]:
        """Added tokens that the template writes in conversations of the usual roles."""
        found: set[int] = set()
        every = [["user", "assistant", "user"], *([role] for role in ROLES), *(["user", role] for role in ROLES)]
        for roles in every:
            messages = [_said({"role": role, "content": _PROBE}) for role in roles]
            try:
                text = self._render(messages, add_generation_prompt=True)
            except Exception:  # noqa: S112 - a template need not take every role
                continue
            found |= {token for token, _, _ in self._written(str.__str__(text), origin_of(text))}
        return found

    def _tokens(self, encoding: Encoding, text: str) -> list[_Span]:
        """Added tokens of an encoding, without the whitespace that some of them take along."""
        found = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            entry = self._added.get(token)
            if entry is None:
                continue
            if entry.rstrip:
                end = start + len(text[start:end].rstrip())
            if entry.lstrip:
                start = end - len(text[start:end].lstrip())
            # What is unknown becomes <unk>, and was not written for that.
            if token != self._unknown or text[start:end].strip().lower() == entry.content.strip().lower():
                found.append((token, start, end))
        return found

    def _wrong(self, encoding: Encoding, text: str, origin: bytes) -> list[_Span]:
        """Control tokens that are not the template's alone."""
        found = self._tokens(encoding, text)
        return [one for one in found if one[0] in self._forbidden[max(origin[one[1] : one[2]], default=TEMPLATE)]]

    def _written(self, text: str, origin: bytes) -> list[_Span]:
        """Added tokens in what the template alone writes."""
        found, start = [], 0
        while start < len(text):
            end = next((n for n in range(start, len(text)) if bool(origin[n]) != bool(origin[start])), len(text))
            if origin[start] == TEMPLATE:
                piece = text[start:end]
                tokens = self._tokens(self._backend.encode(piece, add_special_tokens=False), piece)
                found += [(token, start + first, start + last) for token, first, last in tokens]
            start = end
        return found

    # --- what messages say ------------------------------------------------------------------------------------------

    def _between(self, text: str, origin: bytes, place: _Place) -> list[int]:
        """Encodes what stands between two control tokens of the template."""
        who = max(origin, default=TEMPLATE)
        ids: list[int] = []
        waiting: list[tuple[str, bytes, _Place]] = [(text, origin, place)]
        while waiting:
            text, origin, place = waiting.pop()
            for forbidden in (frozenset[int](), self._forbidden[who]):
                encoding = self._variant(place, forbidden).encode(text, add_special_tokens=False)
                wrong = self._wrong(encoding, text, origin)
                if not wrong:
                    break
            else:
                # The vocabulary has it as a word of its own: cut in two, it is none.
                wrong = [one for one in wrong if one[0] != self._unknown]
            if not wrong:
                ids += encoding.ids
                continue
            cuts = [start + 1 for _, start, end in wrong if end - start > 1]
            if not cuts:
                name = self._added[wrong[0][0]].content
                raise ConversationError(f"{name!r} is a control token of this model", "leave it out of the messages")
            bounds = [0, *cuts, len(text)]
            pieces = [(text[a:b], origin[a:b], "within" if a else place) for a, b in pairwise(bounds)]
            waiting += reversed(pieces)
        return ids

    def _variant(self, place: _Place, forbidden: frozenset[int]) -> Tokenizer:
        """The tokenizer for a text in a place, which does not look for some added tokens."""
        parts = {name: _described(getattr(self._backend, name)) for name in ("normalizer", "pre_tokenizer")}
        changed = {name: _without_prefix(part, place) for name, part in parts.items()}
        if changed == parts and not forbidden:
            return self._backend
        key = (json.dumps(changed), forbidden)
        if key not in self._variants:
            data = json.loads(self._backend.to_str()) | changed
            # Special ones are those that the library can leave alone.
            for entry in data["added_tokens"]:
                entry["special"] = entry["id"] in forbidden
            self._variants[key] = Tokenizer.from_str(json.dumps(data))
            self._variants[key].encode_special_tokens = True
        return self._variants[key]


def check_role(role: str) -> None:
    """Checks that a role is a usual one.

    Raises:
        ConversationError: it is not.
    """
    if role not in ROLES:
        raise ConversationError(f"role {role!r} is unknown", f"give one of {', '.join(ROLES)}")


_MARK = "\U00100001"
"""Private: ends the last message while a template writes it."""


def with_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A conversation whose last message ends with a mark, for `up_to_mark`."""
    *others, last = messages
    return [*others, {**last, "content": f"{last['content']}{_MARK} "}]


def up_to_mark(text: str) -> str:
    """What a template wrote, up to the end of the last message; a `Said` stays one.

    Raises:
        ConversationError: the template left the message out.
    """
    end = text.rfind(_MARK)
    if end < 0:
        raise ConversationError("the model's chat template leaves the last message out", "let it not be continued")
    # Where the template has cut off the space behind the mark, it does so to what messages end with.
    return text[:end] if text.startswith(" ", end + 1) else text[:end].rstrip()


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose texts know that a message said them; its role counts as the template's."""
    origin = ASSISTANT if message["role"] == "assistant" else OTHERS
    return {key: str(value) if key == "role" else _said_by(value, origin) for key, value in message.items()}


def _said_by(value: Any, origin: int) -> Any:
    """The same value, whose texts know their origin."""
    if isinstance(value, str):
        return Said(value, origin)
    if isinstance(value, Mapping):
        return {key: _said_by(each, origin) for key, each in value.items()}
    return [_said_by(each, origin) for each in value] if isinstance(value, list | tuple) else value


def _names_in(value: Any) -> set[str]:
    """Names of all fields of a value."""
    if isinstance(value, Mapping):
        return {*value, *_names_in(list(value.values()))}
    return set[str]().union(*map(_names_in, value)) if isinstance(value, list | tuple) else set()


def structure_ids(added: Mapping[int, Any]) -> set[int]:
    """Those of a tokenizer's added tokens that can be structure: special ones, and others that are no words."""
    return {token for token, entry in added.items() if entry.special or not _is_word(entry.content)}


def _is_word(text: str) -> bool:
    """Whether an added token is an ordinary word, or whitespace, which a template writes as it does any text."""
    return all(char.isalnum() or char.isspace() for char in text)


def _described(part: Any) -> Any:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _without_prefix(entry: Any, place: _Place) -> Any:
    """A description that puts no space before what does not begin a text, where it stands elsewhere."""
    if place == "start" or not isinstance(entry, dict):
        return entry
    kind = entry.get("type")
    for name in ("pretokenizers", "normalizers"):
        if name in entry:
            kept = [_without_prefix(part, place) for part in entry[name]]
            return {**entry, name: [part for part in kept if part is not None]}
    if kind == "Metaspace" and (place == "within" or entry.get("prepend_scheme") == "first"):
        return {**entry, "prepend_scheme": "never"}
    if place == "within" and kind == "ByteLevel":
        return {**entry, "add_prefix_space": False}
    return None if place == "within" and kind == "Prepend" else entry
