"""A bundle's tokenizer: text to token ids, with or without the chat template, and back. Imports no torch.

May import: ssv.runtime.request, .text, .tokenizer_files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.runtime.request import RequestError, SamplingParams
from ssv.runtime.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT_TOKENS = 8
"""Of a prompt's end, which the first token of a continuation is decoded with."""

# Stands in a rendered conversation for the text of a control token that somebody wrote: a private character that no template touches.
_FIRST_MARK = 0x100000


class BundleTokenizer:
    """Attributes:
    inner: a `FileTokenizer`, or what `transformers` makes of a tokenizer without a tokenizer.json.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._backend: Tokenizer | None = getattr(inner, "backend", None) or getattr(inner, "backend_tokenizer", None)
        self._plain: dict[bool, Tokenizer] = {}
        self._control: dict[int, str] | None = None
        self._answer_begins: tuple[int, ...] | None = None

    @classmethod
    def load(cls, bundle: Path | str) -> BundleTokenizer:
        folder = Path(bundle) / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            from ssv.runtime.tokenizer_files import FileTokenizer

            return cls(FileTokenizer.load(folder))
        from transformers import AutoTokenizer  # imports torch, and takes seconds

        return cls(AutoTokenizer.from_pretrained(folder))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is to be continued: what the tokenizer puts before a text, such as BOS, if the text has it not
        itself, and nothing behind it. Control tokens written in it are control tokens, as in llama-server and vLLM: such a prompt
        is where clients render a chat template themselves.

        Raises:
            RequestError: it is empty, or no text.
        """
        if not text:
            raise RequestError("the prompt is empty")
        _check_text(text)
        whole, own = self.inner.encode(text), self.inner.encode(text, add_special_tokens=False)
        added = len(whole) - len(own)
        before: list[int] = next((whole[:n] for n in range(added + 1) if whole[n : n + len(own)] == own), [])
        return tuple(own if own[: len(before)] == before else [*before, *own])

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, up to where the assistant answers.

        The control tokens are the template's alone: written in a message they are text.

        Args:
            messages: each with "role" and "content".

        Raises:
            RequestError: there is none, the last is empty, one is no text, or the template refuses them.
        """
        if not messages or not messages[-1]["content"].strip():
            raise RequestError("the prompt is empty")
        for message in messages:
            for value in message.values():
                _check_text(value)
        marks = _Marks("".join(value for message in messages for value in message.values()))
        safe = [
            {key: marks.put(value, self._control_spans(value)) for key, value in message.items()}
            for message in messages
        ]
        text = self._render(safe)
        if not marks.texts:
            return tuple(self.inner.encode(text, add_special_tokens=False))
        return tuple(self._encode_marked(text, marks))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.inner.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text_stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> TextStream:
        """The text of a request's output."""
        return TextStream(
            self.decode,
            params.stop,
            stop_ids=self.stop_ids(params.stop),
            context=self.context(prompt_ids),
        )

    def stop_ids(self, stop: Iterable[str]) -> frozenset[int]:
        """Tokens that end an output because a stop string is their text: special ones, which the output's text leaves out."""
        if self._backend is None or not (wanted := set(stop)):
            return frozenset()
        return frozenset(token for token, text in self._special().items() if text in wanted)

    def context(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The end of a prompt that its continuation's text depends on; nothing where an answer begins, which is a text of its own."""
        begins = self._where_answers_begin()
        if (
            not prompt_ids
            or prompt_ids[-1] in self._special()
            or (begins and tuple(prompt_ids[-len(begins) :]) == begins)
        ):
            return ()
        return tuple(prompt_ids[-CONTEXT_TOKENS:])

    # --- control tokens ---------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return str(self.inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
        except Exception as error:  # whatever the template's author lets it raise
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error

    def _special(self) -> dict[int, str]:
        """Texts of the special tokens that are found in text, by id."""
        if self._backend is None:
            return {}
        if self._control is None:
            added = self._backend.get_added_tokens_decoder()
            self._control = {token: entry.content for token, entry in added.items() if entry.special}
        return self._control

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        """Control tokens that encoding finds in a text: id, start and end."""
        if self._backend is None or not (special := self._special()):
            return []
        encoding = self._backend.encode(text, add_special_tokens=False)
        found = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in special:
                written = text[start:end]
                start += len(written) - len(written.lstrip())
                end = start + len(written.strip())
                # What is unknown becomes <unk>, and is no control token for that.
                if text[start:end].lower() == special[token].lower():
                    found.append((token, start, end))
        return found

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        return [(start, end) for _, start, end in self._found(text)]

    def _encode_marked(self, text: str, marks: _Marks) -> list[int]:
        """Encodes between the template's control tokens, with what the marks stand for as text."""
        assert self._backend is not None
        encoding = self._backend.encode(text, add_special_tokens=False)
        special = self._special()
        ids: list[int] = []
        begin, segment = 0, 0
        bounds = [n for n, token in enumerate(encoding.ids) if token in special]
        for n in [*bounds, len(encoding.ids)]:
            end = encoding.offsets[n][0] if n < len(encoding.ids) else len(text)
            piece = text[segment:end]
            if marks.are_in(piece):
                ids += self._encode_plain(marks.restore(piece), at_start=segment == 0)
            else:
                ids += encoding.ids[begin:n]  # as it is with all around it
            if n < len(encoding.ids):
                ids.append(encoding.ids[n])
                segment = encoding.offsets[n][1]
            begin = n + 1
        return ids

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        """Encodes control tokens as the text they are written with."""
        tokenizer = self._plain_tokenizer(at_start)
        ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
        found = self._control_spans(text)
        if not any(token in self._special() and self._special()[token] in text for token in ids):
            return ids
        # The vocabulary itself has the control token as a word: cut in two, it is none.
        pieces, last = [], 0
        for start, _ in found:
            pieces.append(text[last : start + 1])
            last = start + 1
        ids = []
        for piece in [*pieces, text[last:]]:
            ids += self._plain_tokenizer(at_start and not ids).encode(piece, add_special_tokens=False).ids
        if wrong := [
            self._special()[token] for token in ids if token in self._special() and len(self._special()[token]) == 1
        ]:
            raise RequestError(f"{wrong[0]!r} is a control token of this model: leave it out of the messages")
        return ids

    def _plain_tokenizer(self, at_start: bool) -> Tokenizer:
        """The tokenizer without control tokens, for a text or for one that goes on after something else."""
        from tokenizers import Tokenizer

        assert self._backend is not None
        if at_start not in self._plain:
            data = json.loads(self._backend.to_str())
            if not at_start:
                _without_prefix(data.get("pre_tokenizer"))
            self._plain[at_start] = Tokenizer.from_str(json.dumps(data))
            self._plain[at_start].encode_special_tokens = True
        return self._plain[at_start]

    def _where_answers_begin(self) -> tuple[int, ...]:
        """The last tokens of every question in the chat template."""
        if self._answer_begins is None:
            mark = "question"
            try:
                text = self._render([{"role": "user", "content": mark}]).rpartition(mark)[2]
                self._answer_begins = tuple(self.inner.encode(text, add_special_tokens=False)) if text.strip() else ()
            except RequestError:
                self._answer_begins = ()
        return self._answer_begins


class _Marks:
    """Private characters that stand for pieces of text, each for one."""

    def __init__(self, text: str) -> None:
        self.texts: dict[str, str] = {}
        self._used = frozenset(text)

    def put(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """The text with marks in the place of spans."""
        out, last = [], 0
        for start, end in spans:
            out += [text[last:start], self._mark(text[start:end])]
            last = end
        return "".join([*out, text[last:]])

    def are_in(self, text: str) -> bool:
        return any(mark in text for mark in self.texts)

    def restore(self, text: str) -> str:
        return "".join(self.texts.get(char, char) for char in text)

    def _mark(self, text: str) -> str:
        for mark, known in self.texts.items():
            if known == text:
                return mark
        code = _FIRST_MARK
        while chr(code) in self._used or chr(code) in self.texts:
            code += 1
        self.texts[chr(code)] = text
        return chr(code)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X} at {error.start}), which UTF-8 cannot write: "
            "send whole characters"
        ) from error


def _without_prefix(entry: Any) -> None:
    """Lets a pre-tokenizer's description put no space before what is not the first of a text."""
    if isinstance(entry, dict):
        if entry.get("type") == "Metaspace" and entry.get("prepend_scheme") == "first":
            entry["prepend_scheme"] = "never"
        for part in entry.get("pretokenizers", ()):
            _without_prefix(part)
