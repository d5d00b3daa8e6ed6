"""A target that has been read: network, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssv.builder.tokenizer import check_vocabulary, conversation_encoder, end_tokens, load_tokenizer, text_digest
from ssv.bundle.manifest import digest, file_entry
from ssv.model.checkpoint import DecoderSpec, Weights, checkpoint_files, load_checkpoint
from ssv.model.control_tokens import ConversationEncoder
from ssv.model.decoder import Decoder
from ssv.support.files import read_text

WINDOW = 512
"""Tokens that are run at a time when a model is calibrated."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target that has been read.

    Attributes:
        decoder: fp32 on the CPU.
        tokenizer: of `transformers`.
        sha256: of the checkpoint's files that the model was made of.
        eos_token_ids: of all tokens that end an answer, ascending.
        text_sha256: of what decides between text and tokens (tokenizer, chat template, end tokens), by content.
    """

    spec: DecoderSpec
    weights: Weights
    decoder: Decoder
    tokenizer: Any
    sha256: str
    eos_token_ids: list[int]
    text_sha256: str

    def on(self, device: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
        """The network for building steps: `decoder` itself on the CPU, on CUDA a copy in a type."""
        if torch.device(device).type == "cpu":
            return self.decoder
        return Decoder.from_weights(self.spec, self.weights).to(device, dtype)

    def conversation_encoder(self) -> ConversationEncoder:
        """Turns conversations into token ids, as a served bundle does."""
        return conversation_encoder(self.tokenizer, self.eos_token_ids)


def load_target(path: Path, tokenizer_path: Path | None = None) -> Target:
    """Reads a checkpoint and its tokenizer, which lies beside it unless a folder is given.

    Raises:
        CheckpointError: see `load_checkpoint`, `load_tokenizer`, `end_tokens`, `check_vocabulary`.
    """
    spec, weights = load_checkpoint(path)
    tokenizer = load_tokenizer(path, tokenizer_path)
    ends = end_tokens(path, tokenizer)
    check_vocabulary(path, tokenizer, ends, spec.vocab_size)
    return Target(
        spec=spec,
        weights=weights,
        decoder=Decoder.from_weights(spec, weights),
        tokenizer=tokenizer,
        sha256=digest(file_entry(file).sha256 for file in checkpoint_files(path)),
        eos_token_ids=ends,
        text_sha256=text_digest(tokenizer, ends),
    )


def openings_of(file: Path | None, target: Target) -> list[list[int]]:
    """Token ids of the openings in a file, one a line.

    Control tokens in them are text, as they are in the messages that the openings begin.

    Raises:
        UserError: the file cannot be read, or an opening cannot be written without a control token.
    """
    if file is None:
        return []
    encoder = target.conversation_encoder()
    # Not splitlines: U+2028, U+0085 and others of their kind may stand in a line.
    lines = [line.replace("\\n", "\n") for line in read_text(file).split("\n")]
    return [encoder.text_ids(line) for line in lines if line]


def prompt_tokens(target: Target, prompts: Sequence[str], num_tokens: int) -> Tensor:
    """The first tokens of prompts in the model's chat template, one after the other in windows of 512, int64 [B, T]."""
    encoder = target.conversation_encoder()
    ids: list[int] = []
    for prompt in prompts:
        if len(ids) < num_tokens:
            ids += encoder.chat_ids([{"role": "user", "content": prompt}])
    ids = ids[:num_tokens]
    window = min(WINDOW, len(ids))
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
