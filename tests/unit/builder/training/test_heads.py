"""Training Medusa's heads on a tiny target: what the pieces promise, not how good the result is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_decoder, whole_window
from tiny_bundle import write_recipe

from ssv.builder.cli import main
from ssv.builder.config import HeadsConfig
from ssv.builder.target import load_target
from ssv.builder.training import heads as training
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns, write_conversations
from ssv.builder.training.heads import HeadsResult, distill_heads, measure_heads
from ssv.model.heads import heads_spec, load_heads, start_heads
from ssv.support.errors import UserError
from ssv.support.progress import silent

END = 5
PIECES = ChatPieces(before=[1, 2], to_assistant=[END, 3], to_user=[END, 4], end_of_turn=END)


def settings(**changes: object) -> HeadsConfig:
    base = {
        "num_heads": 3, "head_size": 48, "tokens": 16 * 24 * 2, "rows": 16, "window": 24, "batch_rows": 8,
        "epochs": 2, "checkpoint_every": 3, "learning_rate": 0.02,
    }  # fmt: skip
    return HeadsConfig.model_validate(base | changes)


def run(work: Path, **changes: object) -> HeadsResult:
    return distill_heads(
        tiny_decoder(), PIECES, Turns([[20, 21], [30]]), settings(**changes), work, silent, weights_sha256="0"
    )


def test_the_label_of_a_head_is_what_the_target_says_there(tmp_path: Path) -> None:
    """The loss of an untrained head, by hand: what it says after t against what the target says after t + d + 1."""
    target = tiny_decoder()
    run(tmp_path)
    config = settings(batch_rows=24)
    shards = sorted(tmp_path.glob("corpus-*.safetensors"))[:-1]
    trainer = training._Trainer(target, config, shards, tmp_path / "none")
    tokens_BT, is_assistant_BT = trainer.windows.batch(0)
    losses, ids = trainer._train_step(), trainer.heads.token_ids
    _, logits_BTU, _ = whole_window(target, tokens_BT.long())
    for head in range(3):
        total, count = 0.0, 0
        for b in range(len(tokens_BT)):
            for t in range(24 - head - 2):
                at = t + head + 1
                if is_assistant_BT[b, at + 1] and int(logits_BTU[b, at].argmax()) in ids.tolist():
                    label, said = logits_BTU[b, at, ids].softmax(0), logits_BTU[b, t, ids].log_softmax(0)
                    total, count = total - float(label @ said), count + 1
        assert count > 10
        assert float(losses[head]) == pytest.approx(total / count, rel=1e-4)


def test_training_lowers_the_loss_of_every_head(tmp_path: Path) -> None:
    target = tiny_decoder()
    trained = run(tmp_path / "work", rows=64, tokens=64 * 24 * 4, epochs=8, head_size=None)
    held_out = write_conversations(target, PIECES, [[20, 21]], rows=64, window=24, seed=99)
    start = start_heads(heads_spec(target.spec, 3, 1, None), target, torch.arange(112))
    with torch.no_grad():
        before, after = (_losses(target, heads, held_out) for heads in (start, trained.heads))
    for head in range(3):
        assert after[head] < before[head] - 0.15


def _losses(target: object, heads: object, data: Conversations) -> list[float]:
    hidden, logits, _ = whole_window(target, data.tokens.long())  # type: ignore[arg-type]
    guessed = heads.logits(hidden.flatten(0, 1))  # type: ignore[attr-defined]
    said = guessed.view(*data.tokens.shape, 3, -1).log_softmax(-1)
    found = []
    for head in range(3):
        label = logits[:, head + 1 :, heads.token_ids].softmax(-1)  # type: ignore[attr-defined]
        found.append(-float((label * said[:, : -head - 1, head]).sum(-1).mean()))
    return found


def test_restart_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between checkpoints ends with the very same heads."""
    whole = run(tmp_path / "whole")
    steps, train_step = 0, training._Trainer._train_step

    def dies(trainer: training._Trainer) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(training._Trainer, "_train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert int(load_file(tmp_path / "killed" / "train.safetensors")["step"]) == 3
    resumed = run(tmp_path / "killed")
    for (name, mine), theirs in zip(resumed.heads.state_dict().items(), whole.heads.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.agreement == whole.agreement


def test_work_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="holds the state of another distillation"):
        run(tmp_path, num_heads=2)


def test_the_result_says_what_was_done(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.tokens_written == 16 * 24 * 2
    assert result.tokens_trained == 2 * result.tokens_written
    held_out = Conversations.load(sorted(tmp_path.glob("corpus-*.safetensors"))[-1])
    assert result.agreement == measure_heads(tiny_decoder(), result.heads, held_out, 8)
    stored = load_heads(tmp_path / "heads.safetensors", tiny_decoder())
    assert stored.spec == result.heads.spec and torch.equal(stored.token_ids, result.heads.token_ids)


def test_agreement_is_counted_where_the_assistant_speaks() -> None:
    """Heads that guess one token always: the share of the assistant's places where the target chooses it."""
    target = tiny_decoder()
    data = write_conversations(target, PIECES, [[20, 21]], rows=8, window=24, seed=3)
    _, logits_BTU, _ = whole_window(target, data.tokens.long())
    choice_BT = logits_BTU.argmax(-1)
    token = int(choice_BT[:, 2:-1][data.is_assistant[:, 3:]].mode().values)
    heads = start_heads(heads_spec(target.spec, 2, 1, 1), target, torch.tensor([token]))
    expected = []
    for head in range(2):
        places = [(b, t) for b in range(8) for t in range(head + 1, 23) if data.is_assistant[b, t + 1]]
        expected.append(sum(int(choice_BT[b, t]) == token for b, t in places) / len(places))
    assert measure_heads(target, heads, data, 8) == pytest.approx(expected)
    assert expected[0] > 0


def test_heads_are_distilled_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, heads=True)
    out = tmp_path / "made" / "heads.safetensors"
    assert main(["distill", str(recipe), "--kind", "medusa", "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["agreement_by_head"]) == 3 and facts["tokens_trained"] > 0
    assert load_heads(out, load_target(tmp_path / "target").decoder).spec.num_heads == 3
