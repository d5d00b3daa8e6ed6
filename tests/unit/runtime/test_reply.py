"""The server's outputs, as they are sent and as they are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssv.runtime.reply import Reply, outputs

REPLY = Reply(
    text="naïve €",
    finish_reason="stop",
    num_input_tokens=7,
    num_output_tokens=2,
    judged=8,
    accepted=6,
    unverified=1,
    typical=2,
    target_passes=3,
    cached_tokens=5,
    tier="turbo",
    lossless=False,
    withdrawn_tier="balanced",
)


def test_what_is_read_is_what_was_sent() -> None:
    tensors = {name: each.encode() if isinstance(each, str) else each for name, each in REPLY.outputs().items()}
    assert Reply.read(tensors.__getitem__) == REPLY


def test_every_output_has_a_name_of_its_own_and_a_meaning() -> None:
    assert len({output.name for output in outputs()}) == len(outputs()) == len(REPLY.outputs())
    assert all(output.meaning for output in outputs())
    assert all(type(REPLY.outputs()[output.name]) is output.kind for output in outputs())


def test_what_follows_from_the_others_need_not_be_sent() -> None:
    tensors = {name: each.encode() if isinstance(each, str) else each for name, each in REPLY.outputs().items()}
    del tensors["acceptance_rate"]
    assert Reply.read(tensors.__getitem__).acceptance_rate == 0.75
    assert replace(REPLY, judged=0, accepted=0).acceptance_rate == 0.0


@pytest.mark.parametrize("name", [output.name for output in outputs() if not output.is_derived])
def test_what_lacks_is_an_error(name: str) -> None:
    tensors = {
        each: b"" if isinstance(value, str) else value for each, value in REPLY.outputs().items() if each != name
    }
    with pytest.raises(KeyError, match=name):
        Reply.read(tensors.__getitem__)
