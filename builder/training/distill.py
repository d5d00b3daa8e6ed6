"""Trains a draft to predict what its target says.

The label is the target's distribution, restricted to the tokens that the draft's LM head covers. A conditioned draft is
trained several of its own steps deep (`ssv.builder.training.passes`).

Shapes: B rows, T tokens of a training window, M = B * T, H hidden, V head rows of the draft.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssv.builder.config import DistillConfig
from ssv.builder.training.acceptance import CHAIN, TREE, tokens_per_pass
from ssv.builder.training.compiled import compile_layers
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns, Writer, Writing
from ssv.builder.training.head_loss import HeadLoss
from ssv.builder.training.labels import Labeller
from ssv.builder.training.passes import CausalAttend, draft_passes, hidden_passes, judged, share_agreed, view_target
from ssv.builder.training.work import (
    Windows,
    claim,
    learning_rate,
    make_optimizers,
    require_room,
    restore_training,
    save_training,
    seconds_trained,
    set_learning_rate,
    text_source,
    training_source,
    write_corpus,
)
from ssv.model.checkpoint import DecoderSpec
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, DraftSpec, draft_spec, grow_draft, load_draft, save_draft, start_from_target
from ssv.support.errors import UserError
from ssv.support.progress import Report


@dataclass(frozen=True, slots=True)
class DistillResult:
    """A trained draft and what was seen of it on windows of the corpus that were kept apart.

    Attributes:
        agreement: per depth, the share of the assistant's tokens where the draft's argmax is the target's.
        tokens_written, tokens_trained: sizes, in tokens.
        tokens_per_pass: of a chain and a tree on the kept conversations; None without such.
    """

    draft: Draft
    agreement: list[float]
    tokens_written: int
    tokens_trained: int
    tokens_per_pass: tuple[float, float] | None = None


def distill(
    target: Decoder,
    pieces: ChatPieces,
    turns: Turns,
    config: DistillConfig,
    work: Path,
    report: Report,
    *,
    weights_sha256: str,
    kept: Turns | None = None,
    minutes: float | None = None,
    compiled: bool = True,
) -> DistillResult:
    """Writes a corpus, trains a draft on it and measures it.

    Everything is kept in `work`: run again after an interruption, it goes on from the last shard and the last
    checkpoint.

    Args:
        target: the target's network on the device to train on; in bf16 on CUDA.
        turns: what the turns of users are made of.
        work: folder for the corpus shards and the training state.
        weights_sha256: of the target's checkpoint: state that was made from another is not gone on from.
        kept: turns of the conversations that checkpoints are chosen by; None for `turns`.
        minutes: that training takes at most, whatever `config` asks for; the learning rate falls with them. None for
            no limit.
        compiled: on CUDA, whether torch.compile and graphs are used.

    Raises:
        UserError: `work` holds the state of another distillation, or the draft to start from has another shape.
        OSError: no room for what has to be kept.
        CheckpointError: the draft to start from is damaged or made for another target.
    """
    start = _earlier(target, config)  # before anything is written
    work.mkdir(parents=True, exist_ok=True)
    claim(work, {"target": weights_sha256, "text": text_source(pieces, turns), **training_source(config)})
    require_room(work, config)
    shards = write_corpus(target, pieces, turns, config, work, report)
    held_out = shards.pop()
    kept_path = None
    if config.kept_rows:
        kept_path = work / "kept.safetensors"
        if not kept_path.exists():
            how = Writing(config.kept_rows, config.window, greedy=True, prompt_share=1.0)
            Writer(target, pieces, kept or turns, how, compiled=False).write(config.seed + 7).save(kept_path)
    trainer = Trainer(target, config, shards, work, start, kept_path, minutes=minutes, compiled=compiled)
    trainer.run(report)
    return DistillResult(
        draft=trainer.draft,
        agreement=measure_agreement(target, trainer.draft, Conversations.load(held_out), config),
        tokens_written=config.rows * config.window * len(shards),
        tokens_trained=trainer.step * config.batch_rows * config.window,
        tokens_per_pass=trainer.best,
    )


class SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row to a distribution.

    Written out because at some ten thousand rows of as many logits training is bound by memory traffic: this keeps one
    tensor of the logits' dtype and makes the gradient in place, where autograd would keep several in fp32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of each row, fp32 [...].

        Args:
            logits, label: [..., V], label normalised.
        """
        log_p = logits.log_softmax(-1, dtype=logits.dtype)  # autocast would make it fp32
        ctx.save_for_backward(log_p, label)
        return -(label.unsqueeze(-2) @ log_p.unsqueeze(-1)).flatten(-3).float().view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p, label = ctx.saved_tensors
        return log_p.exp().sub_(label).mul_(grad.unsqueeze(-1).to(log_p.dtype)), None


# Some four hundred times the inputs of the fit.
_START_TOKENS = 500_000


@torch.no_grad()
def fit_start(target: Decoder, draft: Draft, tokens_BT: Tensor, rows: int = 16, ridge: float = 1e-2) -> float:
    """Starts a conditioned draft so that its layer, a copy of the target's last, is given about what it knows.

    Sets the join to the least-squares estimate of how the highest tapped features change from one token to the next,
    from the embedding of the latter and the features of the former. With a join of zero the draft starts as a predictor
    of the token that it has just been given, and training spends long on undoing that. The tap is left as it is, so
    that the draft's own hidden state, the features of its further steps, is in the same space as the target's.

    Args:
        rows: windows of one pass of the target.
        ridge: relative to each input's own mean square: a few feature channels are some hundred times the rest.

    Returns:
        What the estimate leaves of the features' mean square, averaged over the channels.
    """
    assert draft.tap is not None
    device, length, hidden = target.embed.weight.device, tokens_BT.shape[1], target.spec.hidden_size
    gram = torch.zeros(2 * hidden, 2 * hidden, device=device)
    cross = torch.zeros(2 * hidden, hidden, device=device)
    change_H, square_H = torch.zeros(hidden, device=device), torch.zeros(hidden, device=device)
    for chunk_BT in tokens_BT.to(device).split(rows):
        position_M = torch.arange(length, device=device).repeat(len(chunk_BT))
        embedded_MH = target.embed(chunk_BT.flatten())
        _, top_MH = target.run_layers(embedded_MH, position_M, CausalAttend(len(chunk_BT)), draft.tap.layers[-1:])
        assert top_MH is not None
        shape = (len(chunk_BT), length, hidden)
        embedded_BTH, top_BTH = embedded_MH.float().view(shape), top_MH.float().view(shape)
        # Without the first token: its features are tens of times larger than any other's.
        before, after, said = top_BTH[:, 1:-1], top_BTH[:, 2:], embedded_BTH[:, 2:]
        x_MX = torch.cat((draft.embed_norm(said), draft.feature_norm(before)), dim=-1).flatten(0, 1)
        y_MH = (after - before).flatten(0, 1)
        gram += x_MX.T @ x_MX
        cross += x_MX.T @ y_MH
        change_H += y_MH.square().sum(0)
        square_H += after.flatten(0, 1).square().sum(0)
    # The tiny absolute term is for inputs that are always zero.
    penalty = ridge * gram.diagonal() + 1e-9 * gram.diagonal().mean()
    weight_XH = torch.linalg.solve((gram + penalty.diag()).double(), cross.double()).float()
    draft.join.weight.copy_(weight_XH.T)
    left_H = change_H - 2 * (weight_XH * cross).sum(0) + (weight_XH * (gram @ weight_XH)).sum(0)
    return float((left_H / square_H.clamp(min=1e-9)).mean())


class Trainer:
    """Trains a draft on a corpus, with everything that a restart needs in a folder.

    Attributes:
        draft: the one trained; once it is, the best checkpoint.
        step: steps done.
        best: tokens per pass of a chain and of a tree, of the best checkpoint; None where none was measured.
        deadline: when to stop for now, by `time.monotonic`, with everything saved that going on needs.
    """

    def __init__(
        self,
        target: Decoder,
        config: DistillConfig,
        shards: list[Path],
        work: Path,
        start: Draft | None,
        kept: Path | None = None,
        *,
        minutes: float | None = None,
        compiled: bool = True,
    ) -> None:
        self.target, self.config = target, config
        self.windows = Windows(shards, config)
        self.state_path = work / "train.safetensors"
        self._best_path = work / "best.safetensors"
        device = target.embed.weight.device
        self.draft = start if start is not None else _untrained(target, config, self.windows)
        self.draft.share_target(target, self.draft.token_ids)
        self.parameters = {n: p for n, p in self.draft.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.draft, config.learning_rate)
        self.num_steps = self.windows.num_steps
        self.step = 0
        self.best: tuple[float, float] | None = None
        self.deadline = math.inf
        self._kept = None if kept is None else Conversations.load(kept)
        self._seconds = 0.0 if minutes is None else 60 * minutes
        self._before = 0.0
        self._begin = time.monotonic()
        self._compiled = compiled and device.type == "cuda"
        self._labeller = Labeller(target, self.draft)

    @property
    def seconds(self) -> float:
        """That training has taken, those before a restart included."""
        return self._before + time.monotonic() - self._begin

    @property
    def _spent(self) -> float:
        """Share of the time that there is; 0 where it has no limit."""
        return self.seconds / self._seconds if self._seconds else 0.0

    def run(self, report: Report) -> None:
        """Trains from where the last run was stopped to the end. Where conversations are kept to measure on, `draft` is
        the best one then.
        """
        self.step = restore_training(self.state_path, self.parameters, self.optimizers)
        self._before, self._begin = seconds_trained(self.state_path), time.monotonic()
        if self._best_path.exists():
            self.best = self._measure(_reloaded(self._best_path, self.target))
        has_join = self.draft.conditioned and self.draft.spec.eagle3 is None
        if self.step == 0 and has_join and self.config.start_from is None:
            left = fit_start(self.target, self.draft, self.windows.spread(_START_TOKENS // self.config.window))
            report("train", 0, self.num_steps, f"least-squares start, {left:.2f} of the features left")
        with compile_layers(self.target, self.draft.decoder) if self._compiled else nullcontext():
            self._train(report)
        if self._kept is not None and self._best_path.exists():
            self.draft = _reloaded(self._best_path, self.target)

    def _train(self, report: Report) -> None:
        config = self.config
        shown_step, shown_at = self.step, time.monotonic()
        over = self._is_over()
        while not over:
            loss, agreement = self._train_step()
            self.step += 1
            over = self._is_over()
            if self.step % config.checkpoint_every == 0 or over:
                report("train", self.step, self.num_steps, self._save())
            if self.step % 50 == 0 or over:
                shown = " ".join(f"{a:.3f}" for a in agreement.tolist())
                now = time.monotonic()
                rate = (self.step - shown_step) * config.batch_rows * config.window / (now - shown_at) / 1e3
                shown_step, shown_at = self.step, now
                report(
                    "train",
                    self.step,
                    self.num_steps,
                    f"loss {loss.item():.3f}, agreement by depth {shown}, {rate:.0f} k tokens/s",
                )

    def _is_over(self) -> bool:
        return self.step >= self.num_steps or self._spent >= 1 or time.monotonic() >= self.deadline

    def _train_step(self) -> tuple[Tensor, Tensor]:
        config, device, draft = self.config, self.target.embed.weight.device, self.draft
        set_learning_rate(self.optimizers, learning_rate(config, self.step, self.num_steps, self._spent))
        tokens_BT, is_assistant_BT = self.windows.batch(self.step)
        tokens_BT = tokens_BT.to(device, non_blocking=True).long()
        # The labels are made once; every pass of a conditioned draft is about the same places.
        labels = self._labeller.labels(tokens_BT, is_assistant_BT)
        agreement, total = [], torch.zeros((), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for k, hidden_BTH in enumerate(hidden_passes(draft, tokens_BT, labels.features_MX, config.depth)):
                x_NX = draft.decoder.norm(hidden_BTH.flatten(0, 1)[labels.place_N])
                if draft.head_in is not None:
                    x_NX = torch.cat((x_NX, draft.head_in(x_NX)), dim=1)
                loss, agrees_N = HeadLoss.apply(
                    x_NX,
                    draft.decoder.lm_head.weight,
                    None if draft.head_out is None else draft.head_out.weight,
                    labels.logits_NV,
                    labels.weights(k, len(tokens_BT), config.loss_mean),
                    config.tv_share,
                )
                total = total + config.depth_decay**k * loss
                agreement.append(labels.agreement(agrees_N, k))
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total.detach(), torch.stack(agreement)

    def _save(self) -> str:
        """Writes what a restart goes on from; says how good the draft is, if that is measured."""
        save_training(
            self.state_path,
            self.parameters,
            self.optimizers,
            self.step,
            token_ids=self.draft.token_ids,
            seconds=torch.tensor(self.seconds),
        )
        path = self.state_path.with_name("draft.safetensors")
        save_draft(self.draft, path, storage=self.config.storage)
        if self._kept is None:
            return "saved"
        found = self._measure(self.draft)
        if self.best is None or sum(found) >= sum(self.best):
            self.best = found
            save_draft(self.draft, self._best_path, torch.float32)
        return f"saved, tokens per pass {found[0]:.3f} as a chain of 5, {found[1]:.3f} as a tree of 32"

    def _measure(self, draft: Draft) -> tuple[float, float]:
        assert self._kept is not None
        torch.compiler.set_stance("force_eager")  # its shapes are used once
        try:
            chain, tree = tokens_per_pass(self.target, draft, self._kept, (CHAIN, TREE))
        finally:
            torch.compiler.set_stance("default")
        return chain, tree


def _reloaded(path: Path, target: Decoder) -> Draft:
    return load_draft(path, target, for_training=True).to(target.embed.weight.device)


def spec_to_distill(target: DecoderSpec, config: DistillConfig) -> DraftSpec:
    """Spec of the draft that is asked for.

    Raises:
        UserError: see `draft_spec`.
    """
    return draft_spec(
        target,
        config.kind,
        tuple(config.layers),
        config.head_size,
        eagle3=config.join == "eagle3",
        num_layers=config.num_layers,
        head_rank=config.head_rank,
    )


def _spec(target: Decoder, config: DistillConfig) -> DraftSpec:
    return spec_to_distill(target.spec, config)


def _earlier(target: Decoder, config: DistillConfig) -> Draft | None:
    """The draft to train further, in fp32 on the target's device."""
    if config.start_from is None:
        return None
    draft, wanted = load_draft(config.start_from, target, for_training=True), _spec(target, config)
    if draft.spec != wanted:
        try:
            draft = grow_draft(draft, wanted, target)
        except UserError as error:
            raise UserError(f"{config.start_from}: {error.what}", error.cure) from error
    draft = draft.to(target.embed.weight.device).requires_grad_()
    draft.share_target(target, draft.token_ids)
    return draft


def _untrained(target: Decoder, config: DistillConfig, windows: Windows) -> Draft:
    head = windows.most_frequent(target.spec.vocab_size, config.head_size).to(target.embed.weight.device)
    return start_from_target(_spec(target, config), target, tuple(config.layers), head).float()


@torch.no_grad()
def measure_agreement(target: Decoder, draft: Draft, data: Conversations, config: DistillConfig) -> list[float]:
    """Share of the assistant's tokens, by depth, where the draft's argmax is the target's, over all of `data`."""
    device = target.embed.weight.device
    sums: list[Tensor] = []
    for start in range(0, len(data.tokens), config.batch_rows):
        tokens_BT = data.tokens[start : start + config.batch_rows].to(device).long()
        is_assistant_BT = data.is_assistant[start : start + config.batch_rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            view = view_target(target, draft, tokens_BT)
            steps = draft_passes(draft, tokens_BT, view, config.depth)
            per_depth = [share_agreed(draft, step, view, *judged(step, view, is_assistant_BT)) for step in steps]
        sums.append(torch.stack(per_depth))
    return [float(x) for x in torch.stack(sums).mean(dim=0)]
