"""Corpus, distillation and scorer fitting on a tiny target: what the pieces promise, not how good the result is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_decoder

from ssv.builder.config import DistillConfig, ScorerConfig
from ssv.builder.training import distill as distilling
from ssv.builder.training.corpus import ChatPieces, Conversations, Turns, write_conversations
from ssv.builder.training.distill import distill, measure_agreement
from ssv.builder.training.passes import CausalAttend, draft_passes, view_target
from ssv.builder.training.scorer_fit import Samples, auc, collect_samples, fit_scorer, reliability
from ssv.model.checkpoint import CheckpointError
from ssv.model.draft import Draft, draft_spec, load_draft, save_draft, start_from_target
from ssv.support.errors import UserError
from ssv.support.progress import silent

END = 5
PIECES = ChatPieces(before=[1, 2], to_assistant=[END, 3], to_user=[END, 4], end_of_turn=END)
OPENINGS = [[20, 21, 22, 23], [30, 31]]


def write(seed: int = 0, rows: int = 64, **options: float) -> Conversations:
    return write_conversations(tiny_decoder(), PIECES, OPENINGS, rows=rows, window=24, seed=seed, **options)


def settings(**changes: object) -> DistillConfig:
    base = {
        "layers": [0, 1], "head_size": 48, "tokens": 16 * 24 * 2, "rows": 16, "window": 24, "batch_rows": 8,
        "depth": 2, "epochs": 2, "checkpoint_every": 3,
    }  # fmt: skip
    return DistillConfig.model_validate(base | changes)


def run(work: Path, **changes: object) -> distilling.DistillResult:
    return distill(tiny_decoder(), PIECES, Turns(OPENINGS), settings(**changes), work, silent, weights_sha256="0" * 64)


# --- corpus ---------------------------------------------------------------------------------------------------------


def test_conversations_follow_the_template() -> None:
    data = write(max_user_tokens=4)
    assert data.tokens.shape == data.is_assistant.shape == (64, 24)
    assert (data.tokens[:, :2] == torch.tensor(PIECES.before)).all()
    turns = 0
    for ids, spoken in zip(data.tokens.tolist(), data.is_assistant.tolist(), strict=True):
        in_user = True
        for at in range(2, len(ids) - 1):
            assert not (in_user and spoken[at])
            if ids[at] == END:
                turns += 1
                in_user = not in_user
                assert ids[at + 1] == (4 if in_user else 3)
                assert not spoken[at + 1]
    assert turns > 64


def test_same_seed_same_text() -> None:
    assert torch.equal(write(seed=3).tokens, write(seed=3).tokens)
    assert not torch.equal(write(seed=3).tokens, write(seed=4).tokens)


def test_openings_whole_and_cut() -> None:
    def begun(data: Conversations, ids: list[int]) -> int:
        return int((data.tokens[:, 2 : 2 + len(ids)] == torch.tensor(ids)).all(dim=1).sum())

    whole = write(rows=256, opening_share=1.0, cut_share=0.0)
    assert begun(whole, OPENINGS[0]) + begun(whole, OPENINGS[1]) + begun(whole, []) * 0 > 128
    assert begun(whole, OPENINGS[0][:2]) == begun(whole, OPENINGS[0])
    cut = write(rows=256, opening_share=1.0, cut_share=1.0)
    assert 0 < begun(cut, OPENINGS[0]) < begun(cut, OPENINGS[0][:2]) < begun(cut, OPENINGS[0][:1])
    none = write(rows=256, opening_share=0.0)
    assert begun(none, OPENINGS[0]) == 0


def test_greedy_conversations_are_the_targets_argmax() -> None:
    data = write(greedy=True)
    target = tiny_decoder()
    draft = start_from_target(draft_spec(target.spec, "conditioned", (0, 1), 48), target, (0, 1), torch.arange(48))
    argmax_BT = view_target(target, draft, data.tokens.long()).argmax_BT
    spoken = data.is_assistant[:, 1:]
    assert spoken.any()
    assert torch.equal(data.tokens[:, 1:][spoken].long(), argmax_BT[:, :-1][spoken])


def test_interrupted_writing_leaves_no_torn_shard(tmp_path: Path) -> None:
    path = tmp_path / "corpus.safetensors"
    data = write()
    data.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(Conversations.load(path).tokens, data.tokens)


# --- distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_restart_goes_on_where_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between checkpoints ends with the very same draft."""
    whole = run(tmp_path / "whole", kind=kind)
    steps = 0
    train_step = distilling.Trainer._train_step

    def dies(trainer: distilling.Trainer) -> object:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(distilling.Trainer, "_train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", kind=kind)
    state = load_file(tmp_path / "killed" / "train.safetensors")
    assert int(state["step"]) == 3
    resumed = run(tmp_path / "killed", kind=kind)
    assert steps == 6  # five of the killed run, and the sixth that died
    for (name, mine), theirs in zip(resumed.draft.state_dict().items(), whole.draft.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.agreement == whole.agreement


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    seen: list[float] = []

    def report(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and "loss" in note:
            seen.append(float(note.split()[1].rstrip(",")))

    target = tiny_decoder()
    distill(
        target,
        PIECES,
        Turns(OPENINGS),
        settings(epochs=60, learning_rate=4e-3),
        tmp_path,
        report,
        weights_sha256="0" * 64,
    )
    assert seen[-1] < 0.97 * seen[0]


def test_work_of_another_configuration_is_refused(tmp_path: Path) -> None:
    openings = tmp_path / "openings.txt"
    openings.write_text("Explain\n")
    work = tmp_path / "work"
    run(work, openings_file=openings)
    stamp = (work / "distill.json").read_text()
    with pytest.raises(UserError, match="another distillation: choose another folder or remove it"):
        run(work, depth=3, openings_file=openings)
    openings.write_text("Translate\n")
    with pytest.raises(UserError, match="another distillation"):
        run(work, openings_file=openings)
    assert (work / "distill.json").read_text() == stamp


def test_a_moved_file_and_another_pace_of_saving_are_no_other_distillation(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("Explain\n")
    first = run(tmp_path / "work", openings_file=tmp_path / "one.txt")
    again = run(tmp_path / "work", openings_file=tmp_path / "two.txt", checkpoint_every=1)
    assert torch.equal(first.draft.join.weight, again.draft.join.weight)


def test_weights_of_another_target_are_another_distillation(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="another distillation"):
        distill(tiny_decoder(), PIECES, Turns(OPENINGS), settings(), tmp_path, silent, weights_sha256="1" * 64)


def test_a_corpus_that_the_disk_has_no_room_for_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes .* GB more: choose a place with more room, or fewer tokens"):
        run(tmp_path, tokens=10**15)
    assert not list(tmp_path.glob("corpus*"))


@pytest.mark.parametrize("failing", ["corpus-0001", "train"])
def test_a_full_disk_is_named_and_leaves_no_torn_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(tensors: object, path: Path, metadata: object = None) -> None:
        if failing in path.name:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match=rf"No space left on device: .*{failing}") as raised:
            run(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*.part"))
    assert run(tmp_path).tokens_written > 0  # goes on


def test_training_goes_on_from_an_earlier_draft(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.safetensors"
    save_draft(run(tmp_path / "first").draft, earlier, torch.float32)
    still = run(tmp_path / "still", start_from=earlier, seed=1, learning_rate=1e-9).draft
    on = run(tmp_path / "on", start_from=earlier, seed=1).draft
    first = load_draft(earlier, tiny_decoder())
    assert torch.equal(on.token_ids, first.token_ids)
    for name, value in first.own_state().items():
        assert torch.allclose(still.state_dict()[name], value, atol=1e-6), name
    assert not torch.allclose(on.join.weight, first.join.weight, atol=1e-4)
    assert torch.equal(on.decoder.embed.weight, tiny_decoder().embed.weight)


def test_an_earlier_draft_of_another_shape_is_refused(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.safetensors"
    save_draft(run(tmp_path / "first").draft, earlier)
    with pytest.raises(UserError, match="has another head_size than the recipe asks for"):
        run(tmp_path / "on", start_from=earlier, head_size=32)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist"):
        run(tmp_path / "on", start_from=tmp_path / "nowhere.safetensors")
    assert not (tmp_path / "on").exists()
    save_draft(run(tmp_path / "second", seed=1).draft, earlier)
    run(tmp_path / "third", start_from=earlier)
    save_draft(run(tmp_path / "second", seed=1).draft, earlier, torch.float32)
    with pytest.raises(UserError, match="another distillation"):
        run(tmp_path / "third", start_from=earlier)


def test_the_result_says_what_was_done(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.tokens_written == 2 * 16 * 24
    assert result.tokens_trained == 2 * result.tokens_written
    assert len(result.agreement) == 2
    save_draft(result.draft, tmp_path / "draft.safetensors", torch.float32)
    held_out = Conversations.load(tmp_path / "corpus-0002.safetensors")
    stored = load_draft(tmp_path / "draft.safetensors", tiny_decoder())
    assert measure_agreement(tiny_decoder(), stored, held_out, settings()) == pytest.approx(result.agreement)


@torch.no_grad()
def test_deeper_passes_see_what_they_will_when_drafting() -> None:
    """Pass k at entry i is what a decoder of one layer gives when it is fed k of its own hidden states in turn."""
    target = tiny_decoder()
    spec = draft_spec(target.spec, "conditioned", (0, 1), 48)
    draft = start_from_target(spec, target, (0, 1), torch.arange(48))
    draft.join.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    view = view_target(target, draft, tokens_BT)
    passes = list(draft_passes(draft, tokens_BT, view, depth=3))
    assert draft.tap is not None and view.features_MX is not None
    features = draft.tap.project(view.features_MX)
    for last in range(2, 8):  # entry of the third drafted token
        mixed = features[: last + 1].clone()
        for k in range(1, 3):
            hidden = _whole(draft, tokens_BT[0, 1 : last + 2], mixed)
            mixed[last - 2 + k] = hidden[last - 3 + k]
        expected = _whole(draft, tokens_BT[0, 1 : last + 2], mixed)[last]
        assert torch.allclose(passes[2].hidden_BTH[0, last], expected, atol=1e-4), last


def _whole(draft: Draft, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return draft.run_layers(ids, features, torch.arange(len(ids)), CausalAttend(1))


# --- scorer ---------------------------------------------------------------------------------------------------------


def test_auc() -> None:
    label = torch.tensor([False, False, True, True])
    assert auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), label) == 1.0
    assert auc(torch.tensor([0.4, 0.3, 0.2, 0.1]), label) == 0.0
    assert auc(torch.tensor([0.1, 0.3, 0.2, 0.4]), label) == 0.75
    assert auc(torch.ones(4), label) == 0.5


def test_reliability_of_a_calibrated_score() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(20_000, generator=generator)
    bins = reliability(predicted, torch.rand(20_000, generator=generator) < predicted)
    assert len(bins) == 10
    assert all(abs(mean - share) < 0.04 for mean, share in bins)


def test_scorer_finds_a_linear_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 11, generator=generator) * 3 + 1
    chance = torch.sigmoid(features[:, 2] - 2 * features[:, 9] + 1)
    rejected = torch.rand(4000, generator=generator) < chance
    samples = Samples(features, rejected, torch.rand(4000, generator=generator))
    scorer, report = fit_scorer(samples, ScorerConfig())
    assert report.num_fit == 3200
    assert report.auc > 0.9 > report.auc_baseline
    assert report.beats_baseline
    assert abs(float(scorer.weight_F[2]) - 1) < 0.2
    assert abs(float(scorer.weight_F[9]) + 2) < 0.3


def test_scorer_needs_both_labels() -> None:
    with pytest.raises(UserError, match="200 samples cannot be fitted"):
        fit_scorer(Samples(torch.randn(200, 4), torch.zeros(200, dtype=torch.bool), torch.rand(200)), ScorerConfig())


def test_samples_stop_where_the_draft_goes_astray() -> None:
    target = tiny_decoder()
    draft = start_from_target(draft_spec(target.spec, "conditioned", (0, 1), 112), target, (0, 1), torch.arange(112))
    data = write(greedy=True)
    one = collect_samples(target, draft, data, ScorerConfig(depth=1))
    three = collect_samples(target, draft, data, ScorerConfig(depth=3))
    accepted = int((~one.rejected_N).sum())
    assert len(three.rejected_N) - len(one.rejected_N) <= 2 * accepted
    assert three.features_NF.shape[1] == 64 + 3
