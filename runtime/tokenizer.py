"""A bundle's tokenizer: text to token ids, with or without the chat template, and back. Imports no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.model.chat_template import OWN_VARIABLES
from ssv.model.control_tokens import ConversationEncoder, ConversationError, check_role, up_to_mark, with_mark
from ssv.runtime.grammar import Grammars
from ssv.runtime.request import RequestError, SamplingParams
from ssv.runtime.text import TextStream
from ssv.runtime.tools import knows_tools, told_in_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT_TOKENS = 8
"""Tokens at a prompt's end that the first token of its continuation is decoded with."""


# What callers give elsewhere, or not at all.
_NO_VARIABLES = OWN_VARIABLES | {"continue_final_message", "conversation", "chat_template", "tokenize"}


class BundleTokenizer:
    """A bundle's tokenizer: prompts and conversations to token ids.

    Attributes:
        inner: a `FileTokenizer`.
    """

    def __init__(self, inner: Any, end_tokens: Iterable[int] = ()) -> None:
        """Wraps a tokenizer.

        Args:
            inner: a `FileTokenizer`, or a tokenizer of `transformers` that has one of the library tokenizers in it.
            end_tokens: ids of tokens that end an answer.
        """
        if (backend := getattr(inner, "backend_tokenizer", None)) is not None:
            from ssv.runtime.tokenizer_files import FileTokenizer

            inner = FileTokenizer(backend, inner.special_tokens_map, inner.chat_template)
        self.inner, self._ends = inner, frozenset(end_tokens)
        self._backend: Tokenizer | None = getattr(inner, "backend", None)
        self._encoder = (
            None
            if self._backend is None
            else ConversationEncoder(self._backend, self.render, inner.chat_template, self._ends)
        )
        self._control: dict[int, str] | None = None
        self._answer_begins: tuple[int, ...] | None = None

    @classmethod
    def load(
        cls, bundle: Path | str, end_tokens: Iterable[int] = (), chat_template: Path | None = None
    ) -> BundleTokenizer:
        """Reads a bundle's tokenizer.

        Args:
            end_tokens: see `__init__`.
            chat_template: see `FileTokenizer.load`.

        Raises:
            TokenizerFileError: see `FileTokenizer.load`.
        """
        from ssv.runtime.tokenizer_files import FileTokenizer

        return cls(FileTokenizer.load(Path(bundle) / "tokenizer", chat_template), end_tokens)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is to be continued.

        What the tokenizer puts before a text, such as BOS, stands before it if the text has it not itself, and nothing
        stands behind it. Control tokens written in it are control tokens, as in llama-server and vLLM: such a prompt is
        where clients render a chat template themselves.

        Raises:
            RequestError: it is empty, or no text.
        """
        if not isinstance(text, str):
            raise RequestError(f"{reprlib.repr(text)} must be text", "`chat_ids` takes the messages of a conversation")
        if not text:
            raise RequestError("the prompt is empty")
        _check_text(text)
        whole, own = self.inner.encode(text), self.inner.encode(text, add_special_tokens=False)
        added = len(whole) - len(own)
        before: list[int] = next((whole[:n] for n in range(added + 1) if whole[n : n + len(own)] == own), [])
        return tuple(own if own[: len(before)] == before else [*before, *own])

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, up to where the assistant answers.

        The control tokens are the template's alone: written in a message, in whatever way, they are text; which tokens
        those are, says `ssv.model.control_tokens`.

        Args:
            messages: each with "role" and "content"; an assistant's may have "tool_calls".
            tools: descriptions of functions, as OpenAI has them. A template that knows none is told in the messages'
                texts (`ssv.runtime.tools`).
            add_generation_prompt: whether the template begins the assistant's answer.
            continue_final_message: whether the answer goes on with the text of the last message.
            variables: others that the template may read; what it does not read changes nothing.

        Raises:
            RequestError: there is none, one is no message, the last is empty, one is no text, a role is unknown, the
                template refuses them, the last is to be continued and calls functions, or a variable is not the
                caller's to set.
        """
        if isinstance(messages, str) or not all(map(_is_message, messages)):
            raise RequestError(
                f"{reprlib.repr(messages)} must be a list of messages",
                'give each a role and a text, as {"role": "user", "content": "Hello"}',
            )
        last = messages[-1] if messages else {}
        if not (last and (last["content"].strip() or last.get("tool_calls") or last["role"] == "tool")):
            raise RequestError("the prompt is empty")
        if continue_final_message and (last.get("tool_calls") or not last["content"]):
            raise RequestError("continue_final_message: the last message has no text to be continued", "give it one")
        for name in variables or ():
            if name in _NO_VARIABLES or name.endswith("_token") or not name.isidentifier():
                raise RequestError(f"chat_template_kwargs: {name[:64]!r} cannot be set there", "leave it out")
        _check_texts([list(messages), tools, dict(variables or {})])
        template = getattr(self.inner, "chat_template", None)
        if (tools or any("tool_calls" in message for message in messages)) and not knows_tools(template):
            messages, tools = told_in_texts(messages, tools), None
        try:
            if self._encoder is None:
                for message in messages:
                    check_role(message["role"])
                more = {"variables": variables} if variables else {}
                given = with_mark(messages) if continue_final_message else messages
                text = self.render(given, add_generation_prompt, **more)
                text = up_to_mark(text) if continue_final_message else text
                return tuple(self.inner.encode(text, add_special_tokens=False))
            return tuple(
                self._encoder.chat_ids(
                    messages,
                    tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    variables=variables,
                )
            )
        except ConversationError as error:
            raise RequestError(error.what, error.cure) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **more: Any) -> str:
        """Text of a conversation in the model's chat template, control tokens included.

        To decode it, `chat_ids` is the safe way: in a text, a message's own control tokens look like the template's.

        Raises:
            RequestError: the template refuses the messages.
        """
        try:
            return str(
                self.inner.apply_chat_template(
                    list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **more
                )
            )
        except Exception as error:  # whatever the template's author lets it raise
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error

    @property
    def bos_id(self) -> int | None:
        """The token that stands before a text that begins; None of a tokenizer that names none."""
        name = self.inner.special_tokens.get("bos_token")
        return None if name is None or self._backend is None else self._backend.token_to_id(name)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones and end tokens that were added to the vocabulary."""
        if self._backend is not None:
            # The library leaves out what is marked as special.
            special = self._special()
            if not special.keys().isdisjoint(token_ids):
                token_ids = [token for token in token_ids if token not in special]
        return self.inner.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def text_bytes(self) -> Callable[[int], bytes] | None:
        """What a token adds to what `decode` gives, where this is UTF-8 of its tokens' bytes; None of a tokenizer
        whose texts are more than that."""
        if self._backend is None or not self.inner.is_bytes:
            return None
        return _TextBytes(self.inner.text_bytes, self._special()).__getitem__

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in a text, which may be part of a character; a special token's own name."""
        if self._backend is None:
            return str(self.inner.decode([token])).encode()
        return bytes(self.inner.token_bytes(token))

    def is_special(self, token: int) -> bool:
        """Whether texts leave a token out."""
        return token in self._special()

    def grammars(self, vocab_size: int, eos_ids: Sequence[int]) -> Grammars | None:
        """Grammars of outputs; None of a tokenizer that is not the library's."""
        return None if self._backend is None else Grammars(self._backend.to_str, vocab_size, eos_ids)

    def text_stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> TextStream:
        """The text of a request's output."""
        return TextStream(
            self.decode,
            params.stop,
            token_bytes=self.text_bytes,
            stop_ids=self.stop_ids(params.stop),
            context=self.context(prompt_ids),
        )

    def stop_ids(self, stop: Iterable[str]) -> frozenset[int]:
        """Tokens that end an output because a stop string is their text.

        They are special ones, which the output's text leaves out.
        """
        if self._backend is None or not (wanted := set(stop)):
            return frozenset()
        return frozenset(token for token, text in self._special().items() if text in wanted)

    def word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words, as they are written at the beginning of a text and after a space: what an output must
        not have (`SamplingParams.bad_token_ids`). A word may be written in yet other tokens, which nobody sees to.

        Raises:
            RequestError: one is no text.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            _check_text(word)
            for text in (word, f" {word.lstrip()}"):
                found[tuple(self.inner.encode(text, add_special_tokens=False))] = None
        return tuple(ids for ids in found if ids)

    def context(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The end of a prompt that its continuation's text depends on.

        It is empty where an answer begins, since an answer is a text of its own.
        """
        begins = self._where_answers_begin()
        if (
            not prompt_ids
            or prompt_ids[-1] in self._special()
            or (begins and tuple(prompt_ids[-len(begins) :]) == begins)
        ):
            return ()
        return tuple(prompt_ids[-CONTEXT_TOKENS:])

    # --- control tokens ---------------------------------------------------------------------------------------------

    def _special(self) -> dict[int, str]:
        """Texts of the special tokens that are found in text, and of such end tokens, by id."""
        if self._backend is None:
            return {}
        if self._control is None:
            added = self._backend.get_added_tokens_decoder()
            self._control = {
                token: entry.content for token, entry in added.items() if entry.special or token in self._ends
            }
        return self._control

    def _where_answers_begin(self) -> tuple[int, ...]:
        """The last tokens of every question in the chat template."""
        if self._answer_begins is None:
            mark = "question"
            try:
                text = self.render([{"role": "user", "content": mark}]).rpartition(mark)[2]
                self._answer_begins = tuple(self.inner.encode(text, add_special_tokens=False)) if text.strip() else ()
            except RequestError:
                self._answer_begins = ()
        return self._answer_begins


class _TextBytes(dict[int, bytes]):
    """What tokens add to a text, by id, once it has been asked for."""

    def __init__(self, text_bytes: Callable[[int], bytes], left_out: Container[int]) -> None:
        super().__init__()
        self._text_bytes, self._left_out = text_bytes, left_out

    def __missing__(self, token: int) -> bytes:
        self[token] = found = b"" if token in self._left_out else self._text_bytes(token)
        return found


def _check_texts(value: Any) -> None:
    """Checks all texts of a value, wherever they stand."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, Mapping):
        _check_texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            _check_texts(each)


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(given.get(name), str) for name in ("role", "content"))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X} at {error.start}), which UTF-8 "
            "cannot write",
            "send whole characters",
        ) from error
