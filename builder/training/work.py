"""What training keeps in its folder, and goes on from after an interruption: whose it is, the corpus, the state.

Shapes: B rows, T tokens of a training window.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssv.builder.config import TrainingConfig
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns, Writer, Writing
from ssv.bundle.manifest import digest, file_entry
from ssv.model.decoder import Decoder
from ssv.support.errors import UserError
from ssv.support.files import save_whole, write_json
from ssv.support.progress import Report

_FILES = ("openings_file", "prompts_file", "start_from")
_USUAL = {
    "join": "input",
    "prompts_file": None,
    "num_prompts": 50_000,
    "prompt_share": 0.5,
    "greedy_share": 0.0,
    "tv_share": 0.0,
    "loss_mean": "token",
    "num_layers": 1,
    "head_rank": 0,
    "storage": "plain",
    "kept_rows": 0,
}


def training_source(config: TrainingConfig) -> dict[str, Any]:
    """The settings that change what is trained, with the content of files: equal ones train the same."""
    files = {name: getattr(config, name) for name in _FILES if name in type(config).model_fields}
    # A setting that is newer than bundles counts where it is not what they were made with.
    unsaid = {name for name, value in _USUAL.items() if getattr(config, name, value) == value}
    return {
        **config.model_dump(mode="json", exclude={*files, *unsaid, "checkpoint_every"}),
        **{
            name: None if path is None else file_entry(path).sha256
            for name, path in files.items()
            if name not in unsaid
        },
    }


def text_source(pieces: ChatPieces, turns: Turns) -> list[Any]:
    """The tokens that a corpus is begun from."""
    whole = [turns.first, turns.later] if turns.first or turns.later else []
    return [asdict(pieces), turns.openings, *whole]


def claim(work: Path, source: dict[str, Any]) -> None:
    """Notes what a folder is for.

    Raises:
        UserError: it holds the state of something else.
    """
    path, stamp = work / "distill.json", {"source": digest([json.dumps(source, sort_keys=True)])}
    if path.exists():
        try:
            same = json.loads(path.read_text()) == stamp
        except ValueError:  # torn by a power cut
            same = False
        if not same:
            raise UserError(f"{work} holds the state of another distillation", "choose another folder or remove it")
        return
    write_json(path, stamp)


def require_room(work: Path, config: TrainingConfig) -> None:
    """Refuses a disk that the corpus would fill.

    A token takes 5 bytes. One shard more than asked for may be written, and what is there already takes no more room.

    Raises:
        UserError: naming how much is missing.
    """
    there = sum(path.stat().st_size for path in work.glob("corpus-*.safetensors"))
    needed = 5 * num_shards(config) * config.rows * config.window - there
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"{work} has {free / 1e9:.1f} GB left and the corpus of {config.tokens} tokens takes {needed / 1e9:.1f} GB "
            "more",
            "choose a place with more room, or fewer tokens",
        )


def num_shards(config: TrainingConfig) -> int:
    """One shard more than is trained on: the last is for measuring."""
    return max(1, math.ceil(config.tokens / (config.rows * config.window))) + 1


def write_corpus(
    target: Decoder, pieces: ChatPieces, turns: Turns, config: TrainingConfig, work: Path, report: Report
) -> list[Path]:
    """Lets the target write the shards that are not there yet; returns all of them."""
    count = num_shards(config)
    paths = [work / f"corpus-{index:04d}.safetensors" for index in range(count)]
    how = Writing(
        config.rows, config.window, prompt_share=config.prompt_share, greedy_share=config.greedy_share
    )  # fmt: skip
    writer: Writer | None = None
    per_shard = config.rows * config.window
    for index, path in enumerate(paths):
        rate = ""
        if not path.exists():
            writer = writer or Writer(target, pieces, turns, how)
            begin = time.monotonic()
            writer.write(config.seed * 100_003 + index).save(path)
            rate = f", {per_shard / (time.monotonic() - begin) / 1e3:.0f} k tokens/s"
        report("corpus", index + 1, count, f"{(index + 1) * per_shard / 1e6:.1f} M tokens{rate}")
    return paths


class Windows:
    """The windows of a corpus, in the order that a training sees them.

    Attributes:
        num_steps: of the training.
    """

    def __init__(self, shards: Sequence[Path], config: TrainingConfig) -> None:
        self.data, self._config = [Conversations.load(path) for path in shards], config
        self._tokens = torch.cat([shard.tokens for shard in self.data])
        self._is_assistant = torch.cat([shard.is_assistant for shard in self.data])
        self._count = len(self._tokens)
        self._order: tuple[int, Tensor] | None = None
        self.num_steps = max(1, self._count * config.epochs // config.batch_rows)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and whether the assistant wrote them, both [B, T].

        The order is a fixed permutation per epoch, so that a restarted run goes on with the windows that it has not
        seen.
        """
        batch_rows = self._config.batch_rows
        epoch, index = divmod(step, max(1, self._count // batch_rows))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._config.seed + epoch)
            self._order = epoch, torch.randperm(self._count, generator=generator)
        picked = self._order[1][index * batch_rows : (index + 1) * batch_rows]
        return self._tokens[picked], self._is_assistant[picked]

    def spread(self, count: int) -> Tensor:
        """About `count` windows [B, T] spread over every shard, whose rows differ in temperature."""
        per_shard = -(-max(count, 1) // len(self.data))
        return torch.cat([shard.tokens[:: -(-len(shard.tokens) // per_shard)] for shard in self.data]).long()

    def most_frequent(self, vocab_size: int, head_size: int | None) -> Tensor:
        """The tokens that the assistant writes most, most frequent first, int64 [V]."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for shard in self.data:
            counts += torch.bincount(shard.tokens[shard.is_assistant].long(), minlength=vocab_size)
        return counts.argsort(descending=True, stable=True)[: head_size or vocab_size]


def learning_rate(config: TrainingConfig, step: int, num_steps: int, spent: float = 0.0) -> float:
    """The learning rate of a step: a warm-up, then a cosine down to a fiftieth.

    Args:
        spent: share of the time that there is for training, if it has a limit.
    """
    warm_up = min(100, num_steps // 10 + 1)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    done = min(1.0, max(spent, (step - warm_up) / max(1, num_steps - warm_up)))
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the norms and biases; one learning rate serves both.

    The residual stream that a draft takes over from its target has values of some tens, so matrices have far to go: a
    draft of SmolLM2-135M reached 51 % agreement on real prompts in 640 steps of AdamW at 1e-3, and 58 % at 2e-3. In 200
    steps AdamW at 8e-3 reached 46.9 %, no more than at 4e-3, and Muon at 1e-2 48.6 %.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # Rows of rare tokens get hardly any gradient, which orthogonalising would bring to the size of all others.
    of_head = [p for name, p in trained if name.startswith(("head_in.", "head_out."))]
    matrices = [p for name, p in trained if p.ndim == 2 and not any(p is other for other in of_head)]
    vectors = [p for _, p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": vectors}]
    if of_head:
        groups.append({"params": of_head, "relative_rate": HEAD_RATE})
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=_fused(trained)),
    ]


HEAD_RATE = 0.1
"""Learning rate of the correction of an LM head, relative to the others'."""


def _fused(trained: list[tuple[str, nn.Parameter]]) -> bool:
    return bool(trained) and trained[0][1].is_cuda


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Sets the rate of each group of parameters, by the rate that it has relative to others."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("relative_rate", 1.0)


def save_training(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    **others: Tensor,
) -> None:
    """Writes what a training goes on from."""
    state = {f"parameter.{n}": p.detach() for n, p in parameters.items()} | others
    for name, parameter in parameters.items():
        for key, value in _of(optimizers, parameter).state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    tensors = {n: t.cpu().contiguous() for n, t in state.items()} | {"step": torch.tensor(step)}
    save_whole(tensors, path)


def restore_training(path: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Takes such a state, if there is one; returns the steps done."""
    if not path.exists():
        return 0
    state = load_file(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"parameter.{name}"])
        optimizer = _of(optimizers, parameter)
        for full_name, value in state.items():
            kind, _, rest = full_name.partition(".")
            key, _, of = rest.partition(".")
            if kind == "optimizer" and of == name:
                # The optimizers keep their step count on the CPU, a fused one with the parameters.
                on_cpu = key == "step" and not optimizer.defaults.get("fused")
                optimizer.state[parameter][key] = value if on_cpu else value.to(parameter.device)
    return int(state["step"])


def seconds_trained(path: Path) -> float:
    """How long the training took that such a state is of; 0 where there is none, or it does not say."""
    return float(load_file(path).get("seconds", 0.0)) if path.exists() else 0.0


def _of(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor) -> torch.optim.Optimizer:
    return next(o for o in optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))
