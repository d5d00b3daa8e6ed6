"""A tokenizer as `transformers` saves it, read without `transformers`, whose import takes seconds, 150 MB and torch.

tokenizer.json holds all that encoding and decoding depend on; tokenizer_config.json names the special tokens that a
chat template may use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ssv.support.errors import UserError
from ssv.support.json_text import read_json_object

if TYPE_CHECKING:
    from ssv.model.chat_template import ChatTemplate

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFileError(UserError):
    """Files that are no tokenizer; the message names the file and the cure."""


class FileTokenizer:
    """What `ssv.runtime.tokenizer` needs of a `transformers` tokenizer.

    Attributes:
        backend: of the library tokenizers.
        special_tokens: texts of those that have a name, such as "bos_token".
        chat_template: None if there is none.
    """

    def __init__(self, backend: Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        self.backend, self.special_tokens, self.chat_template = backend, dict(special_tokens), chat_template

    @classmethod
    def load(cls, folder: Path, chat_template: Path | None = None) -> FileTokenizer:
        """Reads a folder with a tokenizer.json.

        Args:
            chat_template: file with the template that is used instead of the folder's.

        Raises:
            TokenizerFileError: a file is missing or damaged.
        """
        path = folder / "tokenizer.json"
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerFileError(
                f"{path} cannot be read ({error})", "build the bundle again with this machine's version of tokenizers"
            ) from error
        # What training cut and padded, a prompt is not.
        backend.no_truncation()
        backend.no_padding()
        config = _read_config(folder / "tokenizer_config.json")
        named = {name: _text_of(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None}
        template = _read_template(folder, config) if chat_template is None else _read_text(chat_template)
        return cls(backend, named, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of tokens.

        As the library has it, but for tokens of single bytes that are not UTF-8: there it gives U+FFFD for each byte of
        the whole run, also for those of whole characters before the wrong one, which have been sent by then. Here, as
        in byte-level tokenizers, whole characters stay and the others are U+FFFD.
        """
        assert not clean_up_tokenization_spaces, "cleaning up changes the text of the tokens before"
        if self._byte_tokens.isdisjoint(token_ids):
            return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        left_out = self._special_ids if skip_special_tokens else frozenset[int]()
        kept = [token for token in token_ids if token not in left_out]
        texts = [text for text in map(self.backend.id_to_token, kept) if text is not None]
        return str(self.backend.decoder.decode(_whole_characters(texts)))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for: its bytes in a text, a special token's own; nothing of one that is not known."""
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        if token in self._added_ids:
            return text.encode()
        if self._is_byte_level:
            return b"".join(_BYTE_OF[char] if char in _BYTE_OF else char.encode() for char in text)
        if (match := _BYTE.fullmatch(text)) is not None and token in self._byte_tokens:
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    @property
    def is_bytes(self) -> bool:
        """Whether a text is no more than its tokens' bytes one after another: `text_bytes`."""
        decoder = self.backend.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    def text_bytes(self, token: int) -> bytes:
        """What a token adds to a text where `is_bytes`: as the library's decoder has it, which takes tokens with other
        characters than those that bytes are written as for what they are."""
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        return b"".join(map(_BYTE_OF.__getitem__, text)) if _BYTE_OF.keys() >= set(text) else text.encode()

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation.

        It knows what of it the messages say if their texts do (`ssv.model.chat_template.Said`).

        Raises:
            ValueError: there is no template.
            jinja2.TemplateError: it does not compile, or refuses the conversation.
        """
        assert not tokenize, "the text is to be encoded without special tokens"
        return self._template.render(
            conversation,
            self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
        )

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        """Tokens that a decoder makes bytes of, if it does so."""
        decoder = self.backend.decoder
        if decoder is None or "ByteFallback" not in decoder.__getstate__().decode():
            return frozenset()
        ids = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and "ByteLevel" in decoder.__getstate__().decode()

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    @cached_property
    def _template(self) -> ChatTemplate:
        from ssv.model.chat_template import ChatTemplate  # jinja2

        if self.chat_template is None:
            raise ValueError("the model has no chat template")
        return ChatTemplate(self.chat_template)


def _byte_characters() -> dict[str, bytes]:
    """The characters that byte-level tokenizers write bytes as: printable ones as themselves, the others from U+0100 on
    (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 256 + n for n, byte in enumerate(others)}
    return {chr(code): bytes([byte]) for byte, code in codes.items()}


_BYTE_OF = _byte_characters()
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _whole_characters(tokens: Sequence[str]) -> list[str]:
    """Texts of tokens, with U+FFFD in the place of bytes that are no character."""
    found: list[str] = []
    for is_byte, group in groupby(tokens, key=lambda token: _BYTE.fullmatch(token) is not None):
        run = list(group)
        while is_byte and run:
            try:
                bytes(int(token[3:5], 16) for token in run).decode()
            except UnicodeDecodeError as error:
                found += [*run[: error.start], "\ufffd"]
                run = run[error.end :]
            else:
                break
        found += run
    return found


def read_chat_template(folder: Path, chat_template: Path | None = None) -> str | None:
    """The chat template of a folder with a tokenizer; None if there is none.

    Args:
        chat_template: see `FileTokenizer.load`.

    Raises:
        TokenizerFileError: a file is damaged.
    """
    if chat_template is not None:
        return _read_text(chat_template)
    return _read_template(folder, _read_config(folder / "tokenizer_config.json"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a mark of the byte order is none of the template's text
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerFileError(f"{path} cannot be read ({error})", "give a text file in UTF-8") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json_object(path, TokenizerFileError, "build the bundle again")


def _text_of(token: Any) -> str:
    """Text of a special token, which may stand with how it is matched."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of the file of its own, or else of the config, where several may have names."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found
