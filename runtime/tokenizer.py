"""A bundle's tokenizer: text to token ids, with or without the chat template, and back. Imports no torch.

May import: ssv.runtime.request, .tokenizer_files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssv.runtime.request import RequestError


class BundleTokenizer:
    """Attributes:
    inner: a `FileTokenizer`, or what `transformers` makes of a tokenizer without a tokenizer.json.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @classmethod
    def load(cls, bundle: Path | str) -> BundleTokenizer:
        folder = Path(bundle) / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            from ssv.runtime.tokenizer_files import FileTokenizer

            return cls(FileTokenizer.load(folder))
        from transformers import AutoTokenizer  # imports torch, and takes seconds

        return cls(AutoTokenizer.from_pretrained(folder))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is to be continued.

        Raises:
            RequestError: it is empty.
        """
        if not text:
            raise RequestError("the prompt is empty")
        return tuple(self.inner.encode(text))

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, up to where the assistant answers.

        Args:
            messages: each with "role" and "content".

        Raises:
            RequestError: there is none, the last is empty, or the template refuses them.
        """
        if not messages or not messages[-1]["content"].strip():
            raise RequestError("the prompt is empty")
        try:
            text = self.inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever the template's author lets it raise
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return tuple(self.inner.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.inner.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
