"""Trains Medusa's heads (Cai et al. 2024, arXiv:2401.10774) on what their target writes; the target stays as it is
(Medusa-1).

The label of a head is the target's distribution at the place that it guesses, along the text that was written,
restricted to the tokens that the LM head covers.

Shapes: B rows, T tokens of a training window, M = B * T, H hidden, U vocabulary of the target, V LM head rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssv.builder.config import HeadsConfig
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns
from ssv.builder.training.distill import SoftCrossEntropy
from ssv.builder.training.passes import CausalAttend
from ssv.builder.training.work import (
    Windows,
    claim,
    learning_rate,
    make_optimizers,
    require_room,
    restore_training,
    save_training,
    set_learning_rate,
    text_source,
    training_source,
    write_corpus,
)
from ssv.model.decoder import Decoder
from ssv.model.heads import Heads, heads_spec, save_heads, start_heads
from ssv.support.progress import Report

DECAY = 0.8
"""Weight of a head's loss, relative to the head before: the paper's."""


@dataclass(frozen=True, slots=True)
class HeadsResult:
    """Trained heads and what was seen of them on windows of the corpus that were kept apart.

    Attributes:
        agreement: per head, the share of the assistant's tokens where its argmax is the target's.
        tokens_written, tokens_trained: sizes, in tokens.
    """

    heads: Heads
    agreement: list[float]
    tokens_written: int
    tokens_trained: int


def distill_heads(
    target: Decoder,
    pieces: ChatPieces,
    turns: Turns,
    config: HeadsConfig,
    work: Path,
    report: Report,
    *,
    weights_sha256: str,
) -> HeadsResult:
    """Writes a corpus, trains heads on it and measures them.

    Arguments, what is kept in `work`, and errors are those of `distill`.
    """
    work.mkdir(parents=True, exist_ok=True)
    source = {"heads": True, "target": weights_sha256, "text": text_source(pieces, turns), **training_source(config)}
    claim(work, source)
    require_room(work, config)
    shards = write_corpus(target, pieces, turns, config, work, report)
    held_out = shards.pop()
    trainer = _Trainer(target, config, shards, work)
    trainer.run(report)
    return HeadsResult(
        heads=trainer.heads,
        agreement=measure_heads(target, trainer.heads, Conversations.load(held_out), config.batch_rows),
        tokens_written=config.rows * config.window * len(shards),
        tokens_trained=trainer.windows.num_steps * config.batch_rows * config.window,
    )


class _Trainer:
    def __init__(self, target: Decoder, config: HeadsConfig, shards: list[Path], work: Path) -> None:
        self.target, self.config, self.windows = target, config, Windows(shards, config)
        self.state_path = work / "train.safetensors"
        spec = heads_spec(target.spec, config.num_heads, config.num_layers, config.head_size)
        device = target.embed.weight.device
        token_ids = self.windows.most_frequent(target.spec.vocab_size, config.head_size).to(device)
        self.heads = start_heads(spec, target, token_ids)
        self.heads.blocks.float()
        self.is_covered = torch.zeros(target.spec.vocab_size, dtype=torch.bool, device=device)
        self.is_covered[token_ids] = True
        self.parameters = {n: p for n, p in self.heads.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.heads, config.learning_rate)
        self.step = 0

    def run(self, report: Report) -> None:
        num_steps = self.windows.num_steps
        self.step = restore_training(self.state_path, self.parameters, self.optimizers)
        while self.step < num_steps:
            losses = self._train_step()
            self.step += 1
            if self.step % self.config.checkpoint_every == 0 or self.step == num_steps:
                save_training(self.state_path, self.parameters, self.optimizers, self.step)
                save_heads(self.heads, self.state_path.with_name("heads.safetensors"))
            if self.step % 50 == 0 or self.step == num_steps:
                shown = " ".join(f"{loss:.3f}" for loss in losses.tolist())
                report("train", self.step, num_steps, f"loss by head {shown}")

    def _train_step(self) -> Tensor:
        """Losses of the heads."""
        device = self.target.embed.weight.device
        set_learning_rate(self.optimizers, learning_rate(self.config, self.step, self.windows.num_steps))
        tokens_BT, is_assistant_BT = (x.to(device) for x in self.windows.batch(self.step))
        normed_BTH, logits_BTU = _view(self.target, tokens_BT.long())
        label_BTV = logits_BTU[:, :, self.heads.token_ids].softmax(-1)
        covered_BT, losses = self.is_covered[logits_BTU.argmax(-1)], []
        for head in range(self.config.num_heads):
            ahead = head + 1
            # A token that the LM head does not cover cannot be learned.
            weight_BT = (_counts(is_assistant_BT, ahead) & covered_BT[:, ahead:]).float()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                guessed_BTV = self.heads.head_logits(head, normed_BTH[:, :-ahead])
                loss_BT = SoftCrossEntropy.apply(guessed_BTV, label_BTV[:, ahead:])
            loss = (loss_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1)
            # The heads share no parameter: each has its graph, and the logits of one are there at a time.
            (DECAY**head * loss).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses)


@torch.no_grad()
def _view(target: Decoder, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the target over whole windows: hidden states after the final norm, [B, T, H], and logits, [B, T, U]."""
    rows, length = tokens_BT.shape
    position_M = torch.arange(length, device=tokens_BT.device).repeat(rows)
    hidden_MH, _ = target.run_layers(target.embed(tokens_BT.flatten()), position_M, CausalAttend(rows))
    normed_MH = target.norm(hidden_MH)
    return normed_MH.view(rows, length, -1), target.lm_head(normed_MH).view(rows, length, -1)


def _counts(is_assistant_BT: Tensor, ahead: int) -> Tensor:
    """Which places, from `ahead` on, are followed by a token of the assistant, bool [B, T - ahead]."""
    counts = torch.zeros_like(is_assistant_BT)
    counts[:, :-1] = is_assistant_BT[:, 1:]
    return counts[:, ahead:]


@torch.no_grad()
def measure_heads(target: Decoder, heads: Heads, data: Conversations, batch_rows: int) -> list[float]:
    """Share of the assistant's tokens where a head's argmax is the target's, by head, over all windows of `data`."""
    device, sums = target.embed.weight.device, []
    for start in range(0, len(data.tokens), batch_rows):
        tokens_BT = data.tokens[start : start + batch_rows].to(device).long()
        is_assistant_BT = data.is_assistant[start : start + batch_rows].to(device)
        normed_BTH, logits_BTU = _view(target, tokens_BT)
        choice_BT, found = logits_BTU.argmax(-1), []
        for head in range(heads.spec.num_heads):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                guessed_BTV = heads.head_logits(head, normed_BTH[:, : -head - 1])
            counts_BT = _counts(is_assistant_BT, head + 1)
            agrees_BT = heads.token_ids[guessed_BTV.argmax(-1)] == choice_BT[:, head + 1 :]
            found.append((agrees_BT & counts_BT).sum() / counts_BT.sum().clamp(min=1))
        sums.append(torch.stack(found))
    return [float(x) for x in torch.stack(sums).mean(dim=0)]
