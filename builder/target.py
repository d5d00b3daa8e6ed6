"""A target that has been read: network, weights, tokenizer.

May import: ssv.builder.checkpoint, .decoder, .manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssv.builder.checkpoint import CheckpointError, DecoderSpec, Weights, load_checkpoint
from ssv.builder.decoder import Decoder
from ssv.builder.manifest import digest, file_entry

WINDOW = 512
"""Tokens that are run at a time when a model is calibrated."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target that has been read.

    Attributes:
        decoder: fp32 on the CPU.
        sha256: of the checkpoint's files.
    """

    spec: DecoderSpec
    weights: Weights
    decoder: Decoder
    tokenizer: Any
    sha256: str

    def on(self, device: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
        """The network for building steps: `decoder` itself on the CPU, on CUDA a copy in a type."""
        if torch.device(device).type == "cpu":
            return self.decoder
        return Decoder.from_weights(self.spec, self.weights).to(device, dtype)

    @property
    def eos_token_ids(self) -> list[int]:
        return [int(self.tokenizer.eos_token_id)]


def load_target(path: Path, tokenizer_path: Path | None = None) -> Target:
    """Reads a checkpoint and its tokenizer, which lies beside it unless a folder is given.

    Raises:
        CheckpointError: see `load_checkpoint`; or no tokenizer beside the weights.
    """
    from transformers import AutoTokenizer

    spec, weights = load_checkpoint(path)
    try:
        if tokenizer_path is not None:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        elif path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be read ({error})") from error
    if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        raise CheckpointError(f"{path}: the tokenizer lacks an end-of-sequence token or a chat template")
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    return Target(
        spec, weights, Decoder.from_weights(spec, weights), tokenizer, digest(file_entry(f).sha256 for f in files)
    )


def openings_of(file: Path | None, tokenizer: Any) -> list[list[int]]:
    """Token ids of the openings in a file, one a line."""
    if file is None:
        return []
    lines = [line.replace("\\n", "\n") for line in file.read_text().splitlines()]
    return [tokenizer.encode(line, add_special_tokens=False) for line in lines if line]


def prompt_tokens(target: Target, prompts: Sequence[str], num_tokens: int) -> Tensor:
    """The first tokens of prompts in the model's chat template, one after the other in windows of 512, int64 [B, T]."""
    texts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    ids = target.tokenizer.encode("".join(texts), add_special_tokens=False)[:num_tokens]
    window = min(WINDOW, len(ids))
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
