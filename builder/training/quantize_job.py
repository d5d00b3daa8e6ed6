"""From a model on disk to its quantized checkpoint on disk.

Reads the model, finds text to calibrate on, quantizes, trains if asked to, and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ssv.builder.config import QuantizeConfig
from ssv.builder.target import WINDOW, Target, load_target, openings_of, prompt_tokens
from ssv.builder.training.corpus import chat_pieces, write_conversations
from ssv.builder.training.quantize import quantize_draft, quantize_target, save_quantized_draft, save_quantized_target
from ssv.builder.training.recover import Recovery, recover
from ssv.bundle.manifest import MANIFEST_NAME
from ssv.model.checkpoint import CheckpointError
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft
from ssv.support.files import whole
from ssv.support.progress import Report
from ssv.support.prompts import read_prompts


def load_source(source: Path) -> tuple[Target, Path | None]:
    """The target of a bundle or of a checkpoint, and the bundle's draft."""
    if (source / MANIFEST_NAME).is_file():
        return load_target(source / "target", source / "tokenizer"), source / "draft" / "draft.safetensors"
    return load_target(source), None


def quantize(
    target: Target, draft_file: Path | None, config: QuantizeConfig, out: Path, device: str, report: Report
) -> None:
    """Writes a quantized target (a folder) or draft (a file).

    Args:
        draft_file: for the draft's role.
        out: must not be there yet.

    Raises:
        CheckpointError: `out` exists, or the draft is damaged or not the target's.
        QuantizeError: see `ssv.builder.training.quantize`.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists", "choose another place")
    if config.role == "draft" and draft_file is None:
        raise CheckpointError("there is no draft beside a plain checkpoint", "give a bundle")
    stage = f"quantize {config.role} {config.precision}"
    decoder = target.on(device, torch.float32)
    tokens_BT = calibration_tokens(target, decoder, config)
    dtype = target.weights["model.embed_tokens.weight"].dtype
    dtype = dtype if dtype == torch.float16 else torch.bfloat16
    report(stage, 0, 2, f"calibrating on {tokens_BT.numel()} tokens")
    if config.role == "draft":
        assert draft_file is not None
        draft = load_draft(draft_file, decoder).to(device)
        student = quantize_draft(draft, decoder, tokens_BT, config.precision, group_size=config.group_size)
        report(stage, 1, 2, "writing")
        with _whole(out) as part:
            save_quantized_draft(student, part, dtype)
    else:
        made = quantize_target(
            decoder, tokens_BT, config.precision, group_size=config.group_size, lm_head=config.lm_head
        )
        if config.recover_tokens:
            original = target.on(device)
            pieces, openings = chat_pieces(target.tokenizer), openings_of(config.openings_file, target)
            settings = Recovery(tokens=config.recover_tokens, learning_rate=config.recover_learning_rate)
            made = recover(original, made, pieces, openings, settings, report)
        report(stage, 1, 2, "writing")
        with _whole(out) as part:
            save_quantized_target(made.cpu(), part, target.eos_token_ids, dtype, target.tokenizer.save_pretrained)
    report(stage, 2, 2, "done")


def calibration_tokens(target: Target, decoder: Decoder, config: QuantizeConfig) -> Tensor:
    """Text to calibrate on, int64 [B, T].

    It is the user's prompts in the model's chat template, or what the target writes itself.
    """
    if config.prompts_file is None:
        rows = -(-config.tokens // WINDOW)
        openings = openings_of(config.openings_file, target)
        written = write_conversations(
            decoder, chat_pieces(target.tokenizer), openings, rows=rows, window=WINDOW, seed=1
        )
        return written.tokens.long()
    return prompt_tokens(target, read_prompts(config.prompts_file), config.tokens)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """See `ssv.support.files.whole`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as part:
            yield part
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror})", "choose another place") from error
